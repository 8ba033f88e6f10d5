"""status, diff, apply, revert."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from importlib import import_module
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import Version

from .. import OFF, PLUGIN, __version__, cli, is_off, releases
from ..cli import UserError
from ..merged import File, Installed, concerning, content, replaced, table
from .models import kind_of
from .status import CLEAN, SCHEMA, UNKNOWN, Status, status
from .tree import OVERLAY, Tree, ours_is_built, overlay_files, public_version

SOURCE = "vllm_deepstack/__init__.py"  # in the distribution
TREE = (
    "a folder that contains vllm/: site-packages, an unpacked wheel or sdist, a checkout "
    "(default: that of the vLLM which this Python imports)"
)
STATUS = """\
Says which of the defects D1 to D21 a vLLM has, by the contents of its files, and how they are
fixed: by the plugin, by `apply`, by a wheel, or not at all. Imports no vLLM and needs no GPU.

exit code: 0 clean, 1 affected, 2 it cannot tell"""
STATUS_EXAMPLES = """\
examples:
  vllm-deepstack status
  vllm-deepstack status /opt/venv/lib/python3.12/site-packages
  vllm-deepstack status --model Qwen/Qwen3-VL-8B-Instruct
  vllm-deepstack status --json | jq .verdict
  vllm-deepstack status --url http://localhost:8000"""
EXAMPLES = """\
examples:
  vllm-deepstack {0}
  vllm-deepstack {0} /opt/venv/lib/python3.12/site-packages"""


def add(verbs: Any) -> None:
    found = cli.add_verb(
        verbs,
        "status",
        "say whether a vLLM is affected, and how it is fixed",
        STATUS,
        STATUS_EXAMPLES,
        failed=UNKNOWN,
        execute=show_status,
    )
    found.add_argument("tree", type=Path, nargs="?", metavar="TREE", help=TREE)
    found.add_argument("--json", action="store_true", help="JSON; docs/schemas/status.json")
    found.add_argument(
        "--url",
        help="a running server instead: it says its version, which only the fork's wheel has "
        "changed; of another it cannot tell",
    )
    found.add_argument(
        "--cache-dir",
        type=Path,
        help="the compilation_config.cache_dir that you serve with, if you do: says whether "
        "compiled graphs from before the fix are in it",
    )
    found.add_argument(
        "--model",
        help="of this model alone: an architecture (Qwen3VLForConditionalGeneration), a folder "
        "with a config.json, or a name on the hub whose config.json is in the cache",
    )
    for name, about, more, execute in (
        (
            "apply",
            "patch a vLLM's files in place",
            "Patches in place: all files, or none if it fails. After a kill, run it again. In an "
            "installation,\nRECORD is kept true. Restart running engines afterwards.",
            apply,
        ),
        ("revert", "take the patch out again", "Puts back the bytes that were there.", revert),
        (
            "diff",
            "print the patch, write nothing",
            "Prints what `apply` would change, as a patch for `git apply`.",
            diff,
        ),
    ):
        verb = cli.add_verb(
            verbs,
            name,
            about,
            f"{more}\n\nexit code: 0, or 1 after an error",
            EXAMPLES.format(name),
            failed=1,
            execute=execute,
        )
        verb.add_argument("tree", type=Path, nargs="?", metavar="TREE", help=TREE)
        verb.add_argument(
            "--overlay",
            type=Path,
            default=OVERLAY,
            help="the folder whose vllm/ is merged (default: the fork's)",
        )
        verb.add_argument(
            "--as",
            dest="release",
            metavar="RELEASE",
            help="merge as for this release of vLLM (default: the one that TREE has most files of)."
            " Files that are from no release are merged with LibCST, and not tested",
        )


def show_status(args: argparse.Namespace) -> int:
    if args.url:
        if args.tree or args.cache_dir or args.model:
            args.parser.error("--url is about a server: name no TREE, --cache-dir or --model")
        return show_server(args)
    root = args.tree or installed()
    kinds = [kind] if args.model and (kind := kind_of(args.model, root)) else None
    if args.model and not kinds:
        none = Status(str(root), str(public_version(root) or "") or None)
        text = f"{args.model}: no DeepStack levels, and none of the classes that have them: clean"
        print(json.dumps(none.json(), indent=1) if args.json else text)
        return CLEAN
    distribution = plugin(args.tree)
    said, served = plugin_says(root, distribution) if distribution else (None, {})
    since = None
    if distribution and served:
        source = Path(str(distribution.locate_file(SOURCE)))
        since = source.stat().st_ctime if source.is_file() else None
    found = status(root, args.cache_dir, served, since, kinds)
    found.plugin = said
    found.hints = hints(root, found.unknown)
    print(json.dumps(found.json(), indent=1) if args.json else found.text())
    return found.code


def hints(root: Path, models: Iterable[str]) -> list[str]:
    """What the lint finds in the files of models of which it cannot be told."""
    from ..lint.verb import RULES, lint

    paths = {path for model in models for path in concerning(model)}
    files = [root / path for path in sorted(paths) if (root / path).is_file()]
    if not files:
        return []
    with cli.uncollected():
        try:
            found, _ = lint(files, root, list(RULES))
        except UserError as error:
            return [str(error)]
    return [f"{one.code} in {one.file}:{one.line}: {one.message}" for one in found]


def plugin(tree: Path | None) -> Distribution | None:
    """The distribution whose plugin a vLLM would load: from `tree`, or this Python's.

    As `importlib.metadata.entry_points`: of two distributions of a name, the first that is found.
    """
    seen = set()
    for distribution in distributions(path=[str(tree)]) if tree else distributions():
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if name == "vllm-deepstack" and name not in seen:
            for entry in distribution.entry_points:
                if entry.group == "vllm.general_plugins" and entry.name == PLUGIN:
                    return distribution
        seen.add(name)
    return None


def plugin_says(root: Path, distribution: Distribution) -> tuple[str, dict[str, File]]:
    """What it does with a vLLM, and the files that it replaces, by their paths."""
    name = f"vllm-deepstack {distribution.version}"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"{name} does not run: VLLM_PLUGINS={allowed} leaves {PLUGIN} out", {}
    if is_off():
        return f"{name} does not run: {OFF}={os.environ[OFF]}", {}
    if distribution.version != __version__:
        return f"{name} is there; this is {__version__}, and cannot tell what it does", {}
    installed = Installed(root)
    files = [file for path in table().files if (file := installed.replacement(path))]
    fixed = [model for model in table().kinds if any(model in file.fixes for file in files)]
    texts = [f"fixes {', '.join(fixed)}" if fixed else "has nothing to fix"]
    texts += [f"{root / path} {why}" for path, why in installed.unknown.items()]
    return f"{name}: {'; '.join(texts)}", {file.path: file for file in files}


def show_server(args: argparse.Namespace) -> int:
    url = f"{args.url.rstrip('/')}/version"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {args.url}: begins with neither http:// nor https://")
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            version = json.load(response)["version"]
        version = Version(version)
    except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
        raise UserError(f"{url}: no answer from a vLLM server: {error}") from None
    match = re.match(r"deepstack\.(\d+)", version.local or "")
    fork = match is not None and int(match[1]) >= int(__version__)
    told = {"schema": SCHEMA, "url": args.url, "version": str(version)}
    told |= {"fix": "wheel" if fork else None, "verdict": "clean" if fork else "unknown"}
    if args.json:
        print(json.dumps(told, indent=1))
    elif fork:
        print(f"vLLM {version} at {args.url}: a `vllm` wheel that has the fixes\nclean")
    else:
        print(
            f"vLLM {version} at {args.url}\ncannot tell: a server does not say how its models were "
            "loaded. With the plugin, each\nprocess that runs a model logs a line that ends in\n"
            "`has the DeepStack fixes (…)`"
        )
    return 0 if fork else UNKNOWN


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[Tree, str]]:
    """The tree, and what to call it. Root works as the owner of another user's tree: whatever they
    put in the way, also while it works, it reads and writes no more than they can."""
    root = args.tree or installed()
    if not hasattr(os, "geteuid"):
        raise UserError(
            "vLLM's files are not patched on Windows: use the plugin, which works there"
        )
    overlay = overlay_files(args.overlay)  # which that user may not be able to read
    with owner_of(root):
        tree = Tree(root, overlay, args.release)
        yield tree, f"vLLM {tree.release.version} in {tree.root}"


@contextmanager
def owner_of(root: Path) -> Iterator[None]:
    found = root.stat() if root.exists() else None
    if found is None or os.geteuid() != 0 or found.st_uid == 0:
        yield
        return
    releases.releases()
    if ours_is_built():
        for _, file in replaced():
            content(file)
    with suppress(ImportError):
        import_module("libcst.native")  # which a parser imports when it is first called
    group, groups = os.getegid(), os.getgroups()
    try:
        os.setgroups([])
        os.setegid(found.st_gid)
        os.seteuid(found.st_uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def diff(args: argparse.Namespace) -> int:
    with opened(args) as (tree, _):
        for change in tree.changes():
            sys.stdout.writelines(change.diff())
    warn(tree)
    return 0


def warn(tree: Tree) -> None:
    for path in tree.untested:
        text = f"from no release: merged as of vLLM {tree.release.version}, and not tested"
        print(f"warning: {tree.root / path}: {text}", file=sys.stderr)


def apply(args: argparse.Namespace) -> int:
    with opened(args) as (tree, name):
        changes = tree.apply()
    for change in changes:
        print(f"{'added' if change.before is None else 'merged'} {change.path}")
    warn(tree)
    print(f"{name}: the overlay is applied" if changes else f"{name}: nothing to change")
    return 0


def revert(args: argparse.Namespace) -> int:
    with opened(args) as (tree, name):
        paths = tree.revert()
    for path in paths:
        print(f"restored {path}")
    print(f"{name}: as it was before the overlay")
    return 0


def installed() -> Path:
    """The folder of the vLLM that this Python would import."""
    spec = find_spec("vllm")
    if not spec or not spec.origin:
        raise UserError("no vLLM is installed for this Python: name a folder that contains vllm/")
    return Path(spec.origin).parents[1]
