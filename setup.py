"""A pinned vLLM release, merged with the overlay, as a wheel named `vllm`.

VLLM_RELEASE=0.21.0 chooses the release, VLLM_TARGET_DEVICE=cpu|cuda the build; without it, what
the machine has. VLLM_PRECOMPILED_WHEEL_LOCATION names a release's wheel that is already at hand.
"""

import os
import subprocess
import sys
import tempfile
from email import message_from_bytes
from email.message import Message
from email.policy import compat32
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.dist_info import dist_info
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import PlatformError, SetupError
from wheel.wheelfile import WheelFile

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # a build isolated from the project leaves it out

from vllm_deepstack import __version__, package_index, releases  # noqa: E402
from vllm_deepstack.cli import UserError  # noqa: E402
from vllm_deepstack.patch.transaction import replace  # noqa: E402
from vllm_deepstack.patch.tree import Tree  # noqa: E402

BUILD = HERE / "build"


def chosen_release() -> releases.Release:
    named = os.environ.get("VLLM_RELEASE")
    location = os.environ.get("VLLM_PRECOMPILED_WHEEL_LOCATION")
    try:
        if named or not location:
            return releases.known(named) if named else releases.default()
        return releases.known(parse_wheel_filename(Path(location).name)[1].public)
    except InvalidWheelFilename:
        raise PlatformError(
            f"VLLM_PRECOMPILED_WHEEL_LOCATION={location}: is not a wheel of vLLM"
        ) from None
    except UserError as error:
        what = "VLLM_RELEASE" if named else "VLLM_PRECOMPILED_WHEEL_LOCATION"
        raise PlatformError(f"{what}: {error}") from None


def target_device() -> str:
    device = os.environ.get("VLLM_TARGET_DEVICE", "").lower()
    location = os.environ.get("VLLM_PRECOMPILED_WHEEL_LOCATION")
    if device and device not in package_index.DISTRIBUTIONS:
        raise PlatformError(f"VLLM_TARGET_DEVICE={device}: the fork builds for cpu and cuda")
    if location:
        if not Path(location).is_file():
            raise PlatformError(
                f"VLLM_PRECOMPILED_WHEEL_LOCATION={location}: the file does not exist"
            )
        try:
            found = package_index.check(RELEASE, Path(location))
        except UserError as error:
            raise PlatformError(f"VLLM_PRECOMPILED_WHEEL_LOCATION: {error}") from None
        if device not in ("", found):
            raise PlatformError(f"VLLM_TARGET_DEVICE={device}, but {location} is the {found} wheel")
        return found
    return device or ("cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu")


RELEASE = chosen_release()
DEVICE = target_device()
# vLLM takes a build for a CPU build if its version contains `cpu`.
VERSION = Version(f"{RELEASE.version}+deepstack.{__version__}{'.cpu' if DEVICE == 'cpu' else ''}")


def release_wheel() -> Path:
    location = os.environ.get("VLLM_PRECOMPILED_WHEEL_LOCATION")
    try:
        return (
            Path(location) if location else package_index.fetch(RELEASE, DEVICE, BUILD / "releases")
        )
    except UserError as error:
        raise SetupError(str(error)) from None


def true_metadata(released: bytes) -> bytes:
    """The release's METADATA with the fork's name, version, page and working requirements."""
    metadata = message_from_bytes(released, policy=compat32.clone(max_line_length=None))
    corrected = [Requirement(text) for text in RELEASE.requires.get(DEVICE, ())]
    names = {canonicalize_name(requirement.name) for requirement in corrected}
    kept = [
        text
        for text in metadata.get_all("Requires-Dist", [])
        if canonicalize_name(Requirement(text).name) not in names
    ]
    metadata.replace_header("Name", "vllm")
    metadata.replace_header("Version", str(VERSION))
    del metadata["Requires-Dist"]
    for requirement in [*kept, *map(str, corrected)]:
        metadata["Requires-Dist"] = requirement
    page = (HERE / "README.md").read_bytes()
    metadata.set_payload(page.decode("ascii", "surrogateescape"))
    Metadata.from_email(metadata.as_bytes())  # raises where a field is not valid
    return metadata.as_bytes()


def wheel_file(tags: object) -> bytes:
    message = Message()
    message["Wheel-Version"] = "1.0"
    message["Generator"] = f"vllm-deepstack ({__version__})"
    message["Root-Is-Purelib"] = "false"
    for tag in sorted(map(str, tags)):  # type: ignore[call-overload]
        message["Tag"] = tag
    return message.as_bytes()


def true_version(source: bytes) -> bytes:
    """The release's `_version.py` with the fork's version."""
    old, new = repr(str(RELEASE.version)).encode(), repr(str(VERSION)).encode()
    old_tuple = repr(RELEASE.version.release).encode()
    new_tuple = repr((*RELEASE.version.release, VERSION.local)).encode()
    if source.count(old) != 1 or source.count(old_tuple) != 1:
        raise SetupError(f"vllm/_version.py does not hold {RELEASE.version} once")
    return source.replace(old, new).replace(old_tuple, new_tuple)


class merged_wheel(bdist_wheel):
    def run(self) -> None:
        wheel = release_wheel()
        with tempfile.TemporaryDirectory(prefix="merge.", dir=BUILD) as folder:
            tree = Path(folder) / "tree"
            package_index.unpack(wheel, tree)
            try:
                changes = Tree(tree).changes()
            except UserError as error:
                raise SetupError(str(error)) from None
            for change in changes:
                replace(tree / change.path, change.after, tree)
            version = tree / "vllm" / "_version.py"
            replace(version, true_version(version.read_bytes()), tree)
            info = tree / f"vllm-{VERSION}.dist-info"
            next(tree.glob("*.dist-info")).rename(info)
            replace(info / "METADATA", true_metadata((info / "METADATA").read_bytes()), tree)
            replace(info / "WHEEL", wheel_file(parse_wheel_filename(wheel.name)[3]), tree)
            Path(self.dist_dir).mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable,
                "-m",
                "wheel",
                "pack",
                "--dest-dir",
                self.dist_dir,
                str(tree),
            ]
            subprocess.run(command, check=True)


class merged_dist_info(dist_info):
    """Metadata ahead of the build, so that an installer learns the requirements in time."""

    def run(self) -> None:
        with WheelFile(release_wheel()) as wheel:
            released = wheel.read(f"{wheel.dist_info_path}/METADATA")
        super().run()
        (Path(self.dist_info_dir) / "METADATA").write_bytes(true_metadata(released))


class no_editable_wheel(editable_wheel):
    def run(self) -> None:
        raise PlatformError(
            "the fork has no editable install: patch an installed vLLM with `vllm-deepstack apply`"
        )


BUILD.mkdir(exist_ok=True)
setup(
    name="vllm",
    version=str(VERSION),
    packages=[],
    py_modules=[],
    cmdclass={
        "bdist_wheel": merged_wheel,
        "dist_info": merged_dist_info,
        "editable_wheel": no_editable_wheel,
    },
    # Not beside vllm/: Python would take it for an installed vLLM's metadata.
    options={"egg_info": {"egg_base": str(BUILD)}},
)
