"""The wrapper around a base optimizer whose param groups hold the live link's factors and the extra parameters."""

import logging
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cola.common.distributed import reshard
from cola.knot.tie import KnotError
from cola.lora.integrity import require_intact, require_same_weights
from cola.lora.layer import FACTORS
from cola.lora.live import LiveLink
from cola.lora.trainable import require_apart, warn_of_half
from cola.wrapper.wrapper import OptimizerWrapper

logger = logging.getLogger("cola")

#: the chain's entry in the first param group
GROUP_KEY = "cola"


def warn_of_relative_steps(base: Optimizer) -> None:
    """Warn of an Adafactor whose steps are relative to a parameter's size: a factor of zeros hardly moves."""
    settings = base.param_groups[0]
    if isinstance(base, torch.optim.Adafactor):
        relative, way = settings["eps"][1] < 1, "eps=(None, 1.0)"
    else:  # that of transformers, and others with its options
        relative, way = settings.get("scale_parameter") is True, "scale_parameter=False, relative_step=False and an lr"
    if relative:
        logger.warning(
            "base=%s takes steps relative to the size of a parameter, and one factor of a link starts at zero, so that "
            "it hardly moves: pass %s, which makes lr the size of a step",
            type(base).__name__, way,
        )  # fmt: skip


class LinkGroups(OptimizerWrapper):
    """An optimizer around a base that trains a live link."""

    _own_entries = (GROUP_KEY,)

    live: LiveLink
    _bound: list[nn.Parameter] | None  # the trained Parameters, until the first step: fully_shard replaces them
    _held: dict[str, nn.Parameter]  # the weights when training began, for `require_same_weights`

    def _add_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base, and unfreeze those of the model."""
        carriers = {**self.live.layers, **self.live.rows}
        require_apart(param_group, {path: layer.plain_weight for path, layer in carriers.items()})
        self.base.add_param_group(param_group)
        before = self.live.trained()
        factors = {id(p) for p in self.live.adapters()}
        added = self.param_groups[-1]["params"]
        self.live.trainable.add_all(p for p in added if id(p) not in factors)
        names = {id(p): name for name, p in self.live.trained().items() if name not in before}
        warn_of_half({names.get(id(p), f"the added parameter {i} {tuple(p.shape)}"): p for i, p in enumerate(added)})

    def _make_base(self) -> Optimizer:
        adapters, others = self.live.adapters(), list(self.live.trained().values())
        groups = [{"params": adapters}, {"params": others}] if others else [{"params": adapters}]
        base = self._factory(groups, **self._base_kwargs)
        if not isinstance(base, Optimizer):
            raise TypeError(f"base={self._factory!r} returned {type(base).__name__}, not a torch.optim.Optimizer")
        held = {id(p) for group in base.param_groups for p in group["params"]}
        if held != {id(p) for p in (*adapters, *others)}:
            raise ValueError(
                f"base={self._factory!r} did not take the parameters it was given: it must train those of all "
                f"{len(groups)} groups, {len(adapters) + len(others)} in number, and took {len(held)}"
            )
        if isinstance(base, torch.optim.SparseAdam):
            raise ValueError("base=SparseAdam needs sparse gradients, and a link's are dense: use torch.optim.Adam")
        base.param_groups[0][GROUP_KEY] = ""
        self._made = len(base.param_groups)
        return base

    def _all_trained(self) -> list[nn.Parameter]:
        return [*self.live.adapters(), *self.live.trained().values()]

    def _settle(self) -> None:
        """Before the first step, follow frameworks that replace the model's Parameters.

        FSDP2 leaves the old ones in the groups. Accelerate puts placeholders there, which are left alone, and later the
        new ones.
        """
        if self._bound is None or self._bound[0] is self.live.adapters()[0]:
            return
        fresh = self._all_trained()
        held = {id(p) for group in self.base.param_groups for p in group["params"]}
        if held.isdisjoint(map(id, (*self._bound, *fresh))):
            return
        new = {id(before): after for before, after in zip(self._bound, fresh, strict=True)}
        self._bound = fresh
        for group in self.base.param_groups:
            group["params"] = [new.get(id(p), p) for p in group["params"]]
        self.base.state.clear()
        self._reset([p for group in self.base.param_groups for p in group["params"]])

    def _require_trainable(self) -> None:
        """Check that the layers are unchanged and that the groups hold their factors."""
        reshard(self.live.model)
        require_intact(self.live)
        held = {id(p) for group in self.param_groups for p in group["params"]}
        for path, layer in self.live.layers.items():
            for name in FACTORS:
                p = getattr(layer, name)
                if p.requires_grad and id(p) not in held:
                    raise KnotError(
                        f"param_groups do not hold {name} of layer {path!r}: the model's parameters were replaced "
                        "after the ChainOptimizer had begun, or the optimizer keeps its own copies (DeepSpeed ZeRO "
                        "does: use DDP or FSDP2), so this layer is not trained"
                    )
        require_same_weights(self.live, self._held)
