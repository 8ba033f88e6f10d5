"""The plugin: vLLM imports the merged files in place of its own; its installation stays as it is.

vLLM imports the modules of all `vllm.general_plugins` in every process, before it calls the first
of them. Importing this module puts the finder in place: `register`, which vLLM calls then, would be
too late, since a plugin that vLLM called before it may have imported a model already.

An installed file is known by its sha256. What replaces it lies beside this module, and is a real
file, since tracebacks and vLLM's compile cache read it. Nothing is written.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from weakref import WeakSet

from . import OFF, REQUIRE, __version__, is_off, is_on
from .merged import FOLDER, Installed, concerning, lacking, module_of, sha256, table, why_unknown

# What the fork leaves in some releases, whichever options they are served with.
ALWAYS = {"D16"}
logger = logging.getLogger("vllm.deepstack")  # below `vllm`, for which vLLM sets up handlers


class Loader(SourceFileLoader):
    def set_data(self, path: str, data: Any, *, _mode: int = 0) -> None:
        """Writes no bytecode: the folder may be another user's, or read-only."""


class Finder(MetaPathFinder):
    def __init__(self, installed: Installed):
        self.installed = installed
        self.paths = {module_of(path): path for path in table().files}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        own = self.paths.get(name)
        folder = str((self.installed.root / own).parent) if own else ""
        if not own or (path and folder not in map(os.path.abspath, path)):
            return None
        if not (file := self.installed.replacement(own)):
            return None
        return spec_from_file_location(name, file.place, loader=Loader(name, str(file.place)))


class Watch:
    """Sees every model of the table that is built, by PyTorch's hook for modules that get a part:
    its own Python runs then, whether the plugin, a patch or nobody has fixed it."""

    def __init__(self, installed: Installed):
        self.installed = installed
        self.models = {of: model for model, of in table().kinds.items()}
        self.kinds: dict[type, str | None] = {}
        self.seen: WeakSet[Any] = WeakSet()

    def __call__(self, module: Any, name: str, part: Any) -> None:
        try:
            problem = self.look(module)
        except Exception as error:  # no reason for a model not to be built
            problem = f"{type(module).__name__}: whether it is fixed cannot be told: {error!r}"
        if problem and is_on(REQUIRE):
            raise RuntimeError(f"{REQUIRE}={os.environ[REQUIRE]}: {problem}")
        if problem:
            log(logging.WARNING, problem)

    def look(self, module: Any) -> str | None:
        """At a module that gets a part. Returns what is wrong with it."""
        cls = type(module)
        if cls not in self.kinds:
            named = ((c.__module__, c.__name__) for c in cls.__mro__)
            self.kinds[cls] = next((self.models[n] for n in named if n in self.models), None)
        model = self.kinds[cls]
        if model is None or module in self.seen:
            return None
        self.seen.add(module)
        fixed, problems = self.judge(model) if has_levels(module, model) else ([], [])
        if problems:
            return f"{cls.__name__} is built without the DeepStack fixes: {'; '.join(problems)}"
        if fixed:
            log(logging.INFO, f"{cls.__name__} has the DeepStack fixes ({', '.join(fixed)})")
        return None

    def judge(self, model: str) -> tuple[list[str], list[str]]:
        """The defects that are fixed, and why some are not."""
        fixed: dict[str, None] = {}
        problems = []
        for path in concerning(model):
            if not (module := sys.modules.get(module_of(path))):
                continue
            place = Path(str(module.__file__))
            digest, file = sha256(place), self.installed.looked_up.get(path)
            if not file or place != file.place:
                file = table().merged.get(digest)
            root = self.installed.root
            if file and place != file.place and (missing := lacking(root, file)):
                problems.append(f"{place} needs {missing[0]}, which is not as it was merged")
            elif file:
                fixed |= dict.fromkeys(file.fixes.get(model, ()))
                if left := [d for d in file.left.get(model, ()) if d in ALWAYS]:
                    problems.append(f"{place} leaves {', '.join(left)} as it is released")
            elif known := table().files[path].get(digest):
                if left := known.fixes.get(model, []):
                    why = self.installed.unknown.get(path, "was imported before the plugin")
                    problems.append(f"{place} {why} ({', '.join(left)})")
            else:
                problems.append(f"{place} {why_unknown(self.installed.root, place)}")
        return sorted(fixed, key=lambda name: int(name[1:])), problems


def has_levels(module: Any, model: str) -> bool:
    """Of a model whose defects are a matter of levels, as far as its configuration is set yet."""
    levels, config = table().levels.get(model), getattr(module, "config", None)
    vision = getattr(config, "vision_config", None)
    return not levels or config is None or bool(getattr(vision, levels, None))


def install() -> tuple[int, str] | None:
    """Puts the finder in place. Returns what `register` logs, if anything: level, text."""
    try:
        if is_off():
            return logging.INFO, f"{OFF}={os.environ[OFF]}: vLLM runs as it is installed"
        if not FOLDER.is_dir():
            raise FileNotFoundError(f"{FOLDER}: no merged files; `make plugin` makes them")
        from torch.nn.modules.module import register_module_module_registration_hook

        installed = Installed(vllm_root().absolute())
        register_module_module_registration_hook(Watch(installed))
        sys.meta_path.insert(0, Finder(installed))
        return None
    except Exception as error:  # it would end the process, or keep other plugins from loading
        return logging.WARNING, f"{type(error).__name__}: {error}; vLLM runs as it is installed"


def register() -> None:
    """The entry point. vLLM calls it in every process that does not share another's memory."""
    if not OUTCOME:
        return
    level, text = OUTCOME
    if level == logging.WARNING and is_on(REQUIRE):
        raise RuntimeError(f"{REQUIRE}={os.environ[REQUIRE]}: {text}")
    log(level, text)


def log(level: int, text: str) -> None:
    """Logs as vLLM does, or to stderr while vLLM has not set up its log.

    vLLM 0.33.0's `LLM` loads the plugins before that, and INFO would be dropped.
    """
    text = f"vllm-deepstack {__version__}: {text}"
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


OUTCOME = install()
