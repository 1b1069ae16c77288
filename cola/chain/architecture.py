"""Describes how a chain's base model is built: its class, its modules, and the modules with several names.

A chain records this, so that an export can be checked against the base model after the chain was loaded from disk.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from cola.lora import peft
from cola.lora.layer import AdaptedLayer
from cola.lora.names import base_modules, base_tensors, called, canonical, unwrap
from cola.lora.parameter import ReadsParameters
from cola.lora.reading import Borrowing
from cola.lora.token_rows import TokenRows

#: PEFT's word for a model's task, by the end of its class name
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
#: tasks for which PEFT requires a model that generates
_GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class Architecture:
    """How a base model is built.

    Attributes:
        name: of the class, e.g. ``"LlamaForCausalLM"``.
        library: the Python module that defines the class.
        model_type: of the ``config``, e.g. ``"llama"``; None without one.
        task: PEFT's ``task_type`` for such a model, e.g. ``"CAUSAL_LM"``; None if it has none.
        modules: paths of the modules that hold no tensor, in their children either.
        aliases: other paths of modules that are registered at several places, by the first path.
        shared: other names of the weights that several modules share as a whole, by the name that comes first.
        changed: how the base model differs from the original model, as a clause; None if it does not.
    """

    name: str
    library: str
    model_type: str | None = None
    task: str | None = None
    modules: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    changed: str | None = None
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "Architecture":
        """Describe ``model`` without its links and PEFT's layers."""
        base, held = unwrap(model), holders(base_tensors(model))
        kind = plain_class(base)
        model_type = getattr(getattr(base, "config", None), "model_type", None)
        return cls(
            name=kind.__name__,
            library=kind.__module__,
            model_type=model_type if isinstance(model_type, str) and model_type else None,
            task=_task(base, kind.__name__),
            modules=tuple(path for path in base_modules(model) if path and path not in held),
            aliases=aliases(model),
            changed=peft.changed_base(called(model)),
            shared=_shared(base_tensors(model)),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        found = asdict(self)
        for key in ("aliases", "shared"):
            found[key] = {path: list(names) for path, names in found[key].items()}
        return {**found, "modules": list(self.modules)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Architecture":
        """Reverse `to_json`.

        Raises:
            KeyError, TypeError, AttributeError: the values do not describe an architecture.
        """
        words = {key: value[key] for key in ("name", "library", "model_type", "task", "changed")}
        for key, word in words.items():
            if not (isinstance(word, str) or (word is None and key not in ("name", "library"))):
                raise TypeError(f"{key}={word!r:.40}")
        lists = {path: tuple(names) for path, names in value["aliases"].items()}
        shared = {name: tuple(names) for name, names in value.get("shared", {}).items()}
        modules = tuple(value["modules"])
        if not all(isinstance(name, str) for names in (modules, *lists.values(), *shared.values()) for name in names):
            raise TypeError("modules, aliases or shared hold something other than names")
        return cls(modules=modules, aliases=lists, shared=shared, **words)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of ``module``, without the subclasses that links and FSDP2 put on top."""
    for kind in type(module).__mro__:
        added = issubclass(kind, AdaptedLayer | ReadsParameters | Borrowing | TokenRows)
        added = added or kind.__module__.startswith("torch.distributed")
        if issubclass(kind, nn.Module) and not added:
            return kind
    return nn.Module


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other canonical paths of modules that are registered at several places, by the first path.

    A module inside a shared block is registered once, in the block.
    """
    paths = {id(module): path for path, module in base_modules(model).items()}
    wrapped = {id(m): id(m._modules["base_layer"]) for m in unwrap(model).modules() if peft.is_tuner_layer(m)}
    places: dict[int, list[str]] = {}
    for parent in unwrap(model).modules():
        for name, child in parent._modules.items():
            if child is not None and id(parent) in paths and id(parent) not in wrapped:
                path = canonical(f"{paths[id(parent)]}.{name}".lstrip("."))
                places.setdefault(wrapped.get(id(child), id(child)), []).append(path)
    found = {paths[module]: names for module, names in places.items() if module in paths and len(names) > 1}
    return {path: tuple(name for name in names if name != path) for path, names in found.items()}


def holders(names: Iterable[str]) -> set[str]:
    """Paths of the modules that hold the tensors with these names, directly or in their children; without ``""``."""
    found: set[str] = set()
    for name in names:
        path = name.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {first: tuple(others) for first, *others in names.values() if others}


def _task(model: nn.Module, name: str) -> str | None:
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    config = getattr(model, "config", None)
    reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if task == "SEQ_2_SEQ_LM" and not (reads_text and getattr(config, "is_encoder_decoder", False)):
        return None  # it sees or hears
    generates = hasattr(model, "prepare_inputs_for_generation")
    return task if hasattr(config, "model_type") and (generates or task not in _GENERATES) else None
