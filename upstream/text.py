"""The pull request's description: upstream's own template, filled in."""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.speed import page
from tools import releases
from tools.cli import UserError

from .series import TEST, affected

RESULTS = releases.ROOT / "benchmarks"
ACCURACY = ("geo3k/results/cpu-float32/report.json", "geo3k/results/h200-bfloat16/report.json")
SPEED = "speed/results/h100/0.33.0/serving-qwen3_vl_8b.json"

DROPPED = """\
Compiled Qwen3-VL and Qwen3-Omni drop DeepStack features, and every answer about an image comes
from a crippled model (#43602). This is the change of #43617, without the defect that it
brought: features that outlive their step. It does not touch what #44264 and #43272 fix.
"""
LINGERING = """\
DeepStack features outlive their step where a full CUDA graph replays: one request's image is
added to the decoding of whatever requests sit in its rows later. Follows #43617 (#43602).
"""
CLAIMS = """\
- A step's features are gone at the next step, whatever graphs ran: the buffers are cleared
  where Python runs at every step, in `embed_input_ids`, and not in `forward` alone.
- Reading gives the decoder the same inputs at every step.
- A shorter payload leaves nothing of a longer one; the buffers are registered; dual-batch
  overlap's micro-batches read their own rows.
- `prompt_embeds` beside images work, and no prompt of Qwen3-Omni crashes the engine.
"""
SEEN = """\
Seen on the released 0.25.1 on an H100 in bfloat16: `max_num_batched_tokens=64` and a prompt of
65 tokens that ends in its image, so that the last image token is scheduled alone. Logits (scale
about 3) of that request are 3.9 to 4.6 off eager's from the second token on, and those of the
text request that follows it 1.0 to 3.3.
"""
DETAILS = """\
The image token that is scheduled alone makes a uniform decode batch of the step, which replays
a full CUDA graph. `_clear_deepstack_input_embeds` is Python in `forward`, and does not run; the
buffers keep the payload, and every later replay adds it.

The two models had the buffers twice; a mixin, `DeepStackMixin`, has them now, and the next
DeepStack model need not copy them. Models without a vision tower have no buffers, and are given
`None` as before.
"""
ASSISTED = """\
AI assistance was used. Whoever submits this has to have read every line and run the tests, and
has to look for open pull requests on the same defects first (`gh pr list --repo
vllm-project/vllm --state open --search "deepstack"`).
"""


def text(release: releases.Release, template: str) -> str:
    """The template with its sections filled.

    Raises:
        UserError: the template has a section that is not known here.
    """
    overview = DROPPED if affected(release) else LINGERING
    fail = "Needs no GPU. Without the first two commits some fail, for both models.\n"
    commands = f"```bash\npytest {TEST}\n```\n\n{fail}"
    # The first three are the template's up to 0.31.0, the others that of later releases.
    sections = {
        "Purpose": f"{overview}\n{CLAIMS}\n{DETAILS}\n{ASSISTED}",
        "Test Plan": commands,
        "Test Result": evidence(release),
        "Overview": overview,
        "Claims": CLAIMS,
        "Validation": f"{commands}\n{evidence(release)}",
        "Details": f"{DETAILS}\n{ASSISTED}",
    }
    found = re.findall(r"^## (.+)$", template, re.MULTILINE)
    if not found or not set(found) <= set(sections):
        raise UserError(
            f"vLLM {release.version}: its pull request template has the sections {found}; "
            f"upstream/text.py fills {list(sections)}"
        )
    return re.sub(
        r"^## (.+)\n(?:\s*<!--.*-->\n)?",
        lambda match: f"## {match[1]}\n\n{sections[match[1].strip()]}",
        template,
        flags=re.MULTILINE,
    )


def evidence(release: releases.Release) -> str:
    reports = [json.loads((RESULTS / file).read_text()) for file in ACCURACY]
    speed = json.loads((RESULTS / SPEED).read_text())
    parts = [
        "" if affected(release) else SEEN,
        "Accuracy on 600 questions about diagrams, greedy, of a small Qwen3-VL trained for them. "
        "vLLM 0.22.1 drops the features when it compiles (#43602):\n",
        *map(accuracy, reports),
        f"Speed on vLLM {speed['machine']['versions']['vllm']}, with random weights in "
        "Qwen3-VL-8B's shape. `stock` is the release, `fork` has this change. The engines took "
        "turns; medians, and the ratio to the first with its spread:\n",
        page.serving(speed),
    ]
    return "\n".join(part for part in parts if part)


def accuracy(report: dict[str, Any]) -> str:
    rows = [
        [
            run["run"].partition("@")[0],
            run["software"],
            f"{run['accuracy']:.3f}",
            "–".join(f"{bound:.3f}" for bound in run["interval_95"]),
        ]
        for run in report["runs"]
    ]
    machine, dtype = report["machine"], report["runs"][0]["dtype"]
    where = ", ".join(dict.fromkeys(machine["gpus"])) or f"{machine['cores']} CPU cores"
    table = page.table([f"{where}, {dtype}", "", "accuracy", "95 %"], rows)
    return f"{table}"
