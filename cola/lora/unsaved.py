"""Says what ``save_pretrained`` leaves out while a chain is under way.

It writes ``lora_A`` and ``lora_B`` into the weights' file, where ``from_pretrained`` ignores them; of a PEFT model it
writes the live adapter alone, without the links that are tied into the base. Neither is an error, and the loss comes to
light when the model is loaded.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cola.lora import peft
from cola.lora.layer import AdaptedLayer
from cola.lora.names import called

logger = logging.getLogger("cola")


@dataclass
class Note:
    """What `Reminded` must know of a chain.

    Attributes:
        tied: number of links tied so far.
        in_checkpoint: a framework is writing a checkpoint, to which the live link belongs.
        told: the warning has been given.
    """

    tied: int = 0
    in_checkpoint: bool = False
    told: bool = False


class Reminded:
    """Stands in the place of a model's ``save_pretrained``. It does not hold the optimizer, and copies with the model.

    Args:
        module: the model.
        note: shared by all that are reminded for one chain.
    """

    __name__ = "save_pretrained"

    def __init__(self, module: nn.Module, note: Note) -> None:
        self.module, self.note = module, note
        self.former = vars(module).get("save_pretrained")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._save())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, after a warning if something will be missing."""
        words = None if self.note.told or self.note.in_checkpoint else _left_out(self.module, self.note)
        if words is not None:
            self.note.told = True
            logger.warning("save_pretrained() %s", words)
        return self._save()(*args, **kwargs)

    def _save(self) -> Callable[..., Any]:
        return self.former or type(self.module).save_pretrained.__get__(self.module)  # type: ignore[attr-defined]


def remind(model: nn.Module, note: Note) -> list[Reminded]:
    """Remind whoever saves ``model``, or a model inside it that carries links, by ``save_pretrained``."""
    made = []
    for module in called(model).modules():
        if callable(getattr(type(module), "save_pretrained", None)) and any(map(_carries, module.modules())):
            made.append(Reminded(module, note))
            vars(module)["save_pretrained"] = made[-1]
    return made


def forget(made: list[Reminded]) -> None:
    """Undo `remind`."""
    for reminded in made:
        held = vars(reminded.module)
        if held.get("save_pretrained") is reminded:
            del held["save_pretrained"]
            held.update({"save_pretrained": reminded.former} if reminded.former is not None else {})
        reminded.note.told = True  # whoever has wrapped it keeps it


def _carries(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer) or peft.is_lora_layer(module)


def _left_out(module: nn.Module, note: Note) -> str | None:
    if any(map(peft.is_lora_layer, module.modules())):
        if not note.tied:
            return None
        tied = "link that is" if note.tied == 1 else f"{note.tied} links that are"
        return (
            f"of a PEFT model writes the live adapter alone, without the {tied} tied into the base's weights "
            "already: call opt.finish() (or opt.tie()) and opt.chain.to_peft(directory) for one adapter with all "
            "links, or opt.save(directory) to go on later"
        )
    layers = [layer for layer in module.modules() if isinstance(layer, AdaptedLayer)]
    if not any(_nonzero(layer.lora_A) and _nonzero(layer.lora_B) for layer in layers):
        return None
    return (
        f"leaves out the live link {note.tied}, which is trained and not tied yet: from_pretrained ignores its lora_A "
        "and lora_B. Call opt.finish() first, or opt.tie() to go on training; opt.save(directory) writes a checkpoint"
    )


def _nonzero(tensor: Tensor) -> bool:
    # this process's part of a sharded one: others may not be saving
    local: Tensor = getattr(tensor.detach(), "_local_tensor", tensor)
    return not local.is_meta and bool(local.any())
