"""Tables that the paper does not have, on a real model of a size that a CPU carries, next to the paper's scores.

``prompting`` scores a model on all eleven tasks without training, next to the paper's Llama-2 scores: a check of
prompts and scoring. ``low-resource`` is the setting of Table 6 with the methods that a user chooses among; rates are
searched by factors of two around a start, with the same rule for every line.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from experiments import tasks
from experiments.methods import Method
from experiments.paper.tables import Line, PaperTable

_RECIPE = Method("cola", ranks=(16,), links=60, knots="progress", init="selector", train="B", reset="transport")
"""The links of `docs/how-to/choose.md`, at the bytes of a LoRA of rank 8; knots by progress, as runs are short."""


def _low(label: str, method: Method, middle: float, printed: str = "", *, reference: bool = True) -> Line:
    """A line whose rates are `middle` times powers of two, of which three are tried first."""
    rates = tuple(middle * 2.0**power for power in range(-3, 4))
    return Line(label, method, rates, "LoRA" if reference else None, train=100, printed=printed, start=rates[2:5])


PROMPTING = PaperTable(
    2,
    (Line("0-shot", Method("zero-shot")), Line("ICL", Method("icl"), reference="0-shot")),
    name="prompting",
    title="Zero-shot and in-context scores without training",
    columns=tuple(tasks.key(name) for name in tasks.TASKS),
)

LOW_RESOURCE = PaperTable(
    6,
    (
        _low("LoRA", Method.lora(), 4e-4, "LoRA, 100 samples", reference=False),
        _low("COLA, 2 links", Method.cola(2), 4e-4),
        _low("COLA, 3 links", Method.cola(3), 4e-4, "COLA, 100 samples"),
        _low("B alone, selected inputs", _RECIPE, 2e-3),
        _low("full fine-tuning", Method("finetune"), 2e-5),
    ),
    name="low-resource",
    title="100 training examples",
    columns=("sst2", "copa", "wsc", "wic", "cb", "rte"),
)

OWN_TABLES: Mapping[str, PaperTable] = MappingProxyType({table.name: table for table in (PROMPTING, LOW_RESOURCE)})
"""Name -> table."""
