"""The cost of a method on a real language model: time per step and per knot, peak memory, bytes of trained state.

All methods make the paper's training step: batches of 8, rank 8 on query and value, AdamW in fp32. Times are taken
interleaved in one process. The peak of memory is taken over two steps, a knot and two steps more: of resident memory in
a process of its own per method, or of the memory that torch has allocated on a GPU.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments import models as language_models
from experiments.bench import models
from experiments.bench.measure import Row, Settings, Spread, Work, medians, race, ratio
from experiments.bench.step import start_alike
from experiments.memory import peak_memory, trained_bytes
from experiments.methods import QUERY_AND_VALUE, Method

MODEL = "smollm2"
SEQUENCES, TOKENS, RANK, LR = 8, 40, 8, 1e-4
KNOTS = 5
"""Knots that are timed, before the steps."""


class Ours:
    """A model that a method of this repository trains."""

    def __init__(self, method: Method, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer: Any = method.optimizer(
            model, lr=LR, seed=0, epochs=1, steps_per_epoch=1000, targets=QUERY_AND_VALUE
        )

    def tie(self) -> None:
        """Tie a knot, if the method has knots."""


class Chain(Ours):
    """A chain whose knots are tied by hand."""

    def tie(self) -> None:
        """Merge the link and begin the next."""
        self.optimizer.tie()


class Peft:
    """LoRA of PEFT with AdamW; a knot is a merge, new adapters and a new optimizer."""

    def __init__(self, model: Any) -> None:
        self.begin(model)

    def begin(self, model: Any) -> None:
        """Begin a link."""
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=list(QUERY_AND_VALUE))
        self.model: Any = peft.get_peft_model(model, config).train()
        self.optimizer: Any = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0
        )

    def tie(self) -> None:
        """Merge the adapters and begin the next link."""
        self.begin(self.model.merge_and_unload())


#: name -> (in words, how it begins on a model)
METHODS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "peft": ("LoRA of PEFT", Peft),
    "lora": ("LoRA of this library", lambda model: Ours(Method.lora(RANK), model)),
    "cola": ("chain, knots tied before", lambda model: Chain(Method.lora(RANK), model)),
    "finetune": ("full fine-tuning", lambda model: Ours(Method("finetune"), model)),
    "galore": ("GaLore", lambda model: Ours(Method("galore", ranks=(RANK,)), model)),
}


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of the group."""
    yield "cost", rows


def rows(settings: Settings) -> Iterator[Row]:
    """Per method the time of a step and the peak of memory, to those of PEFT's LoRA; the time of a knot."""
    name = settings.model or ("tiny" if settings.smoke else MODEL)
    try:
        model = load(name, settings)
    except (ModuleNotFoundError, OSError) as error:
        if settings.model:
            raise
        warnings.warn(f"cost is left out, as {name} is not to be had: {error}", stacklevel=2)
        return
    chosen = [method for method in METHODS if method != "galore" or importlib.util.find_spec("galore_torch")]
    if "galore" not in chosen:
        warnings.warn("cost/*/galore is left out: it needs galore-torch", stacklevel=2)
    ids = batch(model, settings)
    steps, knot = times(model, ids, chosen, settings)
    del model, ids
    yield from steps.values()
    yield knot
    peaks: dict[str, dict[str, float]] = {}
    for method in chosen:  # PEFT's first
        peaks[method] = alone(method, name, settings)
        own = method in ("lora", "cola")  # equal, but for the pages that the heap keeps
        yield Row(
            f"cost/memory/{method}", f"peak memory, {METHODS[method][0]}: to that of PEFT's LoRA",
            Spread.of([peaks[method]["peak_bytes"] / peaks["peft"]["peak_bytes"]]), 1.01 if own else None,
            details=peaks[method],
        )  # fmt: skip


def load(name: str, settings: Settings) -> Any:
    """The model in fp32, in memory of its own: without the file under it, which would count as resident."""
    model = language_models.load(name, device=settings.device)[0]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def batch(model: Any, settings: Settings) -> Tensor:
    """A batch of the paper's size."""
    return models.batch(model, SEQUENCES, TOKENS, settings.generator()).to(settings.device)


def take(trained: Any, ids: Tensor) -> Tensor:
    """One training step; returns the loss."""
    loss = trained.model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    return loss


def times(model: Any, ids: Tensor, chosen: list[str], settings: Settings) -> tuple[dict[str, Row], Row]:
    """A row per method with the time of its step, interleaved, and a row with that of a knot."""
    trained = {method: METHODS[method][1](copy.deepcopy(model)) for method in chosen}
    start_alike(trained["peft"].model, trained["lora"].model)
    pairs = [(take(trained["lora"], ids).item(), take(trained["peft"], ids).item()) for _ in range(3)]
    right = all(abs(a - b) <= 1e-3 * abs(b) for a, b in pairs)  # both train, so three steps must agree
    knots: dict[str, list[float]] = {"cola": [], "peft": []}
    for _ in range(KNOTS):
        for method, taken in knots.items():
            take(trained[method], ids)
            started = settings.now()
            trained[method].tie()
            taken.append(settings.now() - started)
    work: dict[str, Work] = {method: partial(take, trained[method], ids) for method in chosen}
    found = race(work, settings)
    milliseconds = medians(found)
    steps = {
        method: Row(
            f"cost/step/{method}", f"training step of {SEQUENCES}×{TOKENS} tokens, {METHODS[method][0]}: time to that "
            "of PEFT's LoRA", ratio(found, method, "peft"), 1.0 if method in ("lora", "cola") else None,
            right=right if method == "lora" else None,
            details={"step_s": milliseconds[f"{method}_ms"] / 1e3, "peft_step_s": milliseconds["peft_ms"] / 1e3},
        )
        for method in chosen
    }  # fmt: skip
    ours, theirs = np.array(knots["cola"][1:]), np.array(knots["peft"][1:])
    knot = Row(
        "cost/knot", "knot of the chain, to PEFT's merge, new adapters and new optimizer", Spread.of(ours / theirs),
        details={
            "knot_s": float(np.median(ours)), "peft_knot_s": float(np.median(theirs)),
            "first_knot_s": knots["cola"][0], "in_steps": float(np.median(ours)) * 1e3 / milliseconds["cola_ms"],
        },
    )  # fmt: skip
    return steps, knot


def alone(method: str, name: str, settings: Settings) -> dict[str, float]:
    """`memory` in a process of its own. All libraries are imported before, so that no method pays for its own.

    On a GPU, where libraries do not count, it is measured in this process.
    """
    if settings.device == "cuda":
        gc.collect()
        return memory(method, name, settings)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "peft", "galore_torch"])
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as one:
        return one.submit(memory, method, name, settings).result()


def memory(method: str, name: str, settings: Settings) -> dict[str, float]:
    """The peak over two steps, a knot and two steps more; the part of it above the loaded model; the trained state.

    Returns:
        ``peak_bytes``, ``above_bytes`` and ``trained_bytes``.
    """
    model = load(name, settings)
    ids = batch(model, settings)
    trained: list[Any] = []

    def run() -> None:
        trained.append(METHODS[method][1](model))
        for _ in range(2):
            take(trained[0], ids)
        trained[0].tie()
        for _ in range(2):
            take(trained[0], ids)

    before, peak = peak_memory(run, ids.device)
    trained[0].model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        "peak_bytes": float(peak), "above_bytes": float(peak - before),
        "trained_bytes": float(trained_bytes(trained[0].optimizer)),
    }  # fmt: skip


def table(found: Sequence[Row]) -> str:
    """The rows of this group as one table, a line per method; empty where an error left a row out."""
    by_name = {row.name.removeprefix("cost/"): row for row in found if row.name.startswith("cost/")}
    details = {name: row.details for name, row in by_name.items()}
    knots = {"peft": "peft_knot_s", "cola": "knot_s"}
    lines = [
        "| method | s per step | to PEFT's | s per knot | peak MB | above the loaded model, MB | trained state, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, (words, _) in METHODS.items():
        if (step := by_name.get(f"step/{method}")) is None:
            continue
        bytes_ = details.get(f"memory/{method}", {})
        knot = details.get("knot", {}).get(knots.get(method, ""), math.nan)
        keys = ("peak_bytes", "above_bytes", "trained_bytes")
        megabytes = [f"{bytes_[key] / 1e6:.4g}" if key in bytes_ else "" for key in keys]
        cells = [words, f"{step.details['step_s']:.4g}", str(step.value), "" if math.isnan(knot) else f"{knot:.3g}"]
        lines.append(f"| {' | '.join(cells + megabytes)} |")
    return "\n".join(lines)
