"""The pull requests apply to pristine sources, upstream's linters are clean, their tests run."""

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
from tools import package_index, releases
from upstream.__main__ import main
from upstream.series import MODELS, TEST

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
def run_tests(unpacked, version, tmp_path_factory):
    """Runs the series' tests in a tree of sources, with what a wheel has beyond them."""
    needed = tmp_path_factory.mktemp("needed")  # by upstream's tests/conftest.py
    install = [*UV, "pip", "install", "--no-deps", "--target", str(needed), "tblib"]
    run(install, check=True)

    def tests(tree: Path) -> str:
        built = unpacked(version)
        for file in built.joinpath("vllm").rglob("*"):
            target = tree / file.relative_to(built)
            if file.is_file() and not target.exists() and "__pycache__" not in file.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)
        env = os.environ | {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = f"{tree}:{needed}"
        done = run([sys.executable, "-m", "pytest", "-q", "-rfE", TEST], cwd=tree, env=env)
        return done.stdout + done.stderr

    return tests


@pytest.fixture(scope="module")
def pristine(version, tmp_path_factory) -> Path:
    """The release's sources, in a repository of their own."""
    sources = package_index.unpack_sources(releases.known(version), BUILD / "sdist")
    tree = tmp_path_factory.mktemp("tree") / "vllm"
    # The metadata of a build would pass for those of the installed vLLM.
    shutil.copytree(sources, tree, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    for command in (["init", "-q"], ["add", "-Af"], ["commit", "-qm", "As released"]):
        run(["git", *command], cwd=tree, env=os.environ | GIT, check=True)
    return tree


@pytest.fixture(scope="module")
def output_before(pristine, run_tests) -> str:
    """Of the series' tests, before the series is applied."""
    shutil.copy(releases.ROOT / "upstream" / TEST, pristine / TEST)
    output = run_tests(pristine)
    (pristine / TEST).unlink()
    return output


@pytest.fixture(scope="module")
def applied(pristine, output_before, written) -> Path:
    patches = sorted(map(str, written.glob("*.patch")))
    command = ["git", "am", "--keep-non-patch", *patches]
    done = run(command, cwd=pristine, env=os.environ | GIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return pristine


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


def test_its_tests_pass(applied, run_tests):
    output = run_tests(applied)
    assert re.search(r"^12 passed, ", output, re.MULTILINE), output


def test_its_tests_fail_without_the_change(output_before, version):
    failed = set(re.findall(r"^FAILED \S+::(\w+)", output_before, re.MULTILINE))
    both = {
        "test_features_end_with_their_step",
        "test_shorter_payload_leaves_nothing_of_a_longer_one",
    }
    others = {
        "0.22.1": {
            "test_inputs_are_the_same_with_and_without_features",
            "test_forward_gives_the_decoder_the_features_of_the_step",
        },
        "0.33.0": {
            "test_padding_beyond_the_buffers_keeps_the_features",
        },
    }
    assert failed == both | others[version], output_before
    assert output_before.count("\nFAILED ") == 2 * len(failed)  # both models


def test_description_is_upstreams_template_filled(written, version):
    text = (written / "PULL_REQUEST.md").read_text()
    sources = package_index.unpack_sources(releases.known(version), BUILD / "sdist")
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


def test_needs_no_pytorch():
    """`make pr` has the tools' requirements alone."""
    script = "import sys; sys.modules['torch'] = None; import upstream.__main__"
    subprocess.run([sys.executable, "-c", script], cwd=releases.ROOT, check=True)
