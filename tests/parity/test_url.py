"""A server that runs, asked for leaks: one that plays OpenAI's API, and a real `vllm serve`."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import BUILD
from tests.geo3k import NANO
from vllm_deepstack import ROOT
from vllm_deepstack.__main__ import main
from vllm_deepstack.check.modes import EXTENSION
from vllm_deepstack.check.server import LIKELIEST, apart, parse
from vllm_deepstack.check.url import IMAGES, ONE_BY_ONE, TEXTS, TOGETHER

SCHEMA = json.loads((ROOT / "docs/schemas/check.json").read_text())
ALONE = 3 * len(TEXTS)
ALL = ALONE + len(ONE_BY_ONE) + len(TOGETHER)


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self):
        self.reply(*self.server.listed)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.reply(401, {"error": "Unauthorized"})
            return
        self.reply(*self.server.answer(body))

    def reply(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Fake(ThreadingHTTPServer):
    """A model's log-probabilities are its prompt's, plus what the server does wrong."""

    listed: tuple[int, Any] = (200, {"data": [{"id": "tiny"}, {"id": "a LoRA"}]})
    key = ""
    refuses = ""
    """What a request must not have: a field, or "image"."""
    wrong: Callable[[Fake, bool], float] = staticmethod(lambda server, image: 0.0)
    """By how much an answer is off."""
    caches = False
    instead: tuple[int, Any] | None = None
    """Given in place of an answer."""
    fails_at = 10**6
    hangs = 0.0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.cached: dict[Any, Any] = {}
        self.flying, self.most, self.images = Counter({True: 0, False: 0}), 0, 0

    def handle_error(self, *_):
        """A client that no longer waits."""

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        content = body["messages"][0]["content"]
        image = not isinstance(content, str)
        with self.lock:
            self.bodies.append(body)
            self.flying[image] += 1
            self.most = max(self.most, self.flying.total())
            self.images += image
        try:
            self.stopped.wait(self.hangs or (0.04 if body["max_tokens"] > 8 else 0.004))
            if self.instead:
                return self.instead
            if self.refuses in body or (self.refuses == "image" and image):
                return 400, {"error": {"message": f"no {self.refuses} here [/]"}}
            if len(self.bodies) > self.fails_at:
                return 500, {"error": "the engine died"}
            off = self.wrong(self, image)
            place = (body.get("cache_salt"), str(content))
            if self.caches:
                off = self.cached.setdefault(place, off)
            return 200, {"choices": [{"logprobs": {"content": steps(str(content), body, off)}}]}
        finally:
            with self.lock:
                self.flying[image] -= 1


def steps(prompt: str, body: dict[str, Any], off: float) -> list[dict[str, Any]]:
    draw = random.Random(prompt)
    found = []
    for _ in range(body["max_tokens"]):
        tokens = draw.sample(range(400), body["top_logprobs"])
        tops = [
            {"token": f"token_id:{token}", "logprob": -0.3 * place - off * (place % 2)}
            for place, token in enumerate(tokens)
        ]
        found.append({**tops[0], "top_logprobs": tops})
    return found


@contextmanager
def faked(**how: Any) -> Iterator[Fake]:
    server = Fake()
    for name, value in how.items():
        setattr(server, name, value)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()


def leaks(server: Fake, image: bool) -> float:
    return 0.0 if image or not server.images else 0.7 + 0.1 * server.images


def leaks_in_company(server: Fake, image: bool) -> float:
    return 1.0 if not image and server.flying[True] else 0.0


def is_noisy(size: float, company: int = 0) -> Callable[[Fake, bool], float]:
    def wrong(server: Fake, image: bool) -> float:
        moves = random.Random(len(server.bodies)).random() < 0.5
        return size * (moves and server.flying.total() > company)

    return wrong


def lowers(size: float) -> Callable[[Fake, bool], float]:
    return lambda server, image: size


def lowers_images(server: Fake, image: bool) -> float:
    return 0.5 * image


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(server: Fake, *options: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, report, and what it prints."""
        file = tmp_path / "check.json"
        code = main(["check", "--url", server.url, "--json", str(file), *options])
        found = json.loads(file.read_text())
        jsonschema.validate(found, SCHEMA)
        assert server.most <= 4 and found["requests"] <= 150
        return code, found, capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(url: str, *options: str) -> str:
        assert main(["check", "--url", url, *options]) == 2
        return capsys.readouterr().err

    return run


class TestVerdicts:
    def test_one_that_does_not_leak(self, check):
        with faked() as server:
            code, found, said = check(server)
        assert code == 0 and found["verdict"] == "nothing seen" and found["model"] == "tiny"
        assert found["requests"] == len(server.bodies) == ALL and server.most > 1
        assert found["noise"] == {"after": 0, "beside": 0}
        assert Counter(row["stage"] for row in found["compared"]) == {"after": 24, "beside": 24}
        assert "nothing seen (tolerance 0.1" in said and f"{ALL} requests in" in said
        assert "vLLM's default graphs leak" in said and "may hide a leak" in said
        assert "clean" not in said and "nothing leaks" not in said

    def test_what_it_asks(self, check):
        with faked() as server:
            check(server)
        salts = {body.pop("cache_salt") for body in server.bodies}
        assert len(salts) == ALL
        lengths = Counter(body["max_tokens"] for body in server.bodies[: len(TEXTS)])
        assert min(lengths) == 2 and max(lengths) == 8 and len(lengths) == 7
        for body in server.bodies:
            (message,) = body["messages"]
            assert message["role"] == "user" and body["model"] == "tiny"
            assert (body["temperature"], body["seed"]) == (0, 0)
            assert body["ignore_eos"] and body["logprobs"] and body["return_tokens_as_token_ids"]
            assert body["top_logprobs"] == LIKELIEST
        assert all(isinstance(b["messages"][0]["content"], str) for b in server.bodies[:ALONE])
        (first, *_) = server.bodies[ALONE]["messages"][0]["content"]
        assert first["image_url"]["url"].startswith("data:image/png;base64,")
        # Each text twice in each stage, after images that differ.
        for stream in (ONE_BY_ONE, TOGETHER):
            assert Counter(one.name for one in stream if one in TEXTS) == {
                one.name: 2 for one in TEXTS
            }
        assert len({str(one.content) for one in IMAGES}) == len(IMAGES)

    def test_one_that_leaks(self, check):
        with faked(wrong=leaks) as server:
            code, found, said = check(server)
        assert code == 1 and found["verdict"] == "leaks"
        changed = [row for row in found["compared"] if row["changed"]]
        assert len(changed) == 48 and changed[0]["image"] == "image 1"
        assert changed[0]["largest"] == pytest.approx(0.8)
        assert said.count(" changed by 2.") == said.count(" changed by ") == 5
        assert " beside image 8" in said
        assert "leaks (tolerance" in said and "24 of 24" in said

    def test_a_leak_in_overlapping_requests_alone(self, check):
        with faked(wrong=leaks_in_company) as server:
            code, found, said = check(server)
        assert code == 1 and found["verdict"] == "leaks"
        assert {row["stage"] for row in found["compared"] if row["changed"]} == {"beside"}
        assert "0 of 24" in said and "changed by 1.00 beside image " in said

    def test_a_leak_that_cached_prefixes_hide(self, check):
        with faked(wrong=leaks, caches=True) as server:
            assert check(server)[0] == 1
        with faked(wrong=leaks, caches=True, refuses="cache_salt") as server:
            code, found, said = check(server)
        assert code == 2 and found["verdict"] == "unknown" and found["requests"] == ALL + 1
        assert "no cache_salt, so cached prefixes may hide a leak: HTTP 400" in said
        assert "cannot tell (" in said

    def test_a_leak_is_one_without_a_salt_too(self, check):
        with faked(wrong=leaks, refuses="cache_salt") as server:
            assert check(server)[0] == 1

    @pytest.mark.parametrize("size, code", [(0.2, 0), (0.8, 2)])
    def test_noise(self, check, size, code):
        """Small, it raises the limit; large, nothing can be seen, and no image is sent."""
        with faked(wrong=is_noisy(size)) as server:
            got, found, said = check(server)
        assert got == code and found["noise"]["beside"] <= size + 1e-9
        if code:
            assert found["requests"] == ALONE and not server.images
            for how in ("one after another", "together"):
                assert f"texts alone, {how}, change by 0.80: too noisy" in said
            assert "nothing was asked about leaks" in said

    def test_noise_in_company_does_not_hide_what_comes_after(self, check):
        noise = is_noisy(0.8, company=1)
        with faked(wrong=noise) as server:
            code, found, said = check(server)
        assert code == 2 and {row["stage"] for row in found["compared"]} == {"after"}
        assert "nothing was asked" not in said and found["noise"]["after"] == 0
        with faked(wrong=lambda server, image: noise(server, image) + leaks(server, image)) as one:
            assert check(one)[1]["verdict"] == "leaks"

    def test_the_tolerance(self, check):
        with faked(wrong=lambda server, image: 0.09 * (server.images > 0)) as server:
            assert check(server)[0] == 0
            server.images = 0
            assert check(server, "--tolerance", "0.05")[0] == 1

    def test_images_are_refused(self, check):
        with faked(refuses="image") as server:
            code, found, said = check(server)
        assert code == 2 and found["compared"] == []
        assert 'refuses image 1: HTTP 400: {"error": {"message": "no image here [/]"}}' in said
        assert "nothing was asked about leaks" in said

    def test_it_dies_later(self, check, fails):
        """What was found until then counts."""
        late = ALONE + len(ONE_BY_ONE)
        with faked(fails_at=late) as server:
            assert "HTTP 500: " in fails(server.url)
        with faked(fails_at=late, wrong=leaks) as server:
            code, found, said = check(server)
        assert code == 1 and len(found["compared"]) == 24 and "the engine died" in said


class TestReference:
    def test_the_same(self, check):
        with faked() as server, faked() as other:
            code, found, said = check(server, "--reference-url", f"{other.url}/v1/")
        assert code == 0 and found["reference_url"] == other.url
        assert len(other.bodies) == len(TEXTS) + len(IMAGES) and "to the reference" in said
        assert found["requests"] == ALL + len(other.bodies)

    @pytest.mark.parametrize("wrong, count", [(lowers(0.5), 20), (lowers_images, 8)])
    def test_another(self, check, wrong, count):
        with faked() as server, faked(wrong=wrong) as other:
            code, found, said = check(server, "--reference-url", other.url)
        assert code == 1 and found["verdict"] == "differs"
        assert sum(row["changed"] for row in found["compared"]) == count
        assert "changed by 0.50 from the reference" in said

    def test_it_takes_no_images(self, check):
        with faked() as server, faked(refuses="image") as other:
            code, _, said = check(server, "--reference-url", other.url)
        assert code == 2 and f"{other.url} refuses image 1" in said
        assert "nothing was asked" not in said

    def test_it_differs_and_images_are_refused(self, check):
        with faked(refuses="image") as server, faked(wrong=lowers(0.5)) as other:
            assert check(server, "--reference-url", other.url)[1]["verdict"] == "differs"

    def test_it_is_not_there(self, fails):
        with faked() as server:
            said = fails(server.url, "--reference-url", "http://127.0.0.1:9")
            assert "http://127.0.0.1:9/v1/models: no answer" in said and server.bodies == []


def answer(**changes: Any) -> dict[str, Any]:
    top = {"token": "token_id:1", "logprob": -0.5} | changes
    return {"choices": [{"logprobs": {"content": [{**top, "top_logprobs": [top]}]}}]}


class TestProtocol:
    @pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd"])
    def test_no_address(self, fails, url):
        assert f"{url}: begins with neither" in fails(url)

    def test_no_server(self, fails):
        said = fails("http://127.0.0.1:9")
        assert "http://127.0.0.1:9/v1/models: no answer from an OpenAI server: " in said

    @pytest.mark.parametrize("listed", [{}, [], {"data": []}, {"data": [3]}, {"data": None}])
    def test_no_models(self, fails, listed, check):
        with faked(listed=(200, listed)) as server:
            assert "names no model; give --model" in fails(server.url)
            assert check(server, "--model", "mine")[1]["model"] == "mine"

    @pytest.mark.parametrize(
        "reply",
        [
            {},
            [],
            {"choices": []},
            {"choices": [{"logprobs": None}]},
            {"choices": [{"logprobs": {"content": []}}]},
            answer(token="a word"),
            answer(token=None),
            answer(logprob=None),
            answer(logprob=float("nan")),
            {"choices": [{"logprobs": {"content": [{"token": "token_id:1", "top_logprobs": []}]}}]},
        ],
    )
    def test_malformed_answers(self, fails, reply):
        with faked(instead=(200, reply)) as server:
            said = fails(server.url)
        assert f"{server.url}: text 1 (3 words): no log-probabilities of token ids" in said

    @pytest.mark.parametrize("status, body", [(200, b"<html>"), (404, b"no such"), (307, b"")])
    def test_other_answers(self, fails, status, body):
        with faked(instead=(status, body)) as server:
            said = fails(server.url)
        assert f"{server.url}/v1/chat/completions: " in said and len(server.bodies) == 1
        assert status == 200 or f"HTTP {status}" in said

    @pytest.mark.parametrize("field", ["logprobs", "ignore_eos"])
    def test_a_field_is_refused(self, fails, field):
        with faked(refuses=field) as server:
            said = fails(server.url)
        assert "refuses text 1 (3 words): HTTP 400: " in said and f"no {field} here" in said
        assert len(server.bodies) == 2  # once without cache_salt

    def test_keys(self, fails, check, monkeypatch):
        with faked(key="secret") as server:
            assert "HTTP 401: " in (said := fails(server.url)) and "--api-key" in said
            assert "HTTP 401: " in (said := fails(server.url, "--api-key", "wrong"))
            assert "wrong" not in said
            assert check(server, "--api-key", "secret")[0] == 0
            monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
            assert check(server)[0] == 0

    def test_no_answer_in_time(self, fails):
        with faked(hangs=30.0) as server:
            assert "no answer in 1 s; see --timeout" in fails(server.url, "--timeout", "1")

    def test_json_to_stdout(self, capsys):
        with faked() as server:
            assert main(["check", "--url", f"{server.url}/v1", "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["url"] == server.url
        assert [line.rsplit(" (")[0] for line in err.splitlines()] == [
            "texts alone",
            "texts after images",
            "texts beside images",
        ]


class TestOptions:
    @pytest.mark.parametrize(
        "options, words",
        [
            (["--url", "http://x", "--junit", "a.xml"], "--junit: not with --url"),
            (["--url", "http://x", "--html", "a.html"], "--html: not with --url"),
            (["--url", "http://x", "--modes", "full"], "--modes: not with --url"),
            (["--url", "http://x", "--max-model-len", "9"], "--max-model-len: not with --url"),
            (["--model", "m", "--reference-url", "http://x"], "--reference-url: only with --url"),
            ([], "name the model: --model"),
        ],
    )
    def test_usage(self, capsys, options, words):
        with pytest.raises(SystemExit) as end:
            main(["check", *options])
        assert end.value.code == 2 and words in capsys.readouterr().err


class TestApart:
    def test_common_tokens_as_long_as_the_chosen_agree(self):
        ours = [("a", {"a": -1.0, "b": -2.0, "c": -3.0})] * 2
        assert apart(ours, ours) == 0
        assert apart(ours, [("a", {"a": -1.0, "b": -2.5, "d": -9.0}), ours[0]]) == 0.5
        assert apart(ours, [ours[0], ("z", {"z": -1.0})]) == inf

    def test_another_choice_is_as_far_as_its_own_log_probability(self):
        ours, later = {"a": -1.00, "b": -1.01, "c": -3.0}, ("a", {"a": -1.0})
        tie = {"a": -1.01, "b": -1.00, "c": -3.0}
        moved = apart([("a", ours), later], [("b", tie), ("z", {"z": -1.0})])
        assert moved == pytest.approx(0.01)
        # It was not among the other's likeliest: at most as likely as their last.
        assert apart([("a", ours)], [("z", {"z": -0.5, "a": -1.0})]) == 2.5

    def test_parse(self):
        assert parse(answer()) == [("token_id:1", {"token_id:1": -0.5})]


@contextmanager
def served(folder: Path, tree: Path, fixed: bool) -> Iterator[str]:
    """0.32.0's `vllm serve`, as released or with the plugin, that replays CUDA graphs: its URL."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url, log = f"http://localhost:{port}", folder / "serve.log"
    command = [str(BUILD / "env/0.32.0/bin/vllm"), "serve", str(NANO / "model")]
    command += ["--port", str(port), "--enforce-eager", *EXTENSION, "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-batched-tokens", "512"]
    command += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    command += ["--gpu-memory-utilization", "0.3"]  # of a CPU's memory, too
    env = os.environ | {"PYTHONPATH": str(tree), "VLLM_SERVER_DEV_MODE": "1"}
    env |= {"DEEPSTACK_DISABLE": str(int(not fixed)), "HF_HUB_OFFLINE": "1"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(folder / "cache")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 480
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def worker(url: str, method: str, *args: Any) -> Any:
    """What the server's one worker gives, by the endpoint for development."""
    body = json.dumps({"method": method, "args": args}).encode()
    request = urllib.request.Request(
        f"{url}/collective_rpc", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        (given,) = json.load(reply)["results"]
    return given


@pytest.mark.engine
@pytest.mark.optional
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fixed", [False, True])
def test_vllm_serve(fixed, unpacked, tmp_path, capsys):
    """As released, it leaks where graphs are replayed, and not where Python runs; with the plugin,
    nothing is seen."""
    install = ["make", "install", "RELEASE=0.32.0"]
    done = subprocess.run(install, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "check.json"
    with served(tmp_path, unpacked("0.32.0"), fixed) as url:
        command = ["check", "--url", url, "--json", str(file)]
        assert main(command) == 0
        assert worker(url, "replay_record", True)["warnings"] == []
        worker(url, "replay_mode", "replay", "graph")
        code = main(command)
        counts = worker(url, "replay_counts")
    print(capsys.readouterr().out)
    found = json.loads(file.read_text())
    jsonschema.validate(found, SCHEMA)
    assert counts["replayed"] > 100 and counts["problems"] == []
    assert (code, found["verdict"]) == ((0, "nothing seen") if fixed else (1, "leaks"))
    if not fixed:
        for stage in ("after", "beside"):
            assert any(row["changed"] for row in found["compared"] if row["stage"] == stage)
