"""A model's modules, parameters and buffers by canonical name: the name without wrappers, PEFT's layers and links.

A chain records canonical names, which are the same under `torch.compile`, DDP, FSDP and PEFT.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cola.lora import peft
from cola.lora.kinds import kind_of
from cola.lora.parameter import ParameterView, entries_of, view_of
from cola.lora.token_rows import TokenRows

# parts that torch.compile, DDP, FSDP and activation checkpointing add to a module's path
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def called(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DDP and DataParallel wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside all wrappers, a PeftModel included."""
    model = called(model)
    return unwrap(peft.inner_model(model)) if peft.is_peft_model(model) else model


def canonical(path: str) -> str:
    """A module's or parameter's path without the wrappers' parts, as a chain records it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of ``model`` by canonical path; a module with several paths is listed once.

    Where PEFT has wrapped a layer, the path leads to the layer inside, or to the copy that is trained whole.
    """
    found: dict[str, nn.Module] = {}
    names, modules, copies = {"": ""}, dict(unwrap(model).named_modules()), set()
    for path, module in modules.items():
        parent, _, part = path.rpartition(".")
        if path:
            through = part in peft.transparent(modules[parent])
            hidden = through or parent in copies or part in _WRAPPERS
            names[path] = names[parent] if hidden else f"{names[parent]}.{part}".lstrip(".")
            if through and isinstance(module, nn.ModuleDict):
                copies.add(path)
        found[names[path]] = module
    return found


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of ``model`` by canonical path."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in modules_by_name(model).items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def buffers_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers of ``model`` (those in its state dict) by canonical path."""
    modules = modules_by_name(model).items()
    return {k: v for path, module in modules for k, v in tensors_of(path, module, parameters=False).items()}


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model, by canonical path.

    Modules that PEFT has added are left out; where it trains a copy of a module, the original is listed.
    """
    names, modules = {"": ""}, dict(unwrap(model).named_modules())
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        parent, _, part = path.rpartition(".")
        if path:
            original = peft.original(modules[parent])
            if parent not in names or (original is not None and part != original):
                continue
            hidden = original is not None or part in _WRAPPERS
            names[path] = names[parent] if hidden else f"{names[parent]}.{part}".lstrip(".")
        found[names[path]] = module
    return found


def tensors_of(path: str, module: nn.Module, *, parameters: bool = True) -> dict[str, torch.Tensor]:
    """The module's own persistent buffers, and its parameters other than a link's, by name."""
    left_out = {*module._non_persistent_buffers_set, *entries_of(module)}
    held = {**(module._parameters if parameters else {}), **module._buffers}
    kind = kind_of(module)
    if kind is not None:
        left_out.update(kind.added)
        held.update(kind.parts(module) if parameters else {})
    left_out.update(TokenRows.entries if isinstance(module, TokenRows) else ())
    return {
        f"{path}.{name}" if path else name: tensor
        for name, tensor in held.items()
        if tensor is not None and name not in left_out
    }


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of the base model, under the base model's names."""
    return {k: v for path, module in base_modules(model).items() for k, v in tensors_of(path, module).items()}


def layer_at(modules: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """What can carry a link at ``path``: a module, or a module's parameter as a `ParameterView`; None if none is there.

    Args:
        modules: by path, as `modules_by_name` or `base_modules` gives them.
        path: of a module, or a parameter's name.
    """
    if path in modules:
        return modules[path]
    owner, _, name = path.rpartition(".")
    held = modules[owner]._parameters.get(name) if owner in modules else None
    return None if held is None else view_of(modules[owner], name)


def weight_name(path: str, layer: object) -> str:
    """Name of the weight of the layer at ``path``."""
    if isinstance(layer, ParameterView):
        return path
    return f"{path}.weight" if path else "weight"


def named(modules: dict[str, nn.Module], name: str) -> list[str]:
    """Paths that equal ``name`` or end in ``.name``."""
    return [path for path in modules if path == name or path.endswith("." + name)]


def listed(paths: Sequence[str]) -> str:
    """The first three of ``paths``, and how many more there are."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def require_plain_name(name: str) -> None:
    """Raise ValueError if a layer's or parameter's name could be mistaken for a file path, or cannot be printed."""
    parts = name.split(".")
    if name and (not all(parts) or any(c in "/\\" or not c.isprintable() for c in name)):
        raise ValueError(f"layer name {name!r:.80} is not a module path (slashes, empty or unprintable parts): refused")


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters that share memory, by id of each of them; parameters that share none are left out."""
    spans: dict[int, list[tuple[int, int, int, str]]] = {}  # storage to (first byte, end, id, name)
    for name, parameter in parameters_by_name(model).items():
        if parameter.is_meta or not parameter.numel() or odd_storage(parameter):
            spans.setdefault(id(parameter), []).append((0, 1, id(parameter), name))
            continue
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        start = local.data_ptr()
        end = start + local.numel() * local.element_size()
        spans.setdefault(local.untyped_storage().data_ptr(), []).append((start, end, id(parameter), name))
    shared: dict[int, list[str]] = {}
    for group in spans.values():
        for start, end, identity, _ in group if len(group) > 1 else ():
            together = sorted(name for a, b, _, name in group if a < end and start < b)
            if len(together) > 1:
                shared[identity] = together
    return shared


def odd_storage(weight: torch.Tensor) -> bool:
    """Whether a tensor has no plain memory: it is sparse, or made of other tensors (torchao's quantised ones)."""
    made = is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor")
    return made or weight.layout != torch.strided
