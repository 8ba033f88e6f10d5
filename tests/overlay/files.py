"""Writes requirements/files.json, from the code of all releases: what replaces each file, and what
that fixes by the rules of `defects`.

    python -m tests.overlay.files
    python -m tests.overlay.files --earlier 1=COMMIT 2=COMMIT   # earlier versions' files, too
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from packaging.version import Version

from vllm_deepstack import cli, package_index, releases
from vllm_deepstack.cli import UserError
from vllm_deepstack.merge.merge import merge_all
from vllm_deepstack.merged import NONE, TABLE, module_of, path_of, sha256
from vllm_deepstack.package_index import RUNNERS
from vllm_deepstack.patch.tree import MIXIN, OVERLAY, overlay_files

from .defects import DEFECTS, KINDS, Code, Model

LEVELS = dict.fromkeys(
    ("Qwen3-VL", "Qwen3-VL-MoE", "Qwen3-Omni", "Cohere Compass", "Transformers backend"),
    "deepstack_visual_indexes",
)
Found = dict[str, dict[str, dict[str, Any]]]


def files(roots: Mapping[Version, Path]) -> Found:
    """By path and sha256 of the original.

    Raises:
        UserError: releases that have the same file need it to be changed differently.
    """
    overlay = overlay_files(OVERLAY)
    found: Found = {path: {} for path in overlay}
    having: dict[tuple[str, str], list[Version]] = {}
    for version, root in roots.items():
        upstream = {p: (root / p).read_bytes() for p in overlay if (root / p).is_file()}
        made = merge_all(overlay, upstream, version)
        merged = {path: data for path, data in made.items() if data != upstream.get(path)}
        for path, text in merged.items():
            compile(text, path, "exec")
        judged = Judged(root, merged)
        for path in overlay:
            if path not in upstream and path not in merged:
                continue
            sha = releases.sha256(upstream[path]) if path in upstream else NONE
            digest = releases.sha256(merged[path]) if path in merged else None
            having.setdefault((path, sha), []).append(version)
            entry = {"release": str(version), "merged": digest, **judged.about(path)}
            before = found[path].setdefault(sha, entry)
            if before["merged"] != digest:
                raise UserError(
                    f"{path} is the same in vLLM {before['release']} and {version}, but the "
                    "overlay changes it differently"
                )
    for (path, sha), versions in having.items():  # in all of them, or it is none of the file's
        fixes = found[path][sha].get("fixes", {})
        for model, names in [*fixes.items()]:
            released = {name: DEFECTS[name].models[model][1] for name in names}
            fixes[model] = [n for n in names if all(map(released[n].contains, versions))]
            if not fixes[model]:
                del fixes[model]
    return found


class Judged:
    """A release before and after a merge, by the rules."""

    def __init__(self, root: Path, merged: Mapping[str, bytes]):
        self.code, self.merged = Code(root), merged
        self.before = present(self.code)
        whole = Code(root, merged)
        self.left: dict[str, dict[str, list[str]]] = {}
        for model, defects in present(whole).items():
            # What a class inherits is the matter of the class that others inherit from.
            kind = KINDS[model]
            lineage = {path for path, _ in whole.lineage(kind.file, kind.name)} - {MIXIN, kind.file}
            base = next(iter(sorted(lineage & merged.keys())), kind.file)
            if defects:
                self.left.setdefault(base, {})[model] = defects

    def about(self, path: str) -> dict[str, Any]:
        """What a merged file fixes and leaves, and what it imports that its original does not."""
        if path not in self.merged:
            return {}
        original = self.code.root / path
        more = imports(path, self.merged[path])
        if original.is_file():
            more -= imports(path, original.read_bytes())
        needs, names = set(), dict[str, set[str]]()
        for module, name in more:
            other = path_of(module)
            if other in self.merged:
                needs.add(other)
            elif module.startswith("vllm."):
                names.setdefault(module, set()).add(name)
        served = {p: self.merged[p] for p in {path, *closure(needs, self.merged)}}
        after = present(Code(self.code.root, served))
        fixes = {
            model: [d for d in of if d not in after[model]] for model, of in self.before.items()
        }
        entry: dict[str, Any] = {
            "fixes": {model: of for model, of in fixes.items() if of},
            "left": self.left.get(path),
            "needs": sorted(needs),
            "names": {module: sorted(of) for module, of in sorted(names.items())},
        }
        return {key: value for key, value in entry.items() if value}


def closure(paths: set[str], merged: Mapping[str, bytes]) -> set[str]:
    more = {path_of(module) for path in paths for module, _ in imports(path, merged[path])}
    more = (more & merged.keys()) | paths
    return more if more == paths else closure(more, merged)


def imports(path: str, data: bytes) -> set[tuple[str, str]]:
    """Module and name."""
    package = module_of(path).rpartition(".")[0]
    return {
        (resolve_name("." * node.level + (node.module or ""), package), alias.name)
        for node in ast.parse(data).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def present(code: Code) -> dict[str, list[str]]:
    """By model. Not what no engine reaches."""
    models = {name: Model(code, kind) for name, kind in KINDS.items() if code.has(kind.file)}
    return {
        name: [
            defect
            for defect, of in DEFECTS.items()
            if not of.latent and name in of.models and of.models[name][0](model)
        ]
        for name, model in models.items()
    }


def runners(roots: Mapping[Version, Path]) -> dict[str, dict[str, str]]:
    """The first release that has it, by path and sha256."""
    found: dict[str, dict[str, str]] = {path: {} for path in RUNNERS}
    for version, root in roots.items():
        for path, of in found.items():
            of.setdefault(sha256(root / path), str(version))
    return found


def earlier(versions: Mapping[str, str], roots: Mapping[Version, Path]) -> Found:
    """By path and sha256 of what versions of vllm-deepstack, by their commits, have merged."""
    found: Found = {}
    apply = "import sys, pathlib; from tools.overlay.tree import Tree; "
    apply += "Tree(pathlib.Path(sys.argv[1])).apply()"
    for number, commit in versions.items():
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder) / "clone"
            git = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet"]
            subprocess.run([*git, str(releases.ROOT), str(clone)], check=True)
            subprocess.run(["git", "checkout", "--quiet", commit], cwd=clone, check=True)
            for version, root in roots.items():
                tree = Path(shutil.copytree(root, Path(folder) / str(version)))
                command = [sys.executable, "-c", apply, str(tree)]
                if subprocess.run(command, cwd=clone, capture_output=True).returncode:
                    continue  # of a release that this version did not know
                made = {p.relative_to(tree).as_posix(): p for p in tree.glob("vllm/**/*.py")}
                merged = {
                    path: file.read_bytes()
                    for path, file in made.items()
                    if sha256(file) != sha256(root / path)
                }
                judged = Judged(root, merged)
                for path, data in merged.items():
                    entry = {"release": str(version), "version": number, **judged.about(path)}
                    entry.pop("needs", None)
                    entry.pop("names", None)
                    found.setdefault(path, {}).setdefault(releases.sha256(data), entry)
                print(f"vllm-deepstack {number}: vLLM {version}")
    return found


def text(roots: Mapping[Version, Path], earlier: Found) -> str:
    """What the versions before this have merged is as `earlier` has it."""
    with cli.uncollected():
        whole = {
            "kinds": {name: [module_of(kind.file), kind.name] for name, kind in KINDS.items()},
            "levels": LEVELS,
            "defects": {name: of.title for name, of in DEFECTS.items() if not of.latent},
            "instead": {name: of.instead for name, of in DEFECTS.items() if of.instead},
            "runners": runners(roots),
            "files": files(roots),
            "earlier": earlier,
        }
    return json.dumps(whole, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--earlier", nargs="+", default=[], metavar="VERSION=COMMIT")
    given = dict(each.split("=") for each in parser.parse_args().earlier)
    roots = {}
    for version, release in releases.releases().items():
        roots[version] = releases.ROOT / "build" / "sources" / str(version)
        package_index.fetch_sources(release, roots[version])
        print(f"vLLM {version}")
    old = earlier(given, roots) if given else json.loads(TABLE.read_text())["earlier"]
    TABLE.write_text(text(roots, old))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, failed=1))
