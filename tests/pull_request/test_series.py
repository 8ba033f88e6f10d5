"""The pull requests: they apply to pristine sources, pass upstream's linters, and their tests run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.conftest import BUILD
from tools import releases
from tools.pull_request.__main__ import main
from tools.pull_request.series import MODELS, TEST

UV = [sys.executable, "-m", "uv"]
GIT = {
    f"GIT_{who}_{what}": f"{who}@example.org"
    for who in ("AUTHOR", "COMMITTER")
    for what in ("NAME", "EMAIL")
}
run = partial(subprocess.run, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["0.22.1", "0.33.0"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def written(version, tmp_path_factory) -> Path:
    """The folder that the command wrote."""
    folder = tmp_path_factory.mktemp("pr")
    (folder / "gitconfig").write_text("[user]\nname = Ada Lovelace\nemail = ada@example.org\n")
    output = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", str(folder / "gitconfig"))
        assert main([version, "--output-dir", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def pristine(version, tmp_path_factory) -> Path:
    """The release's sources, in a repository of their own."""
    sources = releases.unpack_sources(releases.known(version), BUILD / "sdist")
    tree = Path(shutil.copytree(sources, tmp_path_factory.mktemp("tree") / "vllm", symlinks=True))
    for command in (["init", "-q"], ["add", "-Af"], ["commit", "-qm", "As released"]):
        run(["git", *command], cwd=tree, env=os.environ | GIT, check=True)
    return tree


@pytest.fixture(scope="module")
def applied(pristine, written, tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("applied") / "vllm"
    run(["git", "clone", "-q", str(pristine), str(tree)], check=True)
    patches = sorted(map(str, written.glob("*.patch")))
    done = run(["git", "am", "--keep-non-patch", *patches], cwd=tree, env=os.environ | GIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


def changed(tree: Path) -> list[str]:
    return run(["git", "diff", "--name-only", "HEAD~3"], cwd=tree).stdout.split()


def test_series(applied):
    log = run(["git", "log", "-3", "--reverse", "--format=%an%n%B"], cwd=applied).stdout
    assert log.count("Ada Lovelace\n[") == 3
    assert log.count("\nSigned-off-by: Ada Lovelace <ada@example.org>\n") == 3
    assert set(changed(applied)) == {
        TEST,
        *(f"{MODELS}/{n}.py" for n in ("deepstack", "qwen3_vl", "qwen3_omni_moe_thinker")),
    }


def test_upstreams_linters_are_clean(applied):
    """Those of its `.pre-commit-config.yaml` that look at Python, in the versions named there."""
    config = yaml.safe_load((applied / ".pre-commit-config.yaml").read_text())
    pinned = {
        Path(repo["repo"]).name: repo.get("rev", "").removeprefix("v") for repo in config["repos"]
    }
    files = changed(applied)
    ruff = [*UV, "tool", "run", "ruff@" + pinned["ruff-pre-commit"]]
    commands = [
        [*ruff, "check", *files],
        [*ruff, "format", "--check", *files],
        [*UV, "tool", "run", "typos@" + pinned["typos"], "--force-exclude", *files],
    ]
    (local,) = (repo["hooks"] for repo in config["repos"] if repo["repo"] == "local")
    for hook in local:
        looked_at = [file for file in files if re.search(hook.get("files", ""), file)]
        types = hook.get("types", []) + hook.get("types_or", [])
        if hook["language"] == "python" and looked_at and ("python" in types or "files" in hook):
            needs = [f"--with={name}" for name in hook.get("additional_dependencies", ())]
            command = [
                *UV,
                "run",
                "--no-project",
                "--isolated",
                *needs,
                *shlex.split(hook["entry"]),
            ]
            commands.append([*command, *(looked_at if hook.get("pass_filenames", True) else ())])
    assert len(commands) >= 6
    assert any("mypy.py" in part for command in commands for part in command)
    for command in commands:
        done = run(command, cwd=applied)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def needed(tmp_path_factory) -> Path:
    """What upstream's own tests import, and the installed vLLM does not bring."""
    folder = tmp_path_factory.mktemp("needed")
    run(
        [*UV, "pip", "install", "--no-deps", "--target", str(folder), "tblib", "orjson"], check=True
    )
    return folder


@pytest.fixture
def tests_in(unpacked, version, needed):
    """Runs the series' tests in a tree of sources, with what a wheel has beyond them."""

    def tests(tree: Path) -> str:
        built = unpacked(version)
        for file in built.joinpath("vllm").rglob("*"):
            target = tree / file.relative_to(built)
            if file.is_file() and not target.exists() and "__pycache__" not in file.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)
        env = os.environ | {"VLLM_TARGET_DEVICE": "cpu", "PYTHONPATH": f"{tree}:{needed}"}
        done = run([sys.executable, "-m", "pytest", "-q", "-rf", TEST], cwd=tree, env=env)
        return done.stdout + done.stderr

    return tests


def test_its_tests_pass(applied, tests_in):
    output = tests_in(applied)
    assert " passed" in output and "failed" not in output and "error" not in output, output


def test_its_tests_fail_without_the_change(pristine, applied, tests_in, tmp_path):
    shutil.copy(applied / TEST, pristine / TEST)
    output = tests_in(pristine)
    assert output.count("FAILED") >= 10, output


def test_description_is_upstreams_template_filled(written, version):
    text = (written / "PULL_REQUEST.md").read_text()
    sources = releases.unpack_sources(releases.known(version), BUILD / "sdist")
    template = (sources / ".github/PULL_REQUEST_TEMPLATE.md").read_text()
    headings = re.findall("^## .+", template, re.MULTILINE)
    assert re.findall("^## .+", text, re.MULTILINE) == headings
    for part in re.split("^## .+", text, flags=re.MULTILINE)[1:]:
        assert len(part.strip()) > 50
    assert "| decode, batch 256 |" in text  # benchmarks/speed/results
    assert "| compiled | vLLM 0.22.1 | 0.227 |" in text  # benchmarks/geo3k/results
    assert template[template.index("<details>") :] in text


@pytest.mark.parametrize(
    "arguments, words", [(["0.19.0"], "unknown vLLM release"), (["0.33.0"], "git has no user.name")]
)
def test_errors(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
