"""The page docs/models.md, written from the measured outcomes in measured.json."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MEASURED, PAGE = Path(__file__).parent / "measured.json", ROOT / "docs" / "models.md"

#: columns of the table: title, and the outcome that it counts
COLUMNS = {
    "default": "default",
    "PEFT export": "default export",
    "all-linear": "all-linear",
    "PEFT export of all-linear": "all-linear export",
    "all": "all",
}

#: what refusals say, and how the page puts it
REASONS = {
    "none that is known by name": "no query and value projections that are known by name",
    "are one tensor": "the projections are shared between layers",
    "which training has moved": "training moves running statistics, which an adapter in PEFT's format cannot hold",
    "under another name": "PEFT loads some layers of this model under other names, its own adapters' too",
    "PEFT refuses adapters on layer": "PEFT refuses adapters on layers whose weights the kernels read",
    "as well, and PEFT would change it at one place": "PEFT would change a shared module at one place alone",
    "an empty chain": "no gradient came to the adapted layers",
    "reads the weight without calling": "its forward reads the weights without calling the layers",
    "no linear layer that can carry": "it has no linear layer that can carry a link",
}

INTRODUCTION = """# Models

`python -m tests.breadth` writes this page, and `make test-long` measures it again. With random weights in tiny sizes,
transformers {transformers} and PEFT {peft}, {tried} of {all} architectures were tried: two links with a knot between
them, on inputs of the right kind, for the default targets, for `target_modules="all-linear"` and for `"all"`. An
architecture **holds** if

- the output before and after each tie agrees to fp32 rounding,
- `finish()` restores the classes and state-dict keys, and the saved state dict loads to equal values,
- `Chain.apply` on the untouched base gives the same weights bit for bit,
- for the export, the adapter of `Chain.to_peft` agrees within 1e-4 when PEFT loads it on the untouched base.

Everything else is refused with a reason: a model before training, an export before it writes anything.

"""

KINDS = """## Layers with code of their own

These read their weight in their own code, and `"all"` puts links on them; experts as transformers computes them by
default. An architecture may have several kinds.

| kind of layer | architectures | hold |
|---|---|---|
"""


def load() -> dict[str, Any]:
    """The measured outcomes."""
    return json.loads(MEASURED.read_text())


def save(found: dict[str, Any]) -> None:
    """Store outcomes, one architecture a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(one, ensure_ascii=False)}" for name, one in found["models"].items()]
    head = ",\n".join(f"  {json.dumps(key)}: {json.dumps(found[key])}" for key in ("transformers", "peft"))
    MEASURED.write_text("{\n" + head + ',\n  "models": {\n' + ",\n".join(f"  {line}" for line in lines) + "\n  }\n}\n")


def short(outcome: str) -> str:
    """An outcome as it is stored: a refusal by the reason's kind, with no names of the model's."""
    if not outcome.startswith("refused"):
        return outcome
    known = next((text for part, text in REASONS.items() if part in outcome), None)
    return f"refused: {known or re.sub(r'[0-9]+', '*', outcome.removeprefix('refused: '))[:120]}"


def render(found: dict[str, Any]) -> str:
    """The page."""
    models = found["models"]
    tried = {name: one for name, one in models.items() if "skipped" not in one}
    text = INTRODUCTION.format(**{k: found[k] for k in ("transformers", "peft")}, tried=len(tried), all=len(models))
    text += f"| kind | tried | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}\n"
    kinds = list(dict.fromkeys(one["kind"] for one in models.values()))
    for kind in [*kinds, None]:
        mine = [one for one in tried.values() if kind in (None, one["kind"])]
        cells = [str(sum(one[key] == "holds" for one in mine)) for key in COLUMNS.values()]
        text += f"| {kind or '**all**'} | {len(mine)} | {' | '.join(cells)} |\n"
    text += f"\n{KINDS}"
    for kind in dict.fromkeys(kind for one in tried.values() for kind in one["kinds"].split(", ") if kind):
        mine = [one for one in tried.values() if kind in one["kinds"].split(", ")]
        text += f"| {kind} | {len(mine)} | {sum(one['all'] == 'holds' for one in mine)} |\n"
    text += "\n## Refused\n\n"
    for title, key in COLUMNS.items():
        reasons = defaultdict(list)
        for name, one in tried.items():
            if one[key].startswith("refused"):
                reasons[one[key].removeprefix("refused: ")].append(name)
        text += "".join(f"- {title}, {reason}: {', '.join(names)}.\n" for reason, names in reasons.items())
    text += "\n## Holds, with the default or all-linear targets\n\n"
    for kind in kinds:
        names = [
            n for n, one in tried.items() if one["kind"] == kind and "holds" in (one["default"], one["all-linear"])
        ]
        text += f"- {kind}: {', '.join(names)}.\n"
    text += "\n## Not tried\n\nThese need extra work to be made tiny, or to be given inputs.\n\n"
    text += f"{', '.join(name for name in models if name not in tried)}.\n"
    return text
