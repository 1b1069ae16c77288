"""The methods that are compared at every rank: LoRA, chains, B alone, GaLore, full fine-tuning.

Rank r stands for the bytes of a LoRA of rank r trained by AdamW; a method that keeps less per direction may have more
directions. By Adafactor the bytes are only near: it also keeps two vectors per factor, which weigh at small ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.methods import Method
from experiments.report import style
from experiments.study.arms import CEILING, Arm, doubling

ADAPTERS = doubling(5e-4, 11)
"""Learning rates to choose from."""
WEIGHTS = doubling(1.25e-4, 12)
"""The same for methods that train whole weights; GaLore, which takes a quarter of each step, wants high ones."""


@dataclass(frozen=True)
class Family:
    """One method at every rank.

    Attributes:
        label: with ``{r}`` for the rank.
        method: rank -> the method.
        look: colour, line and marker in pictures; no two have the same colour and marker.
        rates: to choose from.
        start: rank -> the rate with which a search begins.
        against: the family that it is compared with at every rank.
    """

    label: str
    method: Callable[[int], Method]
    look: tuple[str, str, str]
    rates: tuple[float, ...] = ADAPTERS
    start: Callable[[int], float] = lambda rank: 1.6e-2 if rank <= 4 else 8e-3
    against: str = "lora"

    @property
    def name(self) -> str:
        """The label without the rank."""
        return re.sub(r", (r = |\d·)\{r\}.*", "", self.label)

    def arm(self, rank: int) -> Arm:
        """The method at this rank, compared with `against` of the same rank."""
        reference = f"{self.against}-{rank}"
        return Arm(self.label.format(r=rank), self.method(rank), self.rates, self.start(rank), reference)


def lora(rank: int) -> str:
    """The name of LoRA's arm at a rank."""
    return f"lora-{rank}"


def one_link(rank: int) -> Method:
    """LoRA with s = 1."""
    return Method("lora", ranks=(rank,), alpha=rank, init="kaiming")


def by_adafactor(method: Callable[[int], Method]) -> Callable[[int], Method]:
    """The method with Adafactor as its base optimizer and a fresh state after every knot.

    Adafactor keeps two vectors per factor in place of two moments: a trained number costs half of AdamW's bytes.
    """
    return lambda rank: replace(method(rank), base="Adafactor", reset="state")


def links(count: int, knots: str = "even") -> Callable[[int], Method]:
    """A chain of so many links of rank r, both factors trained, with s = 1."""
    return lambda rank: Method("cola", ranks=(rank,), links=count, knots=knots, alpha=rank, init="kaiming")


def b_alone(
    init: str, times: int = 2, count: int = 15, knots: str = "even", reset: str = "transport"
) -> Callable[[int], Method]:
    """A chain that trains B alone: ``times`` r directions, s = 1.

    Args:
        init: how A is drawn.
        times: directions per rank of the LoRA.
        count: links, if they are even; a policy may make 60.
        knots: as in `Method`.
        reset: as in `Method`.
    """
    most = count if knots == "even" else 60
    return lambda rank: Method(
        "cola", ranks=(times * rank,), links=most, knots=knots, alpha=times * rank, init=init, train="B", reset=reset
    )


def peft_adapter(kind: str) -> Callable[[int], Method]:
    """PEFT's LoRA or DoRA with s = 1."""
    return lambda rank: Method(kind, ranks=(rank,), alpha=rank)


def _selected(what: str, look: tuple[str, str, str], **changes: Any) -> Family:
    """A variant of B alone on selected inputs."""
    return Family(f"B alone, selected inputs, {what}, 2·{{r}}", b_alone("selector", **changes), look)


FULL = CEILING
SELECTED = "b-selected"

FAMILIES: Mapping[str, Family] = {
    "lora": Family("LoRA, r = {r}", one_link, (style.BLACK, "-", "o")),
    "chain-2": Family("2 links, r = {r}", links(2), (style.GREY, "-.", "s")),
    "chain-3": Family("3 links, r = {r}", links(3), (style.SKY, "-", "s")),
    "chain-4": Family("4 links, r = {r}", links(4), (style.GREEN, "-", "P")),
    "chain-5": Family("5 links, r = {r}", links(5), (style.BLUE, "-", "P")),
    "chain-8": Family("8 links, r = {r}", links(8), (style.PURPLE, "-", "P")),
    "chain-10": Family("10 links, r = {r}", links(10), (style.BLUE, "--", "s")),
    "chain-20": Family("20 links, r = {r}", links(20), (style.GREEN, ":", "s")),
    "chain-30": Family("30 links, r = {r}", links(30), (style.PURPLE, "-.", "s")),
    "b-random": Family("B alone, random A, r = {r}", b_alone("orthogonal", 1), (style.ORANGE, "--", "^")),
    "b-random-2": Family("B alone, random A, 2·{r}", b_alone("orthogonal"), (style.ORANGE, "--", "^")),
    SELECTED: Family("B alone, selected inputs, 2·{r}", b_alone("selector"), (style.VERMILION, "-", "D")),
    "b-reset": _selected("state reset", (style.SKY, "--", "D"), reset="state"),
    "b-30": _selected("30 links", (style.GREEN, "--", "D"), count=30),
    "b-plateau": _selected("by plateau", (style.GREY, ":", "D"), knots="plateau"),
    "b-progress": _selected("by progress", (style.BLUE, ":", "D"), knots="progress"),
    "b-gap": _selected("by gain", (style.PURPLE, ":", "D"), knots="gap"),
    "chain-progress": Family("links by progress, r = {r}", links(60, "progress"), (style.BLUE, "-.", "h")),
    "lora-adafactor": Family(
        "LoRA by Adafactor, 2·{r}", by_adafactor(lambda rank: one_link(2 * rank)), (style.BLACK, ":", "*")
    ),
    "chain-2-adafactor": Family(
        "2 links by Adafactor, 2·{r}", by_adafactor(lambda rank: links(2)(2 * rank)), (style.GREY, ":", "*")
    ),
    "chain-4-adafactor": Family(
        "4 links by Adafactor, 2·{r}", by_adafactor(lambda rank: links(4)(2 * rank)), (style.GREEN, ":", "*")
    ),
    "b-adafactor": Family(
        "B alone by Adafactor, selected inputs, 4·{r} − 2",
        by_adafactor(lambda rank: b_alone("selector", 1)(4 * rank - 2)), (style.VERMILION, ":", "*"),
    ),
    "galore": Family(
        "GaLore, r = {r}", lambda rank: Method("galore", ranks=(rank,)), (style.GREY, ":", "v"), WEIGHTS,
        lambda rank: 4e-3,
    ),
    "peft": Family("LoRA of PEFT, r = {r}", peft_adapter("peft"), (style.GREY, "-", "o"), against="peft"),
    "dora": Family("DoRA of PEFT, r = {r}", peft_adapter("dora"), (style.GREEN, "-", "o"), against="peft"),
}  # fmt: skip
"""Name -> family, in the order of tables."""


def family_of(arm: str) -> str:
    """The name of an arm's family."""
    return arm.rpartition("-")[0] or arm


def arms(ranks: Iterable[int], families: Iterable[str], *, gate: bool = True) -> dict[str, Arm]:
    """Arms by name, such as ``lora-4``.

    Args:
        ranks: of the LoRAs.
        families: names in `FAMILIES`; those that they are compared with are added.
        gate: add LoRA, full fine-tuning and LoRA of rank 3r, which `tasks.Gate` needs.
    """
    found: dict[str, Arm] = {}
    chosen, ranks = set(families), list(ranks)
    chosen |= {FAMILIES[name].against for name in chosen} | ({"lora"} if gate else set())
    for rank in ranks:
        for name, family in FAMILIES.items():
            if name in chosen:
                found[f"{name}-{rank}"] = family.arm(rank)
    for rank in ranks if gate else ():
        found.setdefault(lora(3 * rank), replace(FAMILIES["lora"].arm(3 * rank), start=8e-3, reference=lora(rank)))
    if gate:
        found[FULL] = Arm("full fine-tuning", Method("finetune"), WEIGHTS, 2e-3, lora(ranks[0]))
    return found
