"""Warns of links that ``save_pretrained`` leaves out while a chain is under way.

``save_pretrained`` writes ``lora_A`` and ``lora_B`` into the weights' file, where ``from_pretrained`` ignores them. Of
a PEFT model it writes the live adapter alone, without the tied links. Neither is an error, so the loss would go
unnoticed until the model is loaded.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cola.lora import peft
from cola.lora.layer import FACTORS, AdaptedLayer
from cola.lora.names import called
from cola.lora.parameter import entries_of

logger = logging.getLogger("cola")


@dataclass
class SaveStatus:
    """What a `WarningSave` knows of its chain.

    Attributes:
        tied: number of links tied so far.
        in_checkpoint: a framework is writing a checkpoint, which is to hold the live link.
        told: the warning has been given.
        merged: the live link is tied for a while (`ChainOptimizer.merged`).
        unloads: PEFT's layers are taken off the model as soon as the chain is finished.
    """

    tied: int = 0
    in_checkpoint: bool = False
    told: bool = False
    merged: bool = False
    unloads: bool = False


class WarningSave:
    """Replaces a model's ``save_pretrained``. It holds no optimizer and is copied with the model.

    The ``status`` is shared by all models of one chain.
    """

    __name__ = "save_pretrained"

    def __init__(self, module: nn.Module, status: SaveStatus) -> None:
        self.module, self.status = module, status
        self.former = vars(module).get("save_pretrained")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._save())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``save_pretrained``, after a warning if links will be missing."""
        status = self.status
        missing = None if status.told or status.in_checkpoint else _left_out(self.module, status)
        if missing is not None:
            status.told = True
            logger.warning("save_pretrained() %s", missing)
        save = self._save()
        if status.in_checkpoint and _KEYS in inspect.signature(save).parameters:
            kwargs.setdefault(_KEYS, False)
        return save(*args, **kwargs)

    def _save(self) -> Callable[..., Any]:
        return self.former or type(self.module).save_pretrained.__get__(self.module)  # type: ignore[attr-defined]


#: save_pretrained's option to write experts one by one, under names that transformers' Trainer cannot load
_KEYS = "save_original_format"


def warn_on_save(model: nn.Module, status: SaveStatus) -> list[WarningSave]:
    """Let ``save_pretrained`` of ``model``, and of models inside it that carry links, warn."""
    made = []
    for module in called(model).modules():
        if callable(getattr(type(module), "save_pretrained", None)) and any(map(_carries, module.modules())):
            made.append(WarningSave(module, status))
            vars(module)["save_pretrained"] = made[-1]
    return made


def restore_save(made: list[WarningSave]) -> None:
    """Undo `warn_on_save`."""
    for save in made:
        held = vars(save.module)
        if held.get("save_pretrained") is save:
            del held["save_pretrained"]
            held.update({"save_pretrained": save.former} if save.former is not None else {})
        save.status.told = True  # a wrapper around it may go on calling it


def _carries(module: nn.Module) -> bool:
    return bool(entries_of(module)) or peft.is_lora_layer(module)


def _left_out(module: nn.Module, status: SaveStatus) -> str | None:
    tied = status.tied
    if any(map(peft.is_lora_layer, module.modules())):
        if status.merged:
            return (
                "of a PEFT model writes an adapter of zeros here, because the links are in the base's weights: save "
                "model.unload() instead"
            )
        if not tied:
            return None
        links = "link that is" if tied == 1 else f"{tied} links that are"
        return (
            f"of a PEFT model writes the live adapter alone, without the {links} tied into the base's weights "
            "already: call opt.finish() (or opt.tie()) and opt.chain.to_peft(directory) for one adapter with all "
            "links, or opt.save(directory) to go on later"
        )
    if not any(map(_is_trained, module.modules())):
        return None
    return (
        f"leaves out the live link {tied}, which is trained and not tied yet: from_pretrained ignores its lora_A "
        "and lora_B. Call opt.finish() first, or opt.tie() to go on training; opt.save(directory) writes a checkpoint"
    )


def _is_trained(module: nn.Module) -> bool:
    """Whether a link on the module, or on a parameter of it, changes what it computes."""
    names = FACTORS if isinstance(module, AdaptedLayer) else entries_of(module)
    factors = [getattr(module, name) for name in names]  # A and B of each link
    return any(_nonzero(A) and _nonzero(B) for A, B in zip(factors[::2], factors[1::2]))


def _nonzero(tensor: Tensor) -> bool:
    # only this process's shard: the others may not be saving
    local: Tensor = getattr(tensor.detach(), "_local_tensor", tensor)
    return not local.is_meta and bool(local.any())
