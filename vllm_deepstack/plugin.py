"""The plugin: vLLM imports the merged files in place of its own; its installation stays as it is.

vLLM imports the modules of all `vllm.general_plugins` in every process, before it calls the first
of them. Importing this module puts the finder in place. `register`, which vLLM calls then, only
says so: a plugin that vLLM called before it may have imported a model already.

The merged files are real files, in a folder of vLLM's cache root, since tracebacks and vLLM's
compile cache read them. The first process merges, the others find the result there by the hashes
of all that it is made of. Once it is there, nothing but the standard library is imported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

from . import OFF, ROOT, STATE, __version__, is_off
from .patch.compile_cache import cache_root

logger = logging.getLogger("vllm.deepstack")  # below `vllm`, for which vLLM sets up handlers
# What else a newer release is judged by.
READ_TOO = (
    "vllm/v1/worker/gpu_model_runner.py",
    "vllm/model_executor/models/qwen2_5_omni_thinker.py",
    "vllm/model_executor/models/interns1_pro.py",
)
Files = dict[str, tuple[Path, bytes]]
"""Where the merged files are, and their contents, by the names of their modules."""


class Loader(SourceFileLoader):
    """Compiles the source that was verified: no bytecode, whose checks are time and size."""

    def __init__(self, name: str, path: str, source: bytes, replaces: bool):
        super().__init__(name, path)
        self.source, self.replaces = source, replaces

    def get_data(self, path: str) -> bytes:
        return self.source if path == self.path else super().get_data(path)

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.source, self.path)

    def exec_module(self, module: Any) -> None:
        super().exec_module(module)
        if self.replaces:
            log(logging.INFO, f"vllm-deepstack: {module.__name__} is imported from {self.path}")


class Finder(MetaPathFinder):
    def __init__(self, root: Path, files: Files):
        self.root, self.files = root, files

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.files:
            return None
        file, source = self.files[name]
        replaces = (self.root / f"{name.replace('.', '/')}.py").is_file()
        loader = Loader(name, str(file), source, replaces)
        return spec_from_file_location(name, file, loader=loader)


def install() -> tuple[int, str]:
    """Puts the finder in place, all files or none. Returns what `register` logs: level, text."""
    try:
        if is_off():
            return logging.INFO, f"{OFF}={os.environ[OFF]}: vLLM runs as released"
        root = vllm_root()
        level, text, files = look_up(root)
        if early := sorted(files.keys() & sys.modules.keys()):
            return logging.WARNING, (
                f"{', '.join(early)} was imported before vLLM loaded its plugins, so vLLM runs as "
                f"it is installed; `import {__name__}` earlier, or use `vllm-deepstack apply`"
            )
        if files:
            sys.meta_path.insert(0, Finder(root, files))
        return level, text
    except Exception as error:  # it would end the process, or keep other plugins from loading
        return logging.WARNING, f"{type(error).__name__}: {error}; vLLM runs as it is installed"


def register() -> None:
    """The entry point. vLLM calls it in every process that does not share another's memory."""
    level, text = OUTCOME
    log(level, f"vllm-deepstack {__version__}: {text}")


def log(level: int, text: str) -> None:
    """Logs as vLLM does, or to stderr while vLLM has not set up its log.

    vLLM 0.33.0's `LLM` loads the plugins before that, and INFO would be dropped.
    """
    set_up = logging.getLogger("vllm").level or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0"
    if set_up or logger.isEnabledFor(level):
        logger.log(level, "%s", text)
        return
    least = logging.getLevelName(os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper())
    if not isinstance(least, int) or level >= least:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
        handler.handle(logger.makeRecord(logger.name, level, __file__, 0, text, (), None))


def vllm_root() -> Path:
    """The folder that has vllm/."""
    spec = find_spec("vllm")
    if not spec or not spec.origin:
        raise ImportError("no vLLM is installed")
    return Path(spec.origin).parents[1]


def look_up(root: Path) -> tuple[int, str, Files]:
    """What `register` logs, and what is served."""
    key, problems = fingerprint(root), []
    places: list[Callable[[], Path]] = [vllm_cache, own_folder, new_folder]
    for place in places:
        try:
            folder = place()
            private(folder)
            return load(folder / key) or build(root, folder / key)
        except OSError as error:
            problems.append(str(error))
    raise OSError(f"nowhere to keep the merged files: {'; '.join(problems)}")


def fingerprint(root: Path) -> str:
    """Of all that the merge is made of: this package, and vLLM's own files."""
    ours = sorted(path.relative_to(ROOT) for path in (ROOT / "vllm").rglob("*.py"))
    here = Path(__file__).parent
    folders = (here, here / "merge", here / "patch")
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    files += [ROOT / "requirements" / "releases.json", *(ROOT / path for path in ours)]
    files += [root / "vllm" / "_version.py", root / STATE / "manifest.json"]
    files += [root / path for path in (*map(str, ours), *READ_TOO)]
    hashed = hashlib.sha256(f"{__version__} {root}".encode())
    for file in files:
        data = file.read_bytes() if file.is_file() else b""
        hashed.update(hashlib.sha256(data).digest())
    return hashed.hexdigest()[:32]


def vllm_cache() -> Path:
    return cache_root() / "deepstack"


def own_folder() -> Path:
    import tempfile

    return Path(tempfile.gettempdir()) / f"vllm-deepstack-{os.geteuid()}"


def new_folder() -> Path:
    """For this process alone, where somebody else has the name above."""
    import atexit
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="vllm-deepstack-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def private(folder: Path) -> None:
    """Makes the folder, if it is not there.

    Raises:
        OSError: it cannot be made, or somebody else can write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.geteuid()
        or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise PermissionError(f"{folder}: is not a folder that you alone can write to")


def load(folder: Path) -> tuple[int, str, Files] | None:
    """What a process before this one has built; None if that is not there, or not whole."""
    try:
        found = json.loads((folder / "verdict.json").read_text())
        files = {}
        for path, digest in found["files"].items():
            source = (folder / path).read_bytes()
            if hashlib.sha256(source).hexdigest() != digest:
                return None
            files[path.removesuffix(".py").replace("/", ".")] = folder / path, source
        return logging.WARNING if found["warning"] else logging.INFO, found["text"], files
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def build(root: Path, folder: Path) -> tuple[int, str, Files]:
    """Merges, and puts the result in place at once. Two processes may do so at the same time.

    Raises:
        OSError: the result cannot be kept.
    """
    import shutil
    import tempfile

    from .patch.verdict import verdict

    found = verdict(root)
    if found.warning and not found.files:  # its cause may go away
        return logging.WARNING, found.text, {}
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (made / "new").mkdir(mode=0o700)
        hashes = {path: hashlib.sha256(data).hexdigest() for path, data in found.files.items()}
        for path, data in found.files.items():
            (made / "new" / path).parent.mkdir(parents=True, exist_ok=True)
            (made / "new" / path).write_bytes(data)
        about = {"text": found.text, "warning": found.warning, "files": hashes}
        (made / "new" / "verdict.json").write_text(json.dumps(about, indent=1))
        try:
            os.rename(made / "new", folder)
        except OSError:  # another process was first, or what is there is not whole
            if not load(folder):
                with suppress(FileNotFoundError):
                    os.rename(folder, made / "old")
                os.rename(made / "new", folder)
        built = load(folder)
        if built is None:
            raise OSError(f"{folder}: is not what was written there")
        return built
    finally:
        shutil.rmtree(made, ignore_errors=True)


OUTCOME = install()
# A worker that multiprocessing forks has its parent's modules, and vLLM does not call the plugins
# there again. Other forks are not processes of vLLM's, and must not log.
register_after_fork(register, lambda _: register())
