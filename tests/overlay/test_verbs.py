"""The command `vllm-deepstack`: help, versions, ends; and what `status` says of the plugin and of
servers."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jsonschema
import pytest

from vllm_deepstack import ROOT, __version__, cli
from vllm_deepstack.__main__ import main, parser
from vllm_deepstack.patch.tree import Tree

from .faults import content
from .test_status import SCHEMA

COMMAND = [sys.executable, "-m", "vllm_deepstack"]
VERBS = ("status", "apply", "revert", "diff", "check", "lint")


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"vllm-deepstack {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_and_examples(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: vllm-deepstack {verb} " in text
    assert f"\nexamples:\n  vllm-deepstack {verb}" in text and "exit code" in text
    assert verb in parser().format_help()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: VERB"),
        (["mend"], "invalid choice: 'mend'"),
        (["status", "--jsn"], "vllm-deepstack status: error: unrecognized arguments: --jsn"),
        (["apply", "a", "b"], "unrecognized arguments: b"),
        (["status", "tree", "--url", "http://x"], "--url is about a server: name no TREE"),
        (["check"], "name the model: --model, `-- vllm serve MODEL …`"),
    ],
)
def test_usage_errors(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


WITHOUT_POSIX = """
import os, sys
for name in ("fcntl", "grp", "pwd"):
    sys.modules[name] = None
del os.geteuid, os.getuid, os.fork
from vllm_deepstack.__main__ import main
import vllm_deepstack.plugin
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb, code", [("status", 1), ("lint", 1), ("apply", 1), ("revert", 1)])
def test_on_windows(release_sources, verb, code):
    """Without what Windows' Python lacks; Windows itself was not tried. `status`, `lint` and the
    plugin need none of it; `apply` says that it cannot."""
    root = release_sources("0.33.0")
    where = root / "vllm" if verb == "lint" else root
    command = [sys.executable, "-c", WITHOUT_POSIX, verb, str(where)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    refused = "error: vLLM's files are not patched on Windows: use the plugin" in done.stderr
    assert refused == (verb in ("apply", "revert"))


def test_a_reader_that_is_gone(release_sources):
    """`vllm-deepstack diff | head -1`"""
    diff = f"{' '.join(COMMAND)} diff {release_sources('0.22.1')}"
    command = ["bash", "-c", f"{diff} | head -1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("diff --git ") and done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_ctrl_c(release_sources):
    """In the middle of `apply`: what it had done is taken back."""
    root = release_sources("0.22.1")
    before = content(root)
    code = f"""
import os, signal, sys
from vllm_deepstack.__main__ import main
def hook(event, args):
    if event == "os.rename" and str(args[1]).endswith("/qwen3_vl.py"):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
sys.exit(main(["apply", {str(root)!r}]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "interrupted\n")
    assert content(root) == before


class TestResults:
    """What `check` and the benchmarks write."""

    def test_a_link_is_not_written_through(self, tmp_path):
        (tmp_path / "victim").write_text("precious")
        (tmp_path / ".report.json").symlink_to("victim")
        cli.write_text("{}", tmp_path / "report.json")
        assert (tmp_path / "victim").read_text() == "precious"
        assert (tmp_path / "report.json").read_text() == "{}"

    def test_mode_is_what_umask_leaves(self, tmp_path):
        old = os.umask(0o027)
        try:
            cli.write_text("{}", tmp_path / "report.json")
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o640

    def test_a_failure_leaves_nothing(self, tmp_path):
        (tmp_path / "report.json").write_text("before")
        with pytest.raises(UnicodeEncodeError):
            cli.write_text("\ud800", tmp_path / "report.json")
        assert content(tmp_path) == {"report.json": b"before"}


@pytest.fixture
def site(release_sources) -> Path:
    """site-packages with 0.22.1 and, by its metadata, the plugin."""
    root = release_sources("0.22.1")
    (root / "vllm_deepstack").mkdir()
    (root / "vllm_deepstack/__init__.py").touch()
    info = root / f"vllm_deepstack-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: vllm-deepstack\nVersion: {__version__}\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ndeepstack = vllm_deepstack.plugin:register\n"
    )
    return root


class TestPlugin:
    def status(self, site: Path, capsys, code: int) -> dict:
        assert main(["status", str(site), "--json"]) == code
        told = json.loads(capsys.readouterr().out)
        jsonschema.validate(told, SCHEMA)
        assert main(["status", str(site)]) == code
        told["text"] = capsys.readouterr().out
        return told

    def test_it_fixes(self, site, capsys, monkeypatch):
        monkeypatch.delenv("DEEPSTACK_DISABLE")
        told = self.status(site, capsys, 0)
        assert (told["verdict"], told["fix"], told["overlay"]) == ("clean", "plugin", "not applied")
        assert told["models"]["Qwen3-VL"]["D1"] == "fixed"
        assert f"\nplugin: vllm-deepstack {__version__}: fixes Qwen3-VL, " in told["text"]

    @pytest.mark.parametrize(
        "variable, value, words",
        [
            ("DEEPSTACK_DISABLE", "1", "does not run: DEEPSTACK_DISABLE=1"),
            ("VLLM_PLUGINS", "", "does not run: VLLM_PLUGINS= leaves deepstack out"),
            ("VLLM_PLUGINS", "a,b", "does not run: VLLM_PLUGINS=a,b leaves deepstack out"),
        ],
    )
    def test_it_is_left_out(self, site, capsys, monkeypatch, variable, value, words):
        monkeypatch.delenv("DEEPSTACK_DISABLE")
        monkeypatch.setenv(variable, value)
        told = self.status(site, capsys, 1)
        assert told["fix"] is None and words in told["plugin"]
        assert "\nfixed by: nothing\n" in told["text"] and words in told["text"]

    def test_vllm_plugins_names_it(self, site, capsys, monkeypatch):
        monkeypatch.delenv("DEEPSTACK_DISABLE")
        monkeypatch.setenv("VLLM_PLUGINS", "a,deepstack")
        assert self.status(site, capsys, 0)["fix"] == "plugin"

    def test_compiled_graphs_from_before_it(self, site, capsys, monkeypatch, tmp_path):
        """vLLM takes what is in a `cache_dir` that it is given, whatever the code is by now."""
        monkeypatch.delenv("DEEPSTACK_DISABLE")
        graph = tmp_path / "rank_0_0/backbone/vllm_compile_cache.py"
        graph.parent.mkdir(parents=True)
        graph.touch()
        os.utime(graph, (0, 0))
        assert main(["status", str(site), "--cache-dir", str(tmp_path)]) == 0
        assert f"warning: {tmp_path} has graphs from before the fix" in capsys.readouterr().out

    def test_a_patched_tree_has_no_need_of_it(self, site, capsys, monkeypatch):
        monkeypatch.delenv("DEEPSTACK_DISABLE")
        Tree(site).apply()
        told = self.status(site, capsys, 0)
        assert told["fix"] == "patch" and "has nothing to fix" in told["plugin"]

    def test_a_stale_distribution_hides_it(self, site, capsys, monkeypatch, tmp_path):
        """vLLM looks no further than the first of a name. It had the same, and no plugin."""
        monkeypatch.delenv("DEEPSTACK_DISABLE")
        info = tmp_path / "vllm_deepstack-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: vllm-deepstack\nVersion: 0\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path), str(site), *sys.path])
        monkeypatch.setattr("vllm_deepstack.patch.verbs.installed", lambda: site)
        assert main(["status"]) == 1
        assert "fixed by: nothing" in capsys.readouterr().out
        (info / "METADATA").unlink()
        info.rmdir()
        assert main(["status"]) == 0

    def test_another_version_of_it(self, site, capsys, monkeypatch):
        monkeypatch.delenv("DEEPSTACK_DISABLE")
        metadata = next(site.glob("*.dist-info/METADATA"))
        metadata.write_text("Name: vllm-deepstack\nVersion: 99\n")
        told = self.status(site, capsys, 1)
        assert told["plugin"].startswith("vllm-deepstack 99 is there; this is")


class TestServer:
    @pytest.fixture
    def server(self):
        """Answers `/version` as vLLM does. The real ones are in tests/geo3k."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(self.server.answer)  # type: ignore[attr-defined]

            def log_message(self, *_):
                pass

        served = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()
        served.server_close()

    @pytest.mark.parametrize(
        "version, code, words",
        [
            ("0.22.1+deepstack.2.cpu", 0, "a `vllm` wheel that has the fixes\nclean"),
            ("0.33.0", 2, "a line that ends in\n`has the DeepStack fixes (…)`"),
            ("0.33.0+cu129", 2, "has the DeepStack fixes"),
            ("0.22.1+deepstack.1", 2, "cannot tell: "),
        ],
    )
    def test_version(self, server, capsys, version, code, words):
        server.answer = json.dumps({"version": version}).encode()
        url = f"http://127.0.0.1:{server.server_port}/"
        assert main(["status", "--url", url]) == code
        assert words in capsys.readouterr().out
        assert main(["status", "--url", url, "--json"]) == code
        told = json.loads(capsys.readouterr().out)
        jsonschema.validate(told, SCHEMA)
        assert told["version"] == version

    @pytest.mark.parametrize("answer", ["", "[]", "{}", '{"version": 3}', '{"version": "x"}'])
    def test_no_vllm_server(self, server, capsys, answer):
        server.answer = answer.encode()
        assert main(["status", "--url", f"http://127.0.0.1:{server.server_port}"]) == 2
        assert "/version: no answer from a vLLM server" in capsys.readouterr().err

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "file:///etc/passwd"])
    def test_no_server(self, capsys, url):
        assert main(["status", "--url", url]) == 2
        assert url in capsys.readouterr().err
