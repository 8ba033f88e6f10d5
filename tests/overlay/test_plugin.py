"""The plugin, in processes of its own, on the sources of real releases."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PR43617
from vllm_deepstack import ROOT, STATE, __version__, releases
from vllm_deepstack.patch.defects import MODELS
from vllm_deepstack.patch.tree import Tree

QWEN3_VL = f"{MODELS}/qwen3_vl.py"
NEWEST = str(max(releases.releases()))
PLUGIN = """
import json, sys
before = set(sys.modules)
import vllm_deepstack.plugin as plugin
new = {name.partition(".")[0] for name in set(sys.modules) - before}
finders = [f for f in sys.meta_path if isinstance(f, plugin.Finder)]
print(json.dumps({
    "level": plugin.OUTCOME[0],
    "text": plugin.OUTCOME[1],
    "files": {name: str(path) for f in finders for name, (path, _) in f.files.items()},
    "imported": sorted(new - set(sys.stdlib_module_names) - {"vllm_deepstack", "__mp_main__"}),
}))
plugin.register()
"""


class Plugin:
    """`load(root)` imports it in a new process, beside the vLLM in `root`."""

    def __init__(self, folder: Path):
        self.cache = folder / "cache"
        self.stderr = ""

    def load(self, root: Path, before: str = "", **env: str) -> dict[str, Any]:
        path = os.pathsep.join([str(root), str(ROOT)])
        own = {"PYTHONPATH": path, "VLLM_CACHE_ROOT": str(self.cache), "DEEPSTACK_DISABLE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", before + PLUGIN],
            cwd="/",
            env=os.environ | own | env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def folder(self) -> Path:
        (folder,) = (self.cache / "deepstack").iterdir()
        return folder


@pytest.fixture
def plugin(tmp_path):
    return Plugin(tmp_path)


@pytest.mark.parametrize("version", ["0.22.1", NEWEST])
def test_serves_what_apply_writes(plugin, release_sources, version):
    root = release_sources(version)
    found = plugin.load(root)
    assert found["level"] == logging.INFO
    assert found["text"].startswith(f"vLLM {version}, DeepStack fixes for Qwen3-VL, Qwen3-VL-MoE, ")
    assert "libcst" in found["imported"]
    served = {f"{name.replace('.', '/')}.py": Path(path) for name, path in found["files"].items()}
    Tree(root).apply()
    assert f"{MODELS}/deepstack.py" in served
    for path, file in served.items():
        assert file.read_bytes() == (root / path).read_bytes()
    assert not list(plugin.cache.rglob("*.pyc"))


def test_found_again_by_the_standard_library_alone(plugin, release_sources):
    root = release_sources("0.22.1")
    first, again = plugin.load(root), plugin.load(root)
    assert again == first | {"imported": []}


def test_a_change_of_the_release_is_another_merge(plugin, release_sources):
    root = release_sources("0.22.1")
    first = plugin.load(root)
    Tree(root).apply()
    assert "is patched by `vllm-deepstack apply`: nothing to do" in plugin.load(root)["text"]
    Tree(root).revert()
    assert plugin.load(root)["files"] == first["files"]


@pytest.mark.parametrize("damage", ["changed", "missing", "no verdict", "not JSON", "half"])
def test_what_is_not_as_it_was_built_is_built_again(plugin, release_sources, damage):
    root = release_sources("0.22.1")
    first = plugin.load(root)
    file, about = plugin.folder() / QWEN3_VL, plugin.folder() / "verdict.json"
    good = file.read_bytes()
    if damage == "changed":
        file.write_bytes(good.replace(b"class", b"clasz"))
        os.utime(file, (0, 0))
    elif damage == "missing":
        file.unlink()
    elif damage == "no verdict":
        about.unlink()
    else:
        about.write_text("{" if damage == "not JSON" else '{"files": {}}')
    again = plugin.load(root)
    assert (again["text"], again["files"]) == (first["text"], first["files"])
    assert file.read_bytes() == good
    assert [path.name for path in (plugin.cache / "deepstack").iterdir()] == [plugin.folder().name]


def test_several_processes_at_once(plugin, release_sources):
    root = release_sources("0.22.1")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: plugin.load(root), range(4)))
    assert all(one["files"] == found[0]["files"] != {} for one in found)
    assert plugin.folder().name in str(found[0]["files"])


@pytest.mark.parametrize("owner", ["others may write", "another user's", "a link"])
def test_a_cache_that_others_can_write_to_is_not_used(plugin, release_sources, tmp_path, owner):
    folder = plugin.cache / "deepstack"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    if owner == "a link":
        plugin.cache.mkdir()
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777 if owner == "others may write" else 0o700)
        if owner == "another user's":
            os.chown(folder, 12345, 12345)
    found = plugin.load(release_sources("0.22.1"), TMPDIR=str(temporary))
    assert list(folder.iterdir()) == []
    (used,) = temporary.iterdir()
    assert used.name == f"vllm-deepstack-{os.geteuid()}"
    assert stat.S_IMODE(used.stat().st_mode) == 0o700
    assert all(path.startswith(str(used)) for path in found["files"].values())
    assert plugin.load(release_sources("0.22.1"), TMPDIR=str(temporary))["level"] == logging.INFO


def test_no_cache_root_can_be_made(plugin, release_sources, tmp_path):
    (tmp_path / "file").write_text("")
    found = plugin.load(release_sources("0.22.1"), VLLM_CACHE_ROOT=str(tmp_path / "file/cache"))
    assert found["level"] == logging.INFO
    assert all("vllm-deepstack-" in path for path in found["files"].values())


class TestAsReleased:
    """vLLM runs as it is, and the log says why. Nothing is raised."""

    def refuses(self, plugin, root: Path, words: str, level: int = logging.WARNING, **how: str):
        for _ in range(2):  # the second time, from the cache
            found = plugin.load(root, **how)
            assert (found["level"], found["files"]) == (level, {})
            assert words in found["text"]
        if level == logging.WARNING:
            assert f"vllm-deepstack {__version__}: " in plugin.stderr

    @pytest.mark.parametrize("version", ["0.22.2", "0.19.1", "0.1.dev1+gabcdef"])
    def test_unknown_release(self, plugin, release_sources, version):
        root = release_sources("0.22.1")
        (root / "vllm/_version.py").write_text(f"__version__ = '{version}'\n")
        self.refuses(plugin, root, f"unknown release: vLLM {version}")

    def test_no_version(self, plugin, release_sources):
        root = release_sources("0.22.1")
        (root / "vllm/_version.py").write_text("__version__ = version()\n")
        self.refuses(
            plugin, root, "_version.py: no version found in it; vLLM runs as it is installed"
        )

    def test_a_file_that_is_not_as_released(self, plugin, release_sources):
        root = release_sources(NEWEST)
        with (root / QWEN3_VL).open("a") as file:
            file.write("# a vendor's\n")
        self.refuses(plugin, root, f"{root / QWEN3_VL}: not as vLLM {NEWEST} was released")

    def test_another_patch(self, plugin, release_sources):
        root = release_sources("0.22.1")
        for change in Tree(root, PR43617).changes():
            (root / change.path).write_bytes(change.after)
        self.refuses(plugin, root, "not as vLLM 0.22.1 was released")

    def test_interrupted(self, plugin, release_sources):
        root = release_sources("0.22.1")
        Tree(root).apply()
        Tree(root).transaction.mark("applying")
        self.refuses(plugin, root, "interrupted while applying the overlay; `revert` puts back")

    def test_a_manifest_that_is_none(self, plugin, release_sources):
        root = release_sources("0.22.1")
        (root / STATE).mkdir()
        (root / STATE / "manifest.json").write_text("[]")
        self.refuses(plugin, root, "manifest.json: not as vllm-deepstack wrote it")

    def test_a_wheel_of_the_fork_that_is_none(self, plugin, release_sources):
        """Its version says so, and its files do not."""
        root = release_sources("0.22.1")
        (root / "vllm/_version.py").write_text("__version__ = '0.22.1+deepstack.1'\n")
        assert plugin.load(root)["files"] != {}

    def test_its_cause_goes_away(self, plugin, release_sources):
        root = release_sources("0.22.1")
        (root / STATE).mkdir()
        self.refuses(plugin, root, f"{STATE}/manifest.json: not as vllm-deepstack wrote it")
        (root / STATE).rmdir()
        assert plugin.load(root)["files"] != {}

    def test_the_fork(self, plugin, release_sources):
        root = release_sources("0.22.1")
        Tree(root).apply()
        (root / "vllm/_version.py").write_text("__version__ = '0.22.1+deepstack.2.cpu'\n")
        self.refuses(plugin, root, "is a wheel that has the fixes: nothing to do", logging.INFO)

    @pytest.mark.parametrize("value", ["1", "true", "True"])
    def test_switched_off(self, plugin, release_sources, value):
        root = release_sources("0.22.1")
        words = f"DEEPSTACK_DISABLE={value}: vLLM runs as released"
        self.refuses(plugin, root, words, logging.INFO, DEEPSTACK_DISABLE=value)
        assert not plugin.cache.exists()

    def test_no_vllm(self, plugin, tmp_path):
        hidden = "import importlib.util; importlib.util.find_spec = lambda name: None\n"
        words = "ImportError: no vLLM is installed; vLLM runs as it is installed"
        self.refuses(plugin, tmp_path, words, before=hidden)

    def test_a_dependency_that_is_missing(self, plugin, release_sources):
        root = release_sources("0.22.1")
        hidden = "import sys; sys.modules['libcst'] = None\n"
        self.refuses(plugin, root, "ModuleNotFoundError: import of libcst halted", before=hidden)

    def test_a_model_that_was_imported_before(self, plugin, release_sources):
        """All or nothing: the other files are not served, either."""
        root = release_sources("0.22.1")
        name = "vllm.model_executor.models.qwen3_vl"
        before = f"import sys, types; sys.modules[{name!r}] = types.ModuleType('x')\n"
        words = (
            f"{name} was imported before vLLM loaded its plugins, so vLLM runs as it is installed"
        )
        self.refuses(plugin, root, words, before=before)
        assert (
            "`import vllm_deepstack.plugin` earlier, or use `vllm-deepstack apply`" in plugin.stderr
        )


class TestNewerRelease:
    """One that this version does not know."""

    @pytest.fixture
    def root(self, release_sources):
        root = release_sources(NEWEST)
        (root / "vllm/_version.py").write_text("__version__ = '0.99.0'\n")
        return root

    def test_fits(self, plugin, root):
        found = plugin.load(root)
        assert found["level"] == logging.WARNING
        assert found["text"].startswith("vLLM 0.99.0, DeepStack fixes for Qwen3-VL, ")
        assert "and were not tested with it" in found["text"]
        assert "vllm.model_executor.models.qwen3_vl" in found["files"]

    @pytest.mark.parametrize(
        "old, new, words",
        [
            ("def embed_input_ids(", "def embed(", "embed_input_ids: upstream has no such"),
            (
                "def _compute_deepstack_embeds(",
                "def _compute_embeds(",
                "_compute_deepstack_embeds: not as in",
            ),
            (
                "deepstack_input_embeds_num_tokens = 0",
                "deepstack_input_embeds_num_tokens = -1",
                "not as in vLLM 0.33.0, for which the fix was written",
            ),
        ],
        ids=["an anchor", "a method's name", "a method's body"],
    )
    def test_what_is_changed_has_changed(self, plugin, root, old, new, words):
        text = (root / QWEN3_VL).read_text()
        assert old in text
        (root / QWEN3_VL).write_text(text.replace(old, new))
        found = plugin.load(root)
        assert (found["level"], found["files"]) == (logging.WARNING, {})
        assert f"{QWEN3_VL}: " in found["text"] and "(vLLM 0.99.0)" in found["text"]
        assert words in found["text"]

    def test_a_defect_that_is_left(self, plugin, root):
        """The fixes fit, and the code has a defect all the same: D11, which 0.30.0 had fixed."""
        text = (root / QWEN3_VL).read_text()
        begin = text.index("class Qwen3VLForConditionalGeneration(")
        init = text[begin:].replace("architectures=", "names=", 1)
        (root / QWEN3_VL).write_text(text[:begin] + init)
        found = plugin.load(root)
        assert (found["level"], found["files"]) == (logging.WARNING, {})
        assert "newer than this vllm-deepstack: defects are left: D11" in found["text"]


def test_the_table_has_what_the_newest_release_had(release_sources):
    """`python -m vllm_deepstack.package_index pin` writes it."""
    tree = Tree(release_sources(NEWEST))
    assert {path: tree.replaced(path) for path in tree.release.sources} == releases.replaced()


FORKS = """
import multiprocessing, subprocess
worker = multiprocessing.get_context("fork").Process(target=print)
worker.start()
worker.join()
subprocess.run(["true"], preexec_fn=lambda: None)
"""


def test_a_forked_worker_says_so_too(plugin, release_sources):
    """vLLM does not call the plugins there again. Other forks say nothing: they are no workers, and
    to log there could wait for a lock for ever."""
    root = release_sources("0.22.1")
    before = "import logging; logging.basicConfig(level=logging.INFO)\n"
    path = os.pathsep.join([str(root), str(ROOT)])
    own = {"PYTHONPATH": path, "VLLM_CACHE_ROOT": str(plugin.cache), "DEEPSTACK_DISABLE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", before + PLUGIN + FORKS],
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.stderr.count(f":vllm.deepstack:vllm-deepstack {__version__}: vLLM 0.22.1, ") == 2


@pytest.mark.parametrize(
    "own, says",
    [
        ({}, True),
        ({"VLLM_LOGGING_LEVEL": "debug"}, True),
        ({"VLLM_LOGGING_LEVEL": "loud"}, True),
        ({"VLLM_LOGGING_LEVEL": "WARNING"}, False),
        ({"VLLM_CONFIGURE_LOGGING": "0"}, False),
    ],
)
def test_a_log_that_is_not_set_up(plugin, release_sources, own, says):
    """vLLM 0.33.0's `LLM` sets it up after it has loaded the plugins."""
    plugin.load(release_sources(NEWEST), **own)
    line = f"[vllm.deepstack] vllm-deepstack {__version__}: vLLM {NEWEST}, DeepStack fixes for "
    assert (line in plugin.stderr) == says


def test_a_cache_root_that_is_relative(plugin, release_sources, tmp_path):
    before = f"import os; os.chdir({str(tmp_path)!r})\n"
    found = plugin.load(release_sources("0.22.1"), before, VLLM_CACHE_ROOT="cache")
    assert all(path.startswith(f"{tmp_path}/cache/") for path in found["files"].values())


def test_a_user_without_a_home(plugin, release_sources, tmp_path):
    """As containers have them that run under any user's number."""
    before = f"""
import os, pwd
def unknown(_): raise KeyError
pwd.getpwuid = unknown
os.environ.pop("HOME")
os.chdir({str(tmp_path)!r})
"""
    found = plugin.load(release_sources("0.22.1"), before, VLLM_CACHE_ROOT="", XDG_CACHE_HOME="")
    assert found["level"] == logging.INFO and found["files"]


def test_compiles_what_was_verified(tmp_path):
    """And neither bytecode, nor a file that was changed since."""
    from vllm_deepstack.plugin import Loader

    file = tmp_path / "module.py"
    file.write_text("VALUE = 2\n")
    loader = Loader("module", str(file), b"VALUE = 1\n", True)
    namespace: dict[str, Any] = {}
    exec(loader.get_code("module"), namespace)
    assert namespace["VALUE"] == 1
    assert loader.get_source("module") == "VALUE = 1\n"


@pytest.mark.optional
@pytest.mark.timeout(600)
def test_a_ray_worker(models, stock_tree, tmp_path):
    """vLLM's own, in a process that Ray has started."""
    ray = tmp_path / "ray"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", str(ray), "ray"]
    subprocess.run(install, check=True)
    env = {"DEEPSTACK_DISABLE": "0", "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (stock_tree, ray, ROOT)))
    env["VLLM_CACHE_ROOT"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "tests.overlay.ray_worker", str(models["qwen3_vl"])]
    done = subprocess.run(command, cwd="/", env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("CPUWorker "))
    assert told.startswith(f"CPUWorker {tmp_path}/cache/deepstack/")
    says = "vLLM 0.22.1, DeepStack fixes for "
    logged = (done.stdout + done.stderr).splitlines()
    assert sum("RayWorkerWrapper" in line and says in line for line in logged) == 1
