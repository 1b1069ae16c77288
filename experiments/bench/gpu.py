"""The rows of a GPU: the benchmarks of the other files at the sizes of OPT-1.3B and Llama-2-7B, in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from experiments.bench import knot, layer, models, step, tie

#: tokens and width of a layer
LAYERS = ("2048x2048", "1024x4096")
#: q and v of OPT-1.3B and of Llama-2-7B, and the latter's largest layer
WEIGHTS = ("2048x2048", "4096x4096", "11008x4096")


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    for shape in LAYERS:
        name = f"layer/bf16/{shape}"
        yield name, partial(layer.rows, name, "bf16", shape, 0.0)
    for model in models.LARGE:
        for suffix, targets in step.ADAPTED.items():
            name = f"step/{model}{suffix}"
            yield name, partial(step.training, name, model, targets)
    for shape in WEIGHTS:
        name = f"tie/bf16/{shape}"
        yield name, partial(tie.rows, name, "bf16", shape)
    yield "tie/fp32/4096x4096", partial(tie.rows, "tie/fp32/4096x4096", "fp32", "4096x4096")
    for model in models.LARGE:
        yield f"knot/{model}", partial(knot.knots, key=model)
    yield "chain", knot.chain
