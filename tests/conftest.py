"""What the tests share: releases' sources, the stock release, the tiny models."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import Phase, settings
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_deepstack import package_index, releases
from vllm_deepstack.cli import UserError
from vllm_deepstack.patch.tree import public_version
from vllm_deepstack.patch.verbs import installed

BUILD = releases.ROOT / "build"
PR43617 = releases.ROOT / "tests" / "pr43617"
FLEET = pytest.StashKey[Any]()
UNTESTED = pytest.StashKey[Counter[str]]()
THIN = 1

# For tests that are meant to fail: it does not matter on how small an example.
# The environment has the plugin. But for its own tests, each vLLM runs as its files are.
os.environ.setdefault("DEEPSTACK_DISABLE", "1")

settings.register_profile("unshrunk", phases=[Phase.generate])
# How long a test takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption(
        "--bites",
        metavar="VARIANT",
        help="the vLLM that is imported is a broken one (stock, pr43617, newest, 0.20.1 …): "
        "run the tests that are said to fail on it, and expect each to fail",
    )
    parser.addoption("--optional", action="store_true", help="run those marked optional, too")
    parser.addoption("--thin", metavar="N", type=int, default=1, help="an Nth of random examples")
    parser.addoption(
        "--minutes",
        metavar="N",
        type=float,
        help="start no test after so many; each day begins a seventh of the tests further on",
    )
    parser.addoption(
        "--untested",
        metavar="FILE",
        type=Path,
        help="what this machine cannot test: is added to, and shown at the end",
    )
    parser.addoption("--figures", metavar="FILE", help="write what the tests measured as JSON")


def pytest_configure(config):
    global THIN
    THIN = config.getoption("--thin")
    config.stash[UNTESTED] = Counter()
    if file := config.getoption("--figures"):
        from tests.figures import Figures

        config.pluginmanager.register(Figures(Path(file)))


def pytest_report_header(config):
    try:
        return f"vLLM {public_version(installed())} in {installed()}"
    except UserError:
        return "no vLLM is installed"


def examples(count: int) -> int:
    """Of a random test. Unless all are run, some of them: `--thin`."""
    return max(5, count // THIN)


def in_release(item) -> bool:
    """Whether a test is about the release that is imported."""
    ranges = [mark.args[0] for mark in item.iter_markers("release")]
    return all(SpecifierSet(text).contains(version()) for text in ranges)


@lru_cache
def version() -> str:
    """Of the vLLM that is imported."""
    return str(public_version(installed()))


def has_module(name: str) -> bool:
    """Whether the vLLM that is imported has a module. It is not imported for that."""
    try:
        return (installed() / f"{name.replace('.', '/')}.py").is_file()
    except UserError:
        return False


def pytest_deselected(items):
    """Of the GPU's tests, that they were not run is said."""
    for item in items:
        if item.get_closest_marker("gpu") and in_release(item):
            item.config.stash[UNTESTED]["needs a GPU: `make test-gpu`"] += 1


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """What this machine could not test, and why; of earlier runs with the same file, too."""
    untested = config.stash[UNTESTED]
    for report in terminalreporter.stats.get("skipped", ()):
        untested[report.longrepr[2].removeprefix("Skipped: ")] += 1
    file = config.getoption("--untested")
    if file and file.exists():
        for line in file.read_text().splitlines():
            count, _, reason = line.partition("\t")
            untested[reason] = max(untested[reason], int(count))
    if file:
        text = "".join(f"{count}\t{reason}\n" for reason, count in sorted(untested.items()))
        file.write_text(text)
    if untested:
        terminalreporter.section("not tested on this machine")
    for reason, count in sorted(untested.items()):
        terminalreporter.line(f"{count} test{'s' * (count > 1)}: {reason}")


def rotated(items: list[Any], day: int) -> list[Any]:
    """Begins at the file that is so many sevenths of the way on, so that a week sees all."""
    start = len(items) * (day % 7) // 7
    while 0 < start < len(items) and items[start].path == items[start - 1].path:
        start -= 1
    return items[start:] + items[:start]


def deselect(config, items, kept) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu"):  # what it did to the GPU ends with its process
            item.add_marker(pytest.mark.forked)
    wanted = {item for item in items if in_release(item)}
    if not config.getoption("--optional"):
        wanted -= {item for item in items if item.get_closest_marker("optional")}
    deselect(config, items, wanted)
    if variant := config.getoption("--bites"):
        release = str(variants().get(variant))
        if release != version():
            raise pytest.UsageError(f"--bites {variant} is of vLLM {release}; this is {version()}")
        bite = {item for item in items if said(item, "bites", variant)}
        for item in bite:
            if not item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.xfail(strict=True))
        deselect(config, items, bite | {item for item in items if said(item, "holds", variant)})
    if config.getoption("--minutes"):
        items[:] = rotated(items, day=int(time.time()) // 86400)


def variants() -> dict[str, Version]:
    """Broken vLLMs, and the releases that they are, or are made of."""
    default = releases.default().version
    newest = max(releases.releases())
    made = {"stock": default, "pr43617": default, "newest": newest}
    return made | {version: Version(version) for version in ("0.20.1", "0.25.1", "0.32.0")}


def said(item, marker: str, variant: str) -> bool:
    return any(variant in mark.args for mark in item.iter_markers(marker))


def pytest_collection_finish(session):
    """Engines on a GPU start ahead of the tests that share them: tests/fleet.py."""
    config, items = session.config, session.items
    if config.getoption("collectonly"):
        return
    if any(item.get_closest_marker("gpu") and not missing_gpus(item) for item in items):
        from tests.fleet import Fleet, by_engine

        items[:] = by_engine(items)
        (BUILD / "gpu").mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="engines.", dir=BUILD / "gpu"))
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.stash[FLEET] = Fleet(gpu, folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """In the parent, around the fork."""
    fleet = item.config.stash.get(FLEET, None)
    if fleet is None or not item.get_closest_marker("gpu"):
        return (yield)
    failed = item.session.testsfailed
    fleet.before(item)
    try:
        return (yield)
    finally:
        fleet.after(item, failed=item.session.testsfailed > failed)


def pytest_sessionfinish(session):
    if fleet := session.config.stash.get(FLEET, None):
        fleet.stop(keep=session.testsfailed > 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test on a GPU fails by what it found: an engine that died is an error, on every vLLM."""
    variant = item.config.getoption("--bites")
    if not (variant and item.get_closest_marker("gpu") and said(item, "bites", variant)):
        return (yield)
    from tests.serving.soak import DifferenceError

    # Of the classes' own tests, in whose process no engine is, any assertion.
    expected = AssertionError if item.path.parent.name == "deepstack" else DifferenceError
    try:
        yield
    except expected as error:
        print(f"fails on {variant}, as it should: {error}")
        return None
    pytest.fail(f"it is said to fail on {variant}, and passed")


def missing_gpus(item) -> int:
    """How many GPUs more than there are a test needs."""
    import torch

    marker = item.get_closest_marker("gpu")
    return max(0, (marker.args or (1,))[0] - torch.cuda.device_count()) if marker else 0


def can_run_experts() -> bool:
    """Whether 0.22.1's CPU engines run models with experts here, in float32.

    Without AVX-512, and with AMX, they end: `cpu_fused_moe.py` has `forward_torch` make a
    `SiluAndMul` while no configuration is set ("Current vLLM config is not set"). As released, too.
    """
    import torch

    amx = torch.cpu._is_amx_tile_supported()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not amx


STARTED = time.monotonic()


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--minutes")
    if minutes and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip("no time left today; another day begins with others")
    if item.get_closest_marker("gpu") and (missing := missing_gpus(item)):
        pytest.skip(f"needs {missing} CUDA GPU(s) more than there are")


@pytest.fixture
def fleet(request):
    """The engines that the parent has started."""
    return request.config.stash[FLEET]


@pytest.fixture
def figures(record_property):
    """`figures(largest=0.1, …)`: what a test measured, in its output and for `--figures FILE`."""

    def record(**values: Any) -> None:
        print(", ".join(f"{name} {value}" for name, value in values.items()))
        record_property("figures", values)

    return record


@pytest.fixture(scope="session")
def models(tmp_path_factory, request) -> dict[str, Path]:
    """The tiny checkpoints, by name; Omni's with dense layers where experts cannot run."""
    from tests import tiny_models

    root, dense = tmp_path_factory.mktemp("models"), not can_run_experts()
    if dense:
        reason = "Omni's experts: 0.22.1 needs AVX-512 without AMX. Its engines had dense layers"
        request.config.stash[UNTESTED][reason] += 1
    return {
        "qwen3_vl": tiny_models.qwen3_vl(root / "qwen3_vl"),
        "qwen3_omni": tiny_models.qwen3_omni(root / "qwen3_omni", dense=dense),
    }


def downloading(version: str) -> FileLock:
    """Held by the one of pytest-xdist's workers that fetches a release."""
    BUILD.mkdir(exist_ok=True)
    return FileLock(BUILD / f".{version}.lock")


@pytest.fixture(scope="session")
def release_sources(tmp_path_factory):
    """Copies of the files that the overlay changes, as a release has them: `sources("0.22.1")`."""

    def copy(version: str) -> Path:
        kept = BUILD / "sources" / version
        with downloading(version):
            package_index.fetch_sources(releases.known(version), kept)
        return Path(shutil.copytree(kept, tmp_path_factory.mktemp(version), dirs_exist_ok=True))

    return copy


@pytest.fixture(scope="session")
def unpacked():
    """Releases, for the CPU if there is such: `unpacked("0.22.1")`. Not to be written to."""

    def unpack(version: str) -> Path:
        tree, release = BUILD / "stock" / version, releases.known(version)
        with downloading(version):
            if not tree.exists():
                device = "cpu" if release.wheels["cpu"] else "cuda"
                package_index.unpack(package_index.fetch(release, device, BUILD / "releases"), tree)
        return tree

    return unpack


@pytest.fixture(scope="session")
def stock_tree(unpacked) -> Path:
    """The release that the fork is built on."""
    return unpacked(str(releases.default().version))
