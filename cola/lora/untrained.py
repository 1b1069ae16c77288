"""Warns of links that train nothing: no error shows this, and the loss may fall by other trained parameters."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cola.common.distributed import whole
from cola.lora.live import LiveLink
from cola.lora.names import listed

logger = logging.getLogger("cola")


class Untrained:
    """Counts steps without any gradient, and warns once of layers whose links have had none.

    Attributes:
        idle: steps without any gradient since the last counted step.
    """

    def __init__(self) -> None:
        self.idle = 0
        self._at = 0  # counted steps before those
        self._told = False

    def count(self, groups: Iterable[Mapping[str, Any]], steps: int) -> None:
        """Note a step that is not counted, after ``steps`` counted ones."""
        if any(p.grad is not None for group in groups for p in group["params"]):
            return  # zero gradients: a probe
        self.idle = self.idle + 1 if self._at == steps else 1
        self._at = steps

    def look(self, live: LiveLink, base: Optimizer, steps: int) -> None:
        """Before a tie, warn once in a run of the layers whose link has not changed in ``steps`` steps.

        A link counts as untrained if the factor that starts at zero is still zero, has a learning rate other than zero,
        and the base has seen no gradient of it but zeros.
        """
        if self._told or not steps:
            return
        name = "lora_A" if live.config.train == "A" else "lora_B"
        found = [
            path
            for path, layer in live.layers.items()
            if live.is_untrained(path) and _unseen(getattr(layer, name), base)
        ]
        if not found:
            return
        self._told = True
        named = listed(found)
        if len(found) == len(live.layers):
            logger.warning(
                "link %d has trained nothing: after %d steps %s of all %d layers (%s) has had no gradient. Usual "
                "causes: parameters frozen after the ChainOptimizer was made, a forward under no_grad, reentrant "
                "gradient checkpointing (set use_reentrant=False), or a model that reads the layers' weights without "
                "calling them",
                live.index, steps, name, len(found), named,
            )  # fmt: skip
        else:
            logger.warning(
                "link %d: after %d steps %s of %d of %d layers (%s) has had no gradient, so their links are as they "
                "began. This is expected for experts that received no token; other causes are parameters frozen after "
                "the ChainOptimizer was made, reentrant gradient checkpointing (set use_reentrant=False), and "
                "layers whose weight the model reads without calling them",
                live.index, steps, name, len(found), len(live.layers), named,
            )  # fmt: skip

    def end(self, live: LiveLink, steps: int, tied_at: int) -> None:
        """Warn of a run that ends with more steps without a gradient than counted ones in the last link.

        Args:
            live: the live link.
            steps: counted steps of the run.
            tied_at: counted steps before the last knot.
        """
        if self._at != steps or self.idle <= steps - tied_at or (self.idle == 1 and steps):
            return
        logger.warning(
            "the last %d calls of step() found no gradient and were not counted (%d earlier ones were, %d of them in "
            "link %d). Usual causes: parameters frozen after the ChainOptimizer was made, "
            "zero_grad() between backward() and step(), a forward under no_grad, reentrant gradient checkpointing (set "
            "use_reentrant=False), or a model that reads the layers' weights without calling them",
            self.idle, steps, steps - tied_at, live.index,
        )  # fmt: skip


def _unseen(parameter: nn.Parameter, base: Optimizer) -> bool:
    """Whether the base has seen no gradient of a parameter, for another reason than its learning rate."""
    group = next((g for g in base.param_groups if any(p is parameter for p in g["params"])), {})
    if not group.get("lr", 1.0):
        return False
    seen = (parameter.grad, *(base.state.get(parameter) or {}).values())
    return not any(_any(value) for value in seen if isinstance(value, Tensor) and value.shape == parameter.shape)


def _any(tensor: Tensor) -> bool:
    return bool(whole(tensor.detach()).any())
