"""The pull requests fit the release that they are written for, are small, and are what they say."""

from __future__ import annotations

import ast
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
from packaging.version import Version

from tests.conftest import BUILD
from upstream.__main__ import main
from upstream.pulls import HERE, pulls
from vllm_deepstack import package_index, releases
from vllm_deepstack.merge.merge import merge

RELEASE = Version("0.33.0")
PULLS = {pull.name: pull for pull in pulls(RELEASE)}
# Lines added and removed, outside tests.
SIZES = {
    "1-clear-deepstack": (12, 9),
    "2-clear-granite": (4, 13),
    "3-moss-audio": (22, 14),
    "4-geo3k": (0, 0),
    "5-omni-prompts": (4, 21),
    "6-prompt-embeds": (22, 0),
    "7-mixin": (61, 168),
    "8-transformers-deepstack": (77, 1),
    "9-ernie-experts": (42, 22),
    "10-granite-stages": (6, 0),
    "11-prompt-embeds-others": (19, 4),
}
UV = [sys.executable, "-m", "uv"]
WHO = {
    f"GIT_{who}_{what}": f"{who.lower()}@example.org"
    for who in ("AUTHOR", "COMMITTER")
    for what in ("NAME", "EMAIL")
}
run = partial(subprocess.run, capture_output=True, text=True)


def git(tree: Path, *arguments: str) -> str:
    done = run(["git", *arguments], cwd=tree, env=os.environ | WHO)
    assert done.returncode == 0, f"git {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def am(tree: Path, folder: Path) -> None:
    git(tree, "am", "-s", "--keep-non-patch", *map(str, sorted(folder.glob("*.patch"))))


@pytest.fixture(scope="module")
def sources() -> Path:
    return package_index.unpack_sources(releases.known(str(RELEASE)), BUILD / "sdist")


@pytest.fixture
def merged(sources):
    """(before, after) of a pull request's files; some are made after another."""

    def run(name: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
        paths = {path for pull in PULLS.values() for path in pull.overlay}
        before = {p: (sources / p).read_bytes() for p in paths if (sources / p).is_file()}
        if after := PULLS[name].after:
            before |= PULLS[after].changes(before, RELEASE)
        return before, PULLS[name].changes(before, RELEASE)

    return run


@pytest.mark.parametrize("name", SIZES)
def test_merging_twice_is_merging_once(merged, name):
    _, after = merged(name)
    overlay = PULLS[name].overlay
    for path, ours in overlay.items():
        if path in releases.known(str(RELEASE)).sources:
            again = merge(ours, after[path], path=path, release=RELEASE, overlay=overlay)
            assert again == after[path]


@pytest.mark.parametrize("name", ["1-clear-deepstack", "2-clear-granite", "3-moss-audio"])
def test_clearing_moves_from_forward_to_embed_input_ids(merged, name):
    """A replayed graph would not run it in `forward`."""
    clears = {"zero_", "_clear_deepstack_input_embeds"}
    for path, text in merged(name)[1].items():
        if path.startswith("tests/"):
            continue
        (named,) = (getattr(n, "name", "") for n in ast.parse(PULLS[name].overlay[path]).body)
        classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        (cls,) = (node for node in classes if node.name == named)
        methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
        calls = {
            method: {n.attr for n in ast.walk(methods[method]) if isinstance(n, ast.Attribute)}
            for method in ("embed_input_ids", "forward")
        }
        assert calls["embed_input_ids"] & clears and not calls["forward"] & clears, path


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder that the command wrote."""
    folder = tmp_path_factory.mktemp("pr")
    (folder / "gitconfig").write_text("[user]\nname = Ada Lovelace\nemail = ada@example.org\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", str(folder / "gitconfig"))
        for version in ("0.22.1", str(RELEASE)):
            assert main([version, "--output-dir", str(folder / version)]) == 0
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The sources of a release, in a repository of their own."""

    def make(version: str) -> Path:
        tree = tmp_path_factory.mktemp("tree") / "vllm"
        ours = package_index.unpack_sources(releases.known(version), BUILD / "sdist")
        # The metadata of a build would pass for those of the installed vLLM.
        shutil.copytree(ours, tree, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
        git(tree, "init", "-q", "-b", "main")
        git(tree, "add", "-Af")
        git(tree, "commit", "-qm", "As released")
        return tree

    return make


@pytest.fixture(scope="module")
def applied(pristine, written) -> Path:
    """A branch of 0.33.0 for each pull request."""
    tree = pristine(str(RELEASE))
    for name, pull in PULLS.items():
        git(tree, "switch", "-q", "-c", name, pull.after or "main")
        am(tree, written / str(RELEASE) / name)
    return tree


@pytest.fixture(scope="module")
def run_tests(unpacked, tmp_path_factory):
    """Runs upstream's tests in a tree of sources, with what a wheel has beyond them."""
    needed = tmp_path_factory.mktemp("needed")  # by upstream's tests/conftest.py
    packages = ["tblib", "orjson"]
    run([*UV, "pip", "install", "--no-deps", "--target", str(needed), *packages], check=True)
    # The newest wheel is for CUDA alone: what runs without a GPU has to be told that it is a CPU's.
    (needed / "on_a_cpu.py").write_text('platform = lambda: "vllm.platforms.cpu.CpuPlatform"\n')
    metadata = needed / "on_a_cpu-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: on-a-cpu\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\non_a_cpu = on_a_cpu:platform\n"
    )

    def tests(tree: Path, version: str, *files: str) -> str:
        built = unpacked(version)
        for file in built.joinpath("vllm").rglob("*"):
            target = tree / file.relative_to(built)
            if file.is_file() and not target.exists() and "__pycache__" not in file.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)
        env = os.environ | {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = f"{tree}:{needed}"
        done = run([sys.executable, "-m", "pytest", "-q", "-rfE", *files], cwd=tree, env=env)
        return done.stdout + done.stderr

    return tests


@pytest.mark.parametrize("name", SIZES)
def test_size(applied, name):
    counts = git(applied, "diff", "--numstat", PULLS[name].after or "main", name)
    rows = [line.split("\t") for line in counts.splitlines()]
    code = [(int(plus), int(minus)) for plus, minus, path in rows if path.startswith("vllm/")]
    assert (sum(plus for plus, _ in code), sum(minus for _, minus in code)) == SIZES[name]
    assert set(SIZES) == set(PULLS)
    assert any(path.startswith("tests/") for _, _, path in rows)


@pytest.mark.parametrize("name", SIZES)
def test_am_signs_off(applied, name):
    """The sender, and nobody else."""
    message = git(applied, "log", "-1", "--format=%an%n%B", name)
    assert message.startswith(f"Ada Lovelace\n{PULLS[name].title}\n\n")
    assert re.findall(r"^Signed-off-by: .*", message, re.MULTILINE) == [
        f"Signed-off-by: {WHO['GIT_COMMITTER_NAME']} <{WHO['GIT_COMMITTER_EMAIL']}>"
    ]
    start = PULLS[name].after or "main"
    changed = git(applied, "diff", "--name-only", start, name).split()
    assert set(changed) == set(PULLS[name].overlay)


@pytest.fixture(scope="module")
def together(applied) -> Path:
    """All of them in one branch: they can be merged in any order, some after another."""
    git(applied, "switch", "-q", "-c", "all", "7-mixin")
    for name in SIZES:
        if name not in ("1-clear-deepstack", "7-mixin"):
            git(applied, "cherry-pick", name)
    return applied


@pytest.mark.optional
def test_upstreams_linters_are_clean(together):
    """Those of its `.pre-commit-config.yaml` that look at Python, in the versions named there."""
    assert_lints(together, git(together, "diff", "--name-only", "main", "all").split())


def assert_lints(tree: Path, files: list[str]) -> None:
    config = yaml.safe_load((tree / ".pre-commit-config.yaml").read_text())
    pinned = {
        Path(repo["repo"]).name: repo.get("rev", "").removeprefix("v") for repo in config["repos"]
    }
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
            command = [*UV, "run", "--no-project", "--isolated", *needs]
            command += shlex.split(hook["entry"])
            commands.append([*command, *(looked_at if hook.get("pass_filenames", True) else ())])
    assert len(commands) >= 6
    assert any("mypy.py" in part for command in commands for part in command)
    for command in commands:
        done = run(command, cwd=tree)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


PROCESSING = "tests/models/multimodal/processing"
# By pull request: its tests that need no GPU, how many of them fail without the change, and how
# many pass with it, upstream's own in that file among them.
ON_A_CPU = {
    "2-clear-granite": (f"{PROCESSING}/test_granite4_vision.py", 1, 1),
    "3-moss-audio": (f"{PROCESSING}/test_moss_audio.py", 4, 21),
    "5-omni-prompts": ("tests/model_executor/test_qwen3_omni_mrope.py", 6, 18),
    "6-prompt-embeds": (f"{PROCESSING}/test_qwen3_vl_embed.py", 6, 6),
    "7-mixin": ("tests/models/multimodal/test_deepstack.py", 0, 3),
    "8-transformers-deepstack": (f"{PROCESSING}/test_transformers_deepstack.py", 1, 1),
    "9-ernie-experts": (f"{PROCESSING}/test_ernie45_vl.py", 3, 3),
    "10-granite-stages": (f"{PROCESSING}/test_granite4_vision_pp.py", 2, 2),
    "11-prompt-embeds-others": (f"{PROCESSING}/test_deepstack_prompt_embeds.py", 3, 3),
}


@pytest.mark.optional  # vLLM inspects the changed models first, for a minute each
@pytest.mark.parametrize("name", ON_A_CPU)
def test_its_tests_fail_before_and_pass_after(together, run_tests, name):
    file, failing, passing = ON_A_CPU[name]
    git(together, "switch", "-q", "--detach", PULLS[name].after or "main")
    git(together, "checkout", "-q", name, "--", file)
    before = run_tests(together, str(RELEASE), file)
    git(together, "reset", "-q", "--hard")
    assert len(re.findall(r"^FAILED ", before, re.MULTILINE)) == failing, before
    git(together, "switch", "-q", name)
    after = run_tests(together, str(RELEASE), file)
    assert re.search(rf"^{passing} passed, ", after, re.MULTILINE), after


@pytest.mark.parametrize("name", SIZES)
def test_description(written, sources, name):
    """Upstream's template with nothing left to fill in, of 150 to 350 words of ours."""
    text = (written / str(RELEASE) / name / "PULL_REQUEST.md").read_text()
    template = (sources / ".github/PULL_REQUEST_TEMPLATE.md").read_text()
    headings = re.findall("^## .+", template, re.MULTILINE)
    assert re.findall("^## .+", text, re.MULTILINE) == headings
    ours = text[: text.index("\n---\n")]
    assert 150 <= len(re.sub(r"<!--.*?-->", "", ours).split()) <= 350
    for part in re.split("^## .+", ours, flags=re.MULTILINE)[1:]:
        assert len(part.split()) > 10
    details = text[text.index("## Details") :]
    assert "duplicate" in details and "AI assistance" in details
    assert "- [x] AI assistance was used" in text
    tags = r"(\[(Bugfix|Model|Test|Multimodal|Refactor)\])+ [A-Z]\w+ \S.*[^.]"
    assert re.fullmatch(tags, PULLS[name].title) and len(PULLS[name].title) <= 80
    patches = "".join(f.read_text() for f in (written / str(RELEASE) / name).glob("*.patch"))
    assert "Signed-off-by" not in patches
    assert not re.search(r"\b(overlay|fork|stock|deepstack plugin)\b", text + patches)


def test_what_is_sent_when(written):
    send = (written / str(RELEASE) / "SEND.md").read_text()
    assert all(f"`{name}`" in send for name in ["0-report", *PULLS])
    issue = (written / str(RELEASE) / "12-tower-lora-issue/README.md").read_text()
    assert "`12-tower-lora-issue`" in send and "**Affected**" in issue
    assert not re.search(r"\b(overlay|fork|stock|deepstack plugin)\b", issue)
    report = written / str(RELEASE) / "0-report"
    assert (report / "README.md").exists()
    script = (report / "reproduce.py").read_text().splitlines()
    assert len([line for line in script if line]) <= 30


BACKPORT = "tests/models/multimodal/test_deepstack.py"


@pytest.fixture(scope="module")
def backported(pristine, written, run_tests) -> tuple[Path, str]:
    """A tree of 0.22.1 with the backport, and what its tests printed before."""
    tree = pristine("0.22.1")
    shutil.copy(HERE / "0.22.1" / BACKPORT, tree / BACKPORT)
    before = run_tests(tree, "0.22.1", BACKPORT)
    (tree / BACKPORT).unlink()
    am(tree, written / "0.22.1/backport")
    return tree, before


@pytest.mark.optional
def test_backport(backported, run_tests):
    tree, before = backported
    failed = re.findall(r"^FAILED \S+::(\w+)", before, re.MULTILINE)
    assert set(failed) == {
        "test_features_end_with_their_step",
        "test_forward_gives_the_decoder_the_features_of_the_step",
        "test_inputs_are_the_same_with_and_without_features",
        "test_shorter_payload_leaves_nothing_of_a_longer_one",
    }, before
    assert len(failed) == 8  # both models
    assert_lints(tree, git(tree, "diff", "--name-only", "main~3").split())
    after = run_tests(tree, "0.22.1", BACKPORT)
    assert re.search(r"^12 passed, ", after, re.MULTILINE), after


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["0.19.0"], "unknown vLLM release"),
        (["0.33.0"], "git has no user.name"),
        (["0.32.0"], "vLLM 0.32.0 has no pull requests: they are for 0.33.0, the backport for"),
    ],
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
