"""The plugin, on the sources of real releases: what it serves, and what it says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import PR43617
from tests.overlay.defects import MODELS
from vllm_deepstack import ROOT, STATE, __version__, build, merged, plugin, releases
from vllm_deepstack.merged import FOLDER, NOTICE, TABLE, Installed, module_of, table
from vllm_deepstack.patch.tree import OVERLAY, Tree, overlay_files
from vllm_deepstack.plugin import Finder, Loader, Watch

from .files import text

RELEASES = [str(version) for version in releases.releases()]
NEWEST = RELEASES[-1]
QWEN3_VL, MIXIN = f"{MODELS}/qwen3_vl.py", f"{MODELS}/deepstack.py"
BACKEND = f"{MODELS}/transformers/multimodal.py"
ERNIE, EXPERTS = f"{MODELS}/ernie45_vl.py", f"{MODELS}/ernie45_vl_moe.py"


@pytest.fixture(scope="module", autouse=True)
def merged_files() -> None:
    assert build.is_built(FOLDER, overlay_files(OVERLAY)), "`make plugin` makes them anew"


def served(root: Path) -> dict[str, bytes]:
    installed = Installed(root)
    found = {path: installed.replacement(path) for path in table().files}
    return {path: file.place.read_bytes() for path, file in found.items() if file}


@pytest.mark.thinned
@pytest.mark.parametrize("version", RELEASES)
def test_serves_what_apply_writes(release_sources, version):
    root = release_sources(version)
    found = served(root)
    before = {path: (root / path).read_bytes() for path in found if (root / path).exists()}
    Tree(root).apply()
    for path, data in found.items():
        assert (root / path).read_bytes() == data
        assert (NOTICE in data) == (path in before)
    assert {MIXIN, QWEN3_VL} <= found.keys()
    patched = Installed(root)
    assert not any(map(patched.replacement, table().files)) and patched.unknown == {}


@pytest.mark.optional
@pytest.mark.timeout(600)
def test_the_table_is_of_these_releases_and_this_overlay(release_sources):
    """`python -m tests.overlay.files` writes it."""
    roots = {version: release_sources(str(version)) for version in releases.releases()}
    assert TABLE.read_text() == text(roots, json.loads(TABLE.read_text())["earlier"])


@pytest.mark.parametrize("version", ["0.22.1", NEWEST])
@pytest.mark.parametrize(
    "named",
    [
        "0.26.1rc1.dev1257+g0123abcde",
        "0.22.1.post1",
        "0.22.1.dev0+precompiled",
        "0.28.1+vendor.7",
        "0.1.dev1+g0123abcde",
        None,
    ],
)
def test_a_vllm_is_known_by_its_files(release_sources, version, named):
    """And not by its version: a vendor's build, a nightly, a clone without tags."""
    root = release_sources(version)
    expected = served(root)
    file = root / "vllm/_version.py"
    file.write_text(f"__version__ = version = {named!r}\n") if named else file.unlink()
    assert served(root) == expected != {}
    Tree(root).apply()
    assert {path: (root / path).read_bytes() for path in expected} == expected


class TestUnknownFiles:
    """What needs them stays as it is, and the rest is fixed."""

    def edit(self, root: Path, path: str) -> Installed:
        with (root / path).open("a") as file:
            file.write("# a vendor's\n")
        return Installed(root)

    def test_one_model(self, release_sources):
        root = release_sources(NEWEST)
        before, installed = served(root), self.edit(root, QWEN3_VL)
        assert installed.replacement(QWEN3_VL) is None
        assert served(root) == {path: data for path, data in before.items() if path != QWEN3_VL}
        why = "is not from a release that vllm-deepstack knows"
        assert installed.unknown == {QWEN3_VL: why}

    def test_what_another_file_needs(self, release_sources):
        root = release_sources(NEWEST)
        installed = self.edit(root, EXPERTS)
        assert installed.replacement(ERNIE) is None
        assert installed.unknown[ERNIE] == f"needs {EXPERTS}, which cannot be replaced"
        assert installed.replacement(QWEN3_VL)

    def test_a_mixin_of_upstreams_own(self, release_sources):
        root = release_sources(NEWEST)
        (root / MIXIN).write_text("class DeepStackMixin: ...\n")
        installed = Installed(root)
        found = {path for path in table().files if installed.replacement(path)}
        assert found == {ERNIE, EXPERTS}
        assert installed.unknown[QWEN3_VL] == f"needs {MIXIN}, which cannot be replaced"

    def test_another_fix(self, release_sources):
        root = release_sources("0.22.1")
        before, changes = served(root), Tree(root, PR43617).changes()
        for change in changes:
            (root / change.path).write_bytes(change.after)
        granite = f"{MODELS}/granite4_vision.py"  # needs the mixin, which is another one there
        left = {granite, *(change.path for change in changes)}
        assert served(root).keys() == before.keys() - left

    @pytest.mark.parametrize("gone", ["a name", "a module"])
    def test_what_merged_code_imports(self, release_sources, gone):
        """Of files that a vendor may have changed, what is imported has to be there."""
        root = release_sources(NEWEST)
        file = root / "vllm/utils/__init__.py"
        if gone == "a name":
            file.write_text(file.read_text().replace("random_uuid", "random_id"))
        else:
            file.unlink()
        installed = Installed(root)
        assert installed.replacement(QWEN3_VL) is None
        assert installed.unknown[MIXIN] == "needs random_uuid of vllm.utils, which is not there"

    def test_a_merged_file_that_is_gone(self, release_sources, monkeypatch, tmp_path):
        monkeypatch.setattr(merged, "FOLDER", tmp_path)
        installed = Installed(release_sources(NEWEST))
        assert installed.replacement(QWEN3_VL) is None
        assert installed.unknown[QWEN3_VL].endswith("install vllm-deepstack again")

    def test_a_file_that_cannot_be_read(self, release_sources, monkeypatch):
        def refuse(file):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(merged, "sha256", refuse)
        installed = Installed(release_sources(NEWEST))
        assert installed.replacement(QWEN3_VL) is None
        assert installed.unknown[QWEN3_VL] == "cannot be read: [Errno 13] Permission denied"

    @pytest.mark.parametrize("how", ["apply", "wheel"])
    def test_another_version_of_ours(self, release_sources, how):
        root = release_sources(NEWEST)
        if how == "apply":
            (root / STATE / "originals" / QWEN3_VL).parent.mkdir(parents=True)
            (root / STATE / "originals" / QWEN3_VL).touch()
        else:
            (root / QWEN3_VL).write_bytes(NOTICE + (root / QWEN3_VL).read_bytes())
        words = "was patched by another version of vllm-deepstack: run `vllm-deepstack apply`"
        assert self.edit(root, QWEN3_VL).replacement(QWEN3_VL) is None
        installed = Installed(root)
        assert installed.replacement(QWEN3_VL) is None and installed.unknown[QWEN3_VL] == words


@pytest.fixture
def built(release_sources, monkeypatch, caplog) -> Callable[..., list[str]]:
    """`built(model, files)`: a class of that name is built, whose modules have such files; what is
    logged."""
    root = release_sources(NEWEST)

    def make(model: str, files: dict[str, Path], config: Any = None, name: str = "") -> list[str]:
        for path, file in files.items():
            module = SimpleNamespace(__name__=module_of(path), __file__=str(file))
            monkeypatch.setitem(sys.modules, module_of(path), module)
        module_name, class_name = table().kinds[model]
        base = type(class_name, (torch.nn.Module,), {"__module__": module_name})
        cls = type(name, (base,), {"__module__": "somebody.else"}) if name else base
        instance = cls()
        if config:
            instance.config = config
        installed = Installed(root)
        for path in table().files:
            installed.replacement(path)
        caplog.clear()
        with caplog.at_level(logging.INFO, "vllm.deepstack"):
            watch = Watch(installed)
            for _ in range(2):
                watch(instance, "visual", torch.nn.Identity())
        assert all(
            record.message.startswith(f"vllm-deepstack {__version__}: ")
            for record in caplog.records
        )
        return [f"{r.levelname} {r.message.partition(': ')[2]}" for r in caplog.records]

    make.root = root  # type: ignore[attr-defined]
    return make


def place(root: Path, path: str) -> Path:
    file = Installed(root).replacement(path)
    assert file
    return file.place


class TestModels:
    """One line for each model that is built, in the process that builds it."""

    def test_fixed(self, built):
        (line,) = built("Qwen3-VL", {QWEN3_VL: place(built.root, QWEN3_VL)})
        assert line.startswith("INFO Qwen3VLForConditionalGeneration has the DeepStack fixes (D2, ")

    def test_patched(self, built):
        files = {QWEN3_VL: built.root / QWEN3_VL}
        Tree(built.root).apply()
        (line,) = built("Qwen3-VL", files)
        assert "has the DeepStack fixes (D2, " in line

    def test_an_heir_in_another_package(self, built):
        (line,) = built("Qwen3-VL", {QWEN3_VL: place(built.root, QWEN3_VL)}, name="ColQwen3")
        assert line.startswith("INFO ColQwen3 has the DeepStack fixes")

    def test_imported_too_early(self, built):
        (line,) = built("Qwen3-VL", {QWEN3_VL: built.root / QWEN3_VL})
        assert line.startswith(
            "WARNING Qwen3VLForConditionalGeneration is built without the DeepStack fixes: "
            f"{built.root / QWEN3_VL} was imported before the plugin (D2, "
        )

    def test_an_edited_parent(self, built):
        """Its heir has nothing of its own to be fixed on the newest release."""
        with (built.root / QWEN3_VL).open("a") as file:
            file.write("# a vendor's\n")
        moe = f"{MODELS}/qwen3_vl_moe.py"
        files = {path: built.root / path for path in (QWEN3_VL, moe)}
        (line,) = built("Qwen3-VL-MoE", files)
        assert line == (
            "WARNING Qwen3VLMoeForConditionalGeneration is built without the DeepStack fixes: "
            f"{built.root / QWEN3_VL} is not from a release that vllm-deepstack knows"
        )

    @pytest.mark.parametrize("levels, lines", [([5, 11, 17], 1), ([], 0), (None, 0)])
    def test_models_without_levels(self, built, levels, lines):
        """Qwen3.5 and others inherit the code, and have nothing that could go wrong."""
        vision = SimpleNamespace(deepstack_visual_indexes=levels)
        config = SimpleNamespace(vision_config=vision)
        files = {QWEN3_VL: built.root / QWEN3_VL}
        assert len(built("Qwen3-VL", files, config)) == lines

    def test_other_models_of_the_transformers_backend(self, built):
        files = {BACKEND: place(built.root, BACKEND)}
        assert built("Transformers backend", files, SimpleNamespace(hidden_size=8)) == []

    def test_levels_that_the_backend_drops(self, release_sources, monkeypatch):
        """Before 0.32.0, D16 has no fix."""
        installed = Installed(release_sources("0.31.0"))
        file = installed.replacement(BACKEND)
        module = SimpleNamespace(__name__=module_of(BACKEND), __file__=str(file.place))
        monkeypatch.setitem(sys.modules, module_of(BACKEND), module)
        _, problems = Watch(installed).judge("Transformers backend")
        assert problems == [f"{file.place} leaves D16 as it is released"]

    def test_another_model(self, built):
        """As dear as it gets: a look into a dictionary for each part of a model."""
        watch = Watch(Installed(built.root))
        watch(torch.nn.Sequential(), "0", torch.nn.Identity())
        assert watch.kinds == {torch.nn.Sequential: None} and not len(watch.seen)

    def test_what_cannot_be_told(self, built, monkeypatch):
        """A model is built all the same."""
        monkeypatch.setattr(Watch, "judge", lambda *_: 1 / 0)
        (line,) = built("Qwen3-VL", {QWEN3_VL: place(built.root, QWEN3_VL)})
        assert line.startswith(
            "WARNING Qwen3VLForConditionalGeneration: whether it is fixed cannot"
        )
        assert "division by zero" in line

    @pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
    def test_required(self, built, monkeypatch, value):
        monkeypatch.setenv("DEEPSTACK_REQUIRE", value)
        with pytest.raises(RuntimeError, match=f"DEEPSTACK_REQUIRE={value}: Qwen3VLFor.* without"):
            built("Qwen3-VL", {QWEN3_VL: built.root / QWEN3_VL})
        assert built("Qwen3-VL", {QWEN3_VL: place(built.root, QWEN3_VL)})

    def test_required_where_the_plugin_cannot_work(self, monkeypatch):
        monkeypatch.setattr(plugin, "OUTCOME", (logging.WARNING, "no merged files"))
        plugin.register()
        monkeypatch.setenv("DEEPSTACK_REQUIRE", "1")
        with pytest.raises(RuntimeError, match="DEEPSTACK_REQUIRE=1: no merged files"):
            plugin.register()

    @pytest.mark.parametrize("value", ["", "0", "false"])
    def test_not_required(self, built, monkeypatch, value):
        monkeypatch.setenv("DEEPSTACK_REQUIRE", value)
        assert built("Qwen3-VL", {QWEN3_VL: built.root / QWEN3_VL})


PLUGIN = """
import json, sys
import torch
before = set(sys.modules)
import vllm_deepstack.plugin as plugin
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({
    "outcome": plugin.OUTCOME,
    "served": any(isinstance(finder, plugin.Finder) for finder in sys.meta_path),
    "imported": sorted(new - set(sys.stdlib_module_names) - {"vllm_deepstack"}),
}))
plugin.register()
"""


def load(root: Path, before: str = "", **env: str) -> tuple[dict[str, Any], str]:
    """In a new process, beside the vLLM in `root`: what it says of itself, and what it logs."""
    own = {"PYTHONPATH": os.pathsep.join([str(root), str(ROOT)]), "DEEPSTACK_DISABLE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", before + PLUGIN],
        cwd="/",
        env=os.environ | own | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


class TestImport:
    def test_it_says_nothing_and_needs_nothing(self, release_sources):
        """A front end that builds no model is told nothing."""
        root = release_sources(NEWEST)
        before = sorted(root.rglob("*"))
        told, log = load(root)
        assert told == {"outcome": None, "served": True, "imported": []}
        assert log == "" and sorted(root.rglob("*")) == before

    @pytest.mark.parametrize("value", ["1", "true", "Yes", "on"])
    def test_switched_off(self, release_sources, value):
        told, log = load(release_sources(NEWEST), DEEPSTACK_DISABLE=value)
        words = f"DEEPSTACK_DISABLE={value}: vLLM runs as it is installed"
        assert not told["served"] and told["outcome"] == [logging.INFO, words]
        assert f"[vllm.deepstack] vllm-deepstack {__version__}: {words}" in log

    def test_no_vllm(self, tmp_path):
        hidden = "import importlib.util; importlib.util.find_spec = lambda name: None\n"
        told, log = load(tmp_path, hidden)
        assert not told["served"] and told["outcome"][0] == logging.WARNING
        assert "ImportError: no vLLM is installed; vLLM runs as it is installed" in log

    @pytest.mark.parametrize(
        "own, says",
        [
            ({"VLLM_LOGGING_LEVEL": "debug"}, True),
            ({"VLLM_LOGGING_LEVEL": "loud"}, True),
            ({"VLLM_LOGGING_LEVEL": "WARNING"}, False),
            ({"VLLM_CONFIGURE_LOGGING": "0"}, False),
        ],
    )
    def test_a_log_that_is_not_set_up(self, release_sources, own, says):
        """vLLM 0.33.0's `LLM` sets it up after it has loaded the plugins."""
        _, log = load(release_sources(NEWEST), DEEPSTACK_DISABLE="1", **own)
        assert (f"vllm-deepstack {__version__}: DEEPSTACK_DISABLE=1" in log) == says


def test_a_module_is_a_real_file_and_leaves_no_bytecode(release_sources, monkeypatch, tmp_path):
    """Tracebacks, `inspect` and vLLM's compile cache read it."""
    root = release_sources(NEWEST)
    finder = Finder(Installed(root))
    assert finder.find_spec("vllm.model_executor.models.llama") is None
    assert finder.find_spec(module_of(MIXIN), ["/another/vllm/model_executor/models"]) is None
    spec = finder.find_spec(module_of(MIXIN), [str(root / MODELS)])
    assert spec and spec.origin == str(place(root, MIXIN))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "module.py"
    file.write_text("VALUE = 1\n")
    spec = importlib.util.spec_from_file_location(
        "module", file, loader=Loader("module", str(file))
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.VALUE == 1 and list(tmp_path.iterdir()) == [file]


class TestBuild:
    @pytest.fixture
    def few(self, monkeypatch):
        """A table of two files, which are merged in no time."""
        whole = table()
        files = {path: {} for path in whole.files}
        for path in (MIXIN, f"{MODELS}/qwen3_vl_moe.py"):
            files[path] = dict([next(iter(whole.files[path].items()))])
        monkeypatch.setattr(merged, "table", lambda: dataclasses.replace(whole, files=files))

    @pytest.mark.parametrize("where", ["a tree", "a folder of trees", "a wheel"])
    def test_from_a_folder(self, few, release_sources, tmp_path, monkeypatch, where):
        root = release_sources("0.20.0")
        folder = root
        if where == "a folder of trees":
            folder = tmp_path / "trees"
            folder.mkdir()
            root.rename(folder / "0.20.0")
        elif where == "a wheel":
            folder = tmp_path / "wheels"
            folder.mkdir()
            import zipfile

            with zipfile.ZipFile(folder / "vllm-0.20.0-py3-none-any.whl", "w") as wheel:
                for path in table().files:
                    if (root / path).is_file():
                        wheel.write(root / path, path)
        monkeypatch.setenv("DEEPSTACK_SOURCES", str(folder))
        overlay = overlay_files(OVERLAY)
        build.build(tmp_path / "made", overlay)
        assert build.is_built(tmp_path / "made", overlay)
        assert not build.is_built(tmp_path / "made", overlay | {MIXIN: b""})
        for file in (tmp_path / "made").rglob("deepstack.py"):
            file.write_bytes(file.read_bytes() + b"print(1)\n")
        assert not build.is_built(tmp_path / "made", overlay)
        assert sorted(f.name for f in (tmp_path / "made").rglob("*.py")) == [
            "deepstack.py",
            "qwen3_vl_moe.py",
        ]

    def test_an_original_that_is_not_there(self, few, tmp_path, monkeypatch):
        monkeypatch.setenv("DEEPSTACK_SOURCES", str(tmp_path))
        with pytest.raises(build.UserError, match=r"has .*/qwen3_vl_moe.py as vLLM 0.20.0 has it"):
            build.build(tmp_path / "made", overlay_files(OVERLAY))
        assert list(tmp_path.iterdir()) == []

    def test_a_table_of_another_overlay(self, few, tmp_path):
        overlay = overlay_files(OVERLAY)
        overlay[MIXIN] += b"# changed\n"
        with pytest.raises(build.UserError, match=r"tests\.overlay\.files"):
            build.build(tmp_path / "made", overlay)


@pytest.mark.optional
@pytest.mark.timeout(600)
def test_a_ray_worker(models, stock_tree, tmp_path):
    """vLLM's own, in a process that Ray has started."""
    ray = tmp_path / "ray"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", str(ray), "ray"]
    subprocess.run(install, check=True)
    env = {"DEEPSTACK_DISABLE": "0", "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (stock_tree, ray, ROOT)))
    command = [sys.executable, "-m", "tests.overlay.ray_worker", str(models["qwen3_vl"])]
    done = subprocess.run(command, cwd="/", env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("CPUWorker "))
    assert told.startswith(f"CPUWorker {FOLDER}/")
