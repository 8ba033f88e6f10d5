"""The evaluation on real engines and endpoints, with the small model that is shipped."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import openai
import pytest

from benchmarks.geo3k.__main__ import main
from benchmarks.geo3k.data import load
from benchmarks.geo3k.grading import correct
from tests.geo3k import NANO
from vllm_deepstack.__main__ import main as vllm_deepstack

pytestmark = pytest.mark.engine
SAMPLES = 20
DATA = ["--dataset", str(NANO / "data"), "--num-samples", str(SAMPLES)]
OPTIONS = ["--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "512"]
OPTIONS += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']
OPTIONS += ["--gpu-memory-utilization", "0.3"]  # of a CPU's memory, too


def accuracies(folder: Path) -> dict[str, float]:
    runs = json.loads((folder / "report.json").read_text())["runs"]
    return {run["run"]: run["accuracy"] for run in runs}


@pytest.mark.optional  # test_logits.py compares the same engines, and the logits
def test_the_fork_is_as_accurate_compiled_as_transformers(stock_tree, tmp_path):
    stock = f"compiled@{stock_tree}"
    runs = ["--runs", "transformers", "compiled", stock]  # eager is compared in tests/engines
    arguments = ["--model", str(NANO / "model"), *DATA, *OPTIONS, *runs]
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 0
    found = accuracies(tmp_path)
    assert found["compiled"] == found["transformers"] >= 0.85
    assert found[f"compiled@{stock_tree.name}"] <= found["compiled"] - 0.08
    differences = json.loads((tmp_path / "report.json").read_text())["differences"]
    same = {difference["runs"][1]: difference["same"] for difference in differences}
    assert same["compiled"] == SAMPLES


class Server:
    """`vllm serve`, on one core: of the fork's wheel; or, as `stock`, of a release as it is, with
    the plugin, and two processes in front."""

    def __init__(self, core: int, folder: Path, stock: Path | None = None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://localhost:{self.port}"
        self.log = folder / f"{core}.log"
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(NANO / "model")]
        command += ["--served-model-name", "nano", "--port", str(self.port), *OPTIONS]
        env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
        if stock:
            command += ["--api-server-count", "2"]
            env |= {"PYTHONPATH": str(stock), "DEEPSTACK_DISABLE": "0"}
        self.process = subprocess.Popen(
            command,
            env=env,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def log_text(self) -> str:
        return self.log.read_text()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as reply:
            return reply.read().decode()

    def wait(self) -> None:
        deadline = time.monotonic() + 480
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_text()[-3000:]
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(1)
        raise TimeoutError(self.log_text()[-3000:])

    def answered(self) -> int:
        """Requests, by the server's own count."""
        lines = self.get("/metrics").splitlines()
        counts = [line for line in lines if line.startswith("vllm:request_success_total")]
        return int(sum(float(line.split()[-1]) for line in counts))

    def stop(self) -> None:
        os.killpg(self.process.pid, 15)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)


@pytest.fixture(scope="module")
def servers(tmp_path_factory, stock_tree):
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        started = []
        for core, tree in ((cores[0], None), (cores[-1], stock_tree)):
            server = Server(core, tmp_path_factory.mktemp("serve"), tree)
            stack.callback(server.stop)
            started.append(server)
        for server in started:
            server.wait()
        yield started


@pytest.mark.parametrize("fix", ["wheel", "plugin"])
def test_serves_chats_with_images(servers, fix, capsys):
    server = servers[fix == "plugin"]
    assert vllm_deepstack(["status", "--url", server.url]) == (0 if fix == "wheel" else 2)
    told = capsys.readouterr().out
    if fix == "plugin":  # the line to look for is there, of the worker; the front ends say nothing
        (line,) = re.findall(r"`(.*) \(…\)`", told)
        said = [text for text in server.log_text().splitlines() if line in text]
        assert len(said) == 1 and "ApiServer" not in said[0] and "vllm-deepstack" in said[0]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY")
    right = Counter()
    for question in load(str(NANO / "data"), "test", SAMPLES):
        png = BytesIO()
        question.images[0].save(png, "png")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        _, text, instruction = question.content(["unused"])
        image = {"type": "image_url", "image_url": {"url": url}}
        reply = client.chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": [image, text, instruction]}],
            temperature=0,
            max_tokens=64,
        )
        right[correct(reply.choices[0].message.content, question.answer)] += 1
    assert right[True] >= 0.85 * SAMPLES


def test_two_endpoints_share_the_questions(servers, tmp_path, capsys):
    before = [server.answered() for server in servers]
    urls = [f"{server.url}/v1" for server in servers]
    arguments = ["--base-url", *urls, *DATA, "--concurrency", "4", "--output-dir", str(tmp_path)]
    assert main(arguments) == 2  # as many tokens as the endpoints do not give
    assert "Give a smaller --max-tokens" in " ".join(capsys.readouterr().err.split())
    arguments += ["--max-tokens", "64", "--overwrite"]
    assert main(arguments) == 0
    shares = [server.answered() - count for server, count in zip(servers, before)]
    assert sum(shares) == SAMPLES
    assert min(shares) > 0
    assert accuracies(tmp_path)["served"] >= 0.85
    assert main(arguments[:-1]) == 0  # all is answered
    assert [server.answered() - count for server, count in zip(servers, before)] == shares


def test_a_model_that_is_not_served(servers, tmp_path, capsys):
    arguments = ["--base-url", f"{servers[0].url}/v1", "--model", "other", *DATA]
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 2
    assert "it serves nano, not other" in " ".join(capsys.readouterr().err.split())
