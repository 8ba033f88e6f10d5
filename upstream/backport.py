"""The backport: what #43617 has brought, and the fix of D2, for those who maintain vLLM 0.22."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import libcst as cst

from vllm_deepstack import releases
from vllm_deepstack.cli import UserError
from vllm_deepstack.merge.merge import RELEASE, merge
from vllm_deepstack.merge.syntax import Statement, leading_lines, statements, with_statements

from .checkout import Commit
from .pulls import LICENSE

MODELS = "vllm/model_executor/models"
MIXIN = f"{MODELS}/deepstack.py"
USERS = (f"{MODELS}/qwen3_vl.py", f"{MODELS}/qwen3_omni_moe_thinker.py")
TEST = "tests/models/multimodal/test_deepstack.py"

CONTRACT = """\
Compiled, Qwen3-VL and Qwen3-Omni's thinker drop DeepStack features: the
decoder is compiled in the profiling run, which stages none and hands it
`None`, and what was compiled keeps to that (#43602). As #43617 has it since
0.23.0, reading now gives the same inputs at every step, zeros where nothing
is staged.

The buffers move to a mixin that both models share, and are registered, so
that `sleep(level=2)` keeps what they hold.
"""
STEP = """\
`forward` clears the buffers in Python, which a replayed full CUDA graph does
not run. An image token that is scheduled alone, as the last chunk of a
chunked prefill, makes a uniform decode batch: its features stay, and every
later decode step adds them to whatever request sits in their row, other
users' requests included.

`embed_input_ids` runs at every step, whatever graph follows: it now begins
with clearing what is left. `prompt_embeds`, which come among the embeddings
and have no levels, are no longer an error beside images, and neither are
prompts of Qwen3-Omni that end in an image, a video or an audio.
"""
TESTS = """\
On the model classes, without weights or a GPU.
"""


def series(release: releases.Release, sources: Path) -> list[Commit]:
    """The mixin, its use, and the tests.

    What the overlay has for a range of releases, or for other models, is left out.
    """
    paths = sorted((releases.ROOT / "vllm").rglob("*.py"))
    overlay = {path.relative_to(releases.ROOT).as_posix(): path.read_bytes() for path in paths}
    overlay = {path: overlay[path] for path in (MIXIN, *USERS)}

    for path in USERS:
        pinned = release.sources[path]
        if releases.sha256((sources / path).read_bytes()) != pinned:
            raise UserError(f"{sources / path}: not as released: delete {sources}")

    def merged(reduced: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
        return {
            path: merge(
                ours,
                (sources / path).read_bytes(),
                path=path,
                release=release.version,
                overlay=overlay,
            )
            for path, ours in reduced
            if path in release.sources
        }

    mixin = {MIXIN: LICENSE + overlay[MIXIN].partition(b"\n")[2]}  # its first line is in LICENSE
    lasting = {path: reduced(ours, methods=True) for path, ours in overlay.items()}
    bases = {path: reduced(ours, methods=False) for path, ours in lasting.items()}
    return [
        Commit(
            "[Bugfix] Give the compiled decoder its DeepStack inputs",
            CONTRACT,
            mixin | merged(bases.items()),
        ),
        Commit("[Bugfix] End DeepStack features with their step", STEP, merged(lasting.items())),
        Commit(
            "[Test] DeepStack features reach their step, and no other",
            TESTS,
            {TEST: (Path(__file__).parent / "0.22.1" / TEST).read_bytes()},
        ),
    ]


def reduced(ours: bytes, methods: bool) -> bytes:
    """An overlay file without what only some releases get; with the bases of its classes alone,
    unless `methods`."""
    module = cst.parse_module(ours)
    body: list[Statement] = []
    for statement in module.body:
        if isinstance(statement, cst.ClassDef):
            members = [s for s in statements(statement.body) if methods and not for_releases(s)]
            if not members and not statement.bases:
                continue
            suite = with_statements(statement.body, members or [ELLIPSIS])
            statement = statement.with_changes(body=suite)
        body.append(statement)
    return module.with_changes(body=body).bytes


ELLIPSIS = cst.SimpleStatementLine([cst.Expr(cst.Ellipsis())])


def for_releases(statement: Statement) -> bool:
    return any(
        line.comment and RELEASE.match(line.comment.value) for line in leading_lines(statement)
    )
