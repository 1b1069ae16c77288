"""The methods that are compared: the weights they train, their base optimizer, and when they tie a knot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cola import (
    ChainOptimizer,
    EpochKnots,
    EvenKnots,
    GapKnots,
    KnotPolicy,
    LinkConfig,
    NeverKnots,
    PlateauKnots,
    StepKnots,
)

KINDS = ("lora", "cola", "finetune", "galore", "peft", "dora", "icl", "zero-shot")
OUTSIDE_TRAINER = ("galore", "peft", "dora")
"""The kinds that the paper's cells do not have; the frontier has them."""
BASES: Mapping[str, type[torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
}
QUERY_AND_VALUE = ("q_proj", "v_proj")
"""The layers that get adapters in the paper."""
NAMED_KNOTS = ("epochs", "even", "plateau", "progress", "gap")
SHORTEST_PLATEAU = 12
"""A plateau is judged by mean losses over this fraction of the run, a twelfth."""


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        kind: ``"lora"`` (one link), ``"cola"``, ``"finetune"`` (all weights), ``"galore"`` (the targets' weights, by
            gradients projected to rank r), ``"peft"`` and ``"dora"`` (PEFT's LoRA and its DoRA, which trains the
            norm of each row of W + sBA too), ``"icl"`` (demonstrations in the prompt) or ``"zero-shot"``; the last
            two train nothing.
        base: base optimizer, a key of `BASES`.
        ranks: of the links; the last repeats.
        links: length of the chain, or the longest that ``"plateau"``, ``"progress"`` and ``"gap"`` may make.
        knots: ``"epochs"``, after epochs ⌈kE/M⌉ for k = 1 … M−1, so that two links of five epochs part after
            the third, as in the paper; ``"even"``, links of equal size; ``"plateau"``, when the loss stalls;
            ``"progress"``, when it falls more slowly than it did; ``"gap"``, when the link's first-order gain has
            fallen; ``"at=100,300"`` or ``"every=100"``, optimizer steps.
        alpha: lora_alpha. The scale is alpha / r of the first link, for all links.
        init: how a link starts, as for `cola.LinkConfig`.
        train: ``"both"`` factors, or ``"B"`` alone.
        reset: what a knot does to the optimizer state, as for `cola.ChainOptimizer`.

    Raises:
        ValueError: an attribute out of range; the message names it.

    >>> Method.cola(3).knot_epochs(5)
    [2, 4]
    """

    kind: str
    base: str = "AdamW"
    ranks: tuple[int, ...] = (8,)
    links: int = 1
    knots: str = "epochs"
    alpha: float = 16.0
    init: str = "gaussian"
    train: str = "both"
    reset: str = "state"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.base not in BASES:
            raise ValueError(f"base={self.base!r} is unknown: choose one of {', '.join(BASES)}")
        if self.kind in OUTSIDE_TRAINER and self.base != "AdamW":
            raise ValueError(f"kind={self.kind!r} has an AdamW of its own: leave out base={self.base!r}")
        if self.links < 1:
            raise ValueError(f"links={self.links}: a chain has at least one link")
        if self.kind == "lora" and (self.links != 1 or len(self.ranks) != 1):
            raise ValueError(f"kind='lora' has one link of one rank, not links={self.links}, ranks={self.ranks}")
        if self.kind == "cola" and self.links < 2 and self.knots in NAMED_KNOTS:
            raise ValueError(f"kind='cola' with links={self.links}: a chain has two or more; one link is 'lora'")
        self.link(None)  # refuses invalid ranks and alphas
        _steps(self.knots)

    @classmethod
    def lora(cls, r: int = 8, base: str = "AdamW") -> Method:
        """LoRA of rank r."""
        return cls("lora", base, (r,))

    @classmethod
    def cola(cls, links: int, ranks: Sequence[int] = (8,), base: str = "AdamW", knots: str = "epochs") -> Method:
        """A chain of ``links`` links."""
        return cls("cola", base, tuple(ranks), links, knots)

    @property
    def trains(self) -> bool:
        """Whether weights change."""
        return self.kind not in ("icl", "zero-shot")

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained."""
        return self.kind in ("lora", "cola")

    @property
    def name(self) -> str:
        """Short, for files: such as ``cola3-r8`` or ``sgd-lora-r8``."""
        name = self.kind
        if self.kind == "cola":
            name += {"epochs": str(self.links), "plateau": f"-plateau{self.links}"}.get(
                self.knots, f"-{self.knots.replace('=', '').replace(',', '.')}-{self.links}"
            )
        if self.adapts or self.kind in OUTSIDE_TRAINER:
            name += "-r" + ".".join(map(str, self.ranks)) + (f"-a{self.alpha:g}" if self.alpha != 16 else "")
            name += "-B" if self.train == "B" else ""
            name += f"-{self.init}" if self.init != "gaussian" else ""
            name += f"-{self.reset}" if self.reset != "state" else ""
        return name if self.base == "AdamW" else f"{self.base.lower()}-{name}"

    def knot_epochs(self, epochs: int) -> list[int]:
        """The epochs after which a chain of `links` links ties a knot, if it ties after epochs.

        Raises:
            ValueError: fewer epochs than links.
        """
        if self.links > epochs:
            raise ValueError(
                f"links={self.links} in epochs={epochs}: a link needs at least one epoch; use knots='even'"
            )
        return [math.ceil(k * epochs / self.links) for k in range(1, self.links)]

    def policy(self, epochs: int, steps_per_epoch: int, *, told: bool = False) -> KnotPolicy:
        """When to tie, in a run of ``epochs`` epochs.

        Args:
            epochs: of the run.
            steps_per_epoch: optimizer steps in one.
            told: the optimizer is told the epochs, as in transformers' `Trainer`, and does not count steps. Mixed
                precision skips steps whose gradients overflow, so a count would fall behind.
        """
        total = epochs * steps_per_epoch
        if self.kind != "cola":
            return NeverKnots()
        if self.knots == "epochs":
            counted = None if told else steps_per_epoch
            return EpochKnots(at=self.knot_epochs(epochs), steps_per_epoch=counted, total_epochs=epochs)
        if self.knots == "even":
            return EvenKnots(length=self.links, total_steps=total)
        if self.knots == "plateau":
            window = max(1, total // SHORTEST_PLATEAU)
            return PlateauKnots(window=window, patience=1, threshold=0.01, max_links=self.links)
        if self.knots == "progress":
            return PlateauKnots(total_steps=total, max_links=self.links)
        if self.knots == "gap":
            return GapKnots(total_steps=total, max_links=self.links)
        return StepKnots(**_steps(self.knots))

    def link(self, targets: str | Sequence[str] | None, *, bias: bool = False) -> LinkConfig:
        """The configuration of a link on the layers ``targets``.

        Args:
            targets: as for `cola.LinkConfig`.
            bias: train their biases too.
        """
        return LinkConfig(
            r=self.ranks[0] if len(self.ranks) == 1 else self.ranks,
            lora_alpha=self.alpha,
            target_modules=targets,
            bias="lora_only" if bias else "none",
            init=self.init,
            train=self.train,
        )

    def base_kwargs(self, lr: float) -> dict[str, Any]:
        """Arguments of the base optimizer; no weight decay, as in the paper's runs.

        Adafactor's rate is relative to the size of the weights, where that exceeds the second number of ``eps``. B
        starts at zero and would hardly move, so this number is 1, and the rate is absolute.
        """
        own: dict[str, Any] = {"eps": (None, 1.0)} if self.base == "Adafactor" and self.adapts else {}
        return {"lr": lr, "weight_decay": 0.0, **own}

    def optimizer(
        self,
        model: nn.Module,
        *,
        lr: float,
        seed: int,
        epochs: int,
        steps_per_epoch: int,
        targets: str | Sequence[str] | None = None,
        bias: bool = False,
    ) -> torch.optim.Optimizer:
        """The optimizer of a run: a `ChainOptimizer`, or the plain base over all weights for ``"finetune"``.

        Raises:
            ValueError: the method trains nothing.
            ModuleNotFoundError: GaLore's library is missing.
        """
        base = BASES[self.base]
        if not self.trains:
            raise ValueError(f"kind={self.kind!r} trains nothing")
        if self.kind == "galore":
            return self._galore(model, lr, targets)
        if self.kind in ("peft", "dora"):
            return self._peft(model, lr, targets, seed)
        if not self.adapts:
            return base(model.parameters(), **self.base_kwargs(lr))
        return ChainOptimizer(
            base,
            model,
            self.policy(epochs, steps_per_epoch),
            link=self.link(targets, bias=bias),
            seed=seed,
            reset=self.reset,
            **self.base_kwargs(lr),
        )

    def _galore(self, model: nn.Module, lr: float, targets: str | Sequence[str] | None) -> torch.optim.Optimizer:
        """GaLore's AdamW with its own defaults: a new projection every 200 steps, scale 0.25."""
        from galore_torch import GaLoreAdamW

        weights = [model.get_parameter(f"{path}.weight") for path in _target_paths(model, targets)]
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        own = {"rank": self.ranks[0], "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": weights, **own}], **self.base_kwargs(lr), no_deprecation_warning=True)

    def _peft(
        self, model: nn.Module, lr: float, targets: str | Sequence[str] | None, seed: int
    ) -> torch.optim.Optimizer:
        """PEFT's adapter, drawn by the seed, on the layers that a link would have."""
        from experiments.peft_adapter import AdapterAdamW

        paths = _target_paths(model, targets)
        adapter = {"r": self.ranks[0], "lora_alpha": self.alpha, "use_dora": self.kind == "dora"}
        return AdapterAdamW(model, paths, seed, adapter, **self.base_kwargs(lr))


def _target_paths(model: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    """The layers that a link would have."""
    adapted = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=1, target_modules=targets))
    paths = list(adapted.live.layers)
    adapted.finish(merge=False)
    return paths


def _steps(knots: str) -> dict[str, Any]:
    """``at=100,300`` or ``every=100`` as `StepKnots`'s arguments; empty for the policies that have a name."""
    if knots in NAMED_KNOTS:
        return {}
    name, _, value = knots.partition("=")
    try:
        if name == "at":
            arguments: dict[str, Any] = {"at": [int(step) for step in value.split(",")]}
        elif name == "every":
            arguments = {"every": int(value)}
        else:
            raise ValueError
        StepKnots(**arguments)
    except ValueError:
        raise ValueError(
            f"knots={knots!r}: use {', '.join(NAMED_KNOTS)}, at=STEP,STEP,… or every=STEPS (rising, positive integers)"
        ) from None
    return arguments
