"""Writes requirements/files.json, from the code of all releases: what replaces each file, and what
that fixes by the rules of `defects`.

    python -m tests.overlay.files
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from packaging.version import Version

from vllm_deepstack import cli, package_index, releases
from vllm_deepstack.cli import UserError
from vllm_deepstack.merge.merge import merge_all
from vllm_deepstack.merged import NONE, TABLE, module_of
from vllm_deepstack.patch.defects import DEFECTS, KINDS, Code, Model
from vllm_deepstack.patch.tree import OVERLAY, overlay_files

BACKEND = "Transformers backend"
LEVELS = dict.fromkeys(
    ("Qwen3-VL", "Qwen3-VL-MoE", "Qwen3-Omni", "Cohere Compass", BACKEND),
    "deepstack_visual_indexes",
)


def files(roots: Mapping[Version, Path]) -> dict[str, dict[str, Any]]:
    """By path and sha256 of the original.

    Raises:
        UserError: releases that have the same file need it to be changed differently.
    """
    overlay = overlay_files(OVERLAY)
    found: dict[str, dict[str, Any]] = {path: {} for path in overlay}
    having: dict[tuple[str, str], list[Version]] = {}
    for version, root in roots.items():
        upstream = {p: (root / p).read_bytes() for p in overlay if (root / p).is_file()}
        made = merge_all(overlay, upstream, version)
        merged = {path: data for path, data in made.items() if data != upstream.get(path)}
        for path, text in merged.items():
            compile(text, path, "exec")
        code = Code(root)
        before = present(code)
        for path in overlay:
            if path not in upstream and path not in merged:
                continue
            sha = releases.sha256(upstream[path]) if path in upstream else NONE
            digest = releases.sha256(merged[path]) if path in merged else None
            having.setdefault((path, sha), []).append(version)
            if sha in found[path]:
                if found[path][sha]["merged"] != digest:
                    raise UserError(
                        f"{path} is the same in vLLM {found[path][sha]['release']} and "
                        f"{version}, but the overlay changes it differently"
                    )
                continue
            found[path][sha] = {"release": str(version), "merged": digest}
            if digest:
                found[path][sha] |= about(path, upstream.get(path, b""), merged, code, before)
    for (path, sha), versions in having.items():  # in all of them, or it is none of the file's
        fixes = found[path][sha].get("fixes", {})
        for model, names in [*fixes.items()]:
            released = {name: DEFECTS[name].models[model][1] for name in names}
            fixes[model] = [n for n in names if all(map(released[n].contains, versions))]
            if not fixes[model]:
                del fixes[model]
    return found


def about(
    path: str,
    original: bytes,
    merged: Mapping[str, bytes],
    code: Code,
    before: Mapping[str, list[str]],
) -> dict[str, Any]:
    """What a merged file fixes and leaves, of the defects that a release has `before`, and what it
    imports that its original does not."""
    needs, names = set(), dict[str, set[str]]()
    for module, name in imports(path, merged[path]) - imports(path, original):
        other = f"{module.replace('.', '/')}.py"
        if other in merged:
            needs.add(other)
        elif module.startswith("vllm."):
            names.setdefault(module, set()).add(name)
    served = {other: merged[other] for other in {path, *closure(needs, merged)}}
    after = present(Code(code.root, served))
    fixes = {model: [d for d in of if d not in after[model]] for model, of in before.items()}
    entry: dict[str, Any] = {"fixes": {model: of for model, of in fixes.items() if of}}
    if path == KINDS[BACKEND].file and "D16" in after[BACKEND]:
        entry["left"] = {BACKEND: ["D16"]}
    entry |= {"needs": sorted(needs), "names": {m: sorted(n) for m, n in sorted(names.items())}}
    return {key: value for key, value in entry.items() if value}


def closure(paths: set[str], merged: Mapping[str, bytes]) -> set[str]:
    more = {
        f"{module.replace('.', '/')}.py"
        for path in paths
        for module, _ in imports(path, merged[path])
    }
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


def text(roots: Mapping[Version, Path]) -> str:
    kinds = {name: [module_of(kind.file), kind.name] for name, kind in KINDS.items()}
    with cli.uncollected():
        whole = {"kinds": kinds, "levels": LEVELS, "files": files(roots)}
    return json.dumps(whole, indent=1) + "\n"


def main() -> int:
    roots = {}
    for version, release in releases.releases().items():
        roots[version] = releases.ROOT / "build" / "sources" / str(version)
        package_index.fetch_sources(release, roots[version])
        print(f"vLLM {version}")
    TABLE.write_text(text(roots))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, failed=1))
