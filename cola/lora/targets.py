"""Finds the layers that carry links: by names, a regular expression, ``"all-linear"``, or query and value."""

import difflib
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from cola.knot.tie import TIEABLE
from cola.lora import peft
from cola.lora.defaults import heads, left_encoders, query_value, read_directly, within
from cola.lora.kinds import is_linear, is_quantized, kind_of, known_kind, refusal
from cola.lora.layer import FACTORS
from cola.lora.names import (
    called,
    layer_at,
    listed,
    modules_by_name,
    named,
    odd_storage,
    parameters_by_name,
    shared_weights,
    unwrap,
)
from cola.lora.parameter import ParameterView, view_of
from cola.lora.reading import READ_BY_ATTENTION, ReadingLayer

logger = logging.getLogger("cola")

#: values of ``target_modules`` that mean a whole model
WHOLE = ("all-linear", "all")


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    narrow: Callable[[Collection[str]], Collection[str]] = lambda paths: paths,
    target_parameters: Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """The layers to adapt, by canonical path, in the model's order; parameters as views, after the modules.

    Args:
        model: the model.
        target_modules: as in `LinkConfig`.
        target_parameters: likewise.
        narrow: chooses among the paths of the layers that match; only the chosen ones must be able to carry a link.

    Raises:
        ValueError: nothing matches, a name matches nothing, or a match cannot carry a link.
    """
    modules = modules_by_name(model)
    _require_initialised(model)
    single = _by_parameters(modules, target_parameters) if target_parameters else {}
    if target_modules is None or target_modules in WHOLE:
        return {**_usable(model, modules, target_modules, narrow), **_able(model, single)}
    if isinstance(target_modules, str):
        found = _by_regex(modules, target_modules)
    elif len(target_modules) or not single:
        found = _by_names(modules, target_modules)
    else:
        found = {}
    found = {path: {**found, **single}[path] for path in narrow([*found, *single])}
    return _able(model, found)


def _able(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """``found``, each of which must be able to carry a link."""
    reasons = obstacles(model, found) if found else {}
    for path, module in found.items():
        reason = reasons[path] if path in reasons else refusal(module)
        if reason is not None:
            raise ValueError(f"target_modules: {_about(path, reason)}")
    return found


def _by_parameters(modules: dict[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers whose weights are the parameters with these names, or with these ends of names."""
    found: dict[str, str] = {}
    every = {
        f"{path}.{own}".lstrip("."): path
        for path, module in modules.items()
        for own, held in module._parameters.items()
        if held is not None
    }
    for name in names:
        full = [parameter for parameter in every if f".{parameter}".endswith(f".{name}")]
        if not full:
            near = difflib.get_close_matches(name, {p.rpartition(".")[2]: p for p in every}, n=3)
            hint = f"; near are {', '.join(near)}" if near else ""
            raise ValueError(f"target_parameters: no parameter is called {name!r}{hint}")
        for parameter in full:
            whole = parameter.endswith(".weight") and kind_of(modules[every[parameter]]) is not None
            found[parameter] = every[parameter] if whole else parameter
    layers = {found[name]: layer_at(modules, found[name]) for name in every if name in found}  # in the model's order
    return {path: layer for path, layer in layers.items() if layer is not None}


def reachable(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """All that ``target_modules="all"`` may reach, by path: layers of a known kind, experts, packed projections."""
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if kind_of(module) is not None:
            found[path] = module
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and is_stacked(path, module, name, parameter):
                found[f"{path}.{name}".lstrip(".")] = view_of(module, name)
    return found


def is_stacked(path: str, module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter stacks the matrices of several experts, or of an attention's three projections."""
    if isinstance(module, nn.MultiheadAttention):
        return name.endswith("proj_weight")  # one for all three, or one for each where keys have another width
    expert = "expert" in f"{path}.{type(module).__name__}.{name}".lower()
    return expert and parameter.dim() == 3 and kind_of(module) is None and not name.endswith(("bias", *FACTORS))


def require_dropped(dropout: float, layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if dropout would have no effect on a layer."""
    for path, layer in layers.items() if dropout else ():
        owner = layer.place[0] if isinstance(layer, ParameterView) else layer
        if isinstance(owner, nn.MultiheadAttention) or type(owner).__name__ == READ_BY_ATTENTION:
            raise ValueError(
                f"lora_dropout={dropout!r} has no effect on {path!r}, because nn.MultiheadAttention multiplies by the "
                "sum of weight and link: set it to 0, or leave the layer out"
            )


def find_peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers in ``model`` by canonical path, each able to carry a chain; empty if there are none.

    Raises:
        ValueError: one cannot carry a chain, or PEFT has added something other than LoRA.
    """
    modules = modules_by_name(model)
    tuned = [module for module in unwrap(model).modules() if peft.is_tuner_layer(module)]
    layers = [module for module in tuned if peft.is_lora_layer(module)]
    paths = {id(module): path for path, module in modules.items()}
    if not layers:
        if tuned or peft.is_peft_model(called(model)):
            what = f"a {type(tuned[0]).__name__} at {paths.get(id(_wrapped(tuned[0])))!r}" if tuned else "an adapter"
            raise ValueError(
                f"model: PEFT has given it {what} and no LoRA layer; chains are made of LoRA: use LoraConfig, or the "
                "model without an adapter"
            )
        return {}
    _require_initialised(model)
    reasons, found = obstacles(model), {}
    for layer in layers:
        base = _wrapped(layer)
        path = paths.get(id(base), type(base).__name__)
        if isinstance(getattr(layer, "parameter_name", None), str):
            raise ValueError(
                f"PEFT's layer {path!r} adapts the parameter {layer.parameter_name!r} by itself (target_parameters): a "
                "chain goes on with PEFT's linear layers alone. Give the model without an adapter, and name the "
                "parameter in LinkConfig(target_parameters=...)"
            )
        reason = peft.refusal(layer) or (reasons[path] if path in reasons else refusal(base))
        if reason is not None:
            raise ValueError(f"PEFT's {_about(path, reason)}")
        found[path] = layer
    return found


def obstacles(model: nn.Module, layers: Mapping[str, nn.Module] | None = None) -> dict[str, str]:
    """Why layers of ``model`` cannot carry a link, by canonical path, as the ends of sentences.

    Args:
        model: the model.
        layers: by path; None for everything that `reachable` finds.
    """
    modules = modules_by_name(model)
    shared, read = shared_weights(model), read_directly(modules)
    found = {}
    for path, layer in (reachable(modules) if layers is None else layers).items():
        kind = kind_of(layer)
        unread = None if kind is not None and issubclass(kind, ReadingLayer) else read.get(id(layer))
        reason = refusal(layer) or unread or _untieable(path, layer, shared, modules)
        if reason is not None:
            found[path] = reason
    return found


def borrowers(model: nn.Module, path: str, layer: nn.Module) -> list[nn.Module]:
    """The linear layers that share an embedding's whole weight; empty if none do.

    They can read the weight with the embedding's link, so that both ends stay one weight.
    """
    if not isinstance(layer, nn.Embedding):
        return []
    weight = known_kind(layer).parameter(layer)
    others = [m for m in modules_by_name(model).values() if m is not layer and m._parameters.get("weight") is weight]
    plain = all(isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward for m in others)
    return others if plain else []


def _wrapped(layer: nn.Module) -> nn.Module:
    """The model's module inside one or several of PEFT's layers."""
    while peft.is_tuner_layer(layer):
        layer = layer._modules["base_layer"]  # type: ignore[assignment]
    return layer


def find_saved(model: nn.Module, names: Sequence[str], targets: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The modules to train whole: those of ``modules_to_save``, whose ``names`` are whole paths or their ends.

    Raises:
        ValueError: a name matches nothing, or a module that holds a target's weight or cannot be trained.
    """
    modules = modules_by_name(model)
    linked = {id(known_kind(layer).parameter(layer)): path for path, layer in targets.items()}
    found: list[nn.Module] = []
    for name in names:
        paths = named(modules, name)
        if not paths:
            raise ValueError(unknown("modules_to_save", name, modules))
        for path in paths:
            inside = [t for t in targets if t == path or t.startswith(path + ".")]
            if inside:
                raise ValueError(
                    f"modules_to_save: {path!r} holds the adapted layer {inside[0]!r}: train one or the other"
                )
            shared = next((linked[id(p)] for p in modules[path].parameters() if id(p) in linked), None)
            if shared is not None:
                raise ValueError(
                    f"modules_to_save: {path!r} shares a weight with the adapted layer {shared!r}: train one or the "
                    "other (exclude_modules)"
                )
            kept = [p.dtype for p in modules[path].parameters() if not p.is_floating_point()]
            if kept:
                raise ValueError(
                    f"modules_to_save: {path!r} has {kept[0]} weights (quantised?), which cannot be trained: give it "
                    "links, or keep it from being quantised"
                )
            found.append(modules[path])
    return found


def unknown(kind: str, name: str, modules: dict[str, nn.Module]) -> str:
    """The message for a name that matches nothing, with the nearest names that exist."""
    paths = {id(module): path for path, module in modules.items()}
    for path, module in modules[""].named_modules(remove_duplicate=False):  # ``modules`` has one path of each
        if (path == name or path.endswith("." + name)) and id(module) in paths:
            return f"{kind}: {name!r} is another name of the module {paths[id(module)]!r}: use that one"
    last_parts = sorted({path.rsplit(".", 1)[-1] for path, module in modules.items() if is_linear(module)})
    near = difflib.get_close_matches(name, last_parts, n=3) or last_parts[:8]
    return f"{kind}: no module is called {name!r}; linear layers here are called {', '.join(near) or '(none)'}"


def _usable(
    model: nn.Module,
    modules: dict[str, nn.Module],
    target_modules: str | None,
    narrow: Callable[[Collection[str]], Collection[str]],
) -> dict[str, nn.Module]:
    """The layers that ``None`` or "all-linear" means; leaves out those that cannot carry a link, with a warning."""
    linear = [path for path, module in modules.items() if is_linear(module)]
    everything = reachable(modules) if target_modules == "all" else modules
    inner = unwrap(model)
    if target_modules is None:
        encoders = left_encoders(inner, modules)
        wanted = [path for path in query_value(modules) if not within(path, encoders)]
        if not wanted:
            names = dict.fromkeys(path.rsplit(".", 1)[-1] for path in linear)
            raise ValueError(
                "target_modules=None means the query and value projections, and this model has none that is known by "
                f"name: give target_modules='all-linear' or names among {', '.join([*names][:12]) or _kinds(modules)}"
            )
        if encoders:
            logger.warning(
                "target_modules=None puts links on the language model alone and leaves out %s: to train these parts, "
                "name their layers in target_modules",
                listed(encoders),
            )
    else:
        output = heads(inner, modules)
        wanted = [path for path in (everything if target_modules == "all" else linear) if path not in output]
    wanted, reasons = list(narrow(wanted)) if wanted else [], obstacles(model)
    found = {path: everything[path] for path in wanted if path not in reasons}
    reached = {id(borrower) for path, layer in found.items() for borrower in borrowers(model, path, layer)}
    by_reason: dict[str, list[str]] = {}
    for path in wanted:
        if path in reasons and id(modules.get(path)) not in reached:
            by_reason.setdefault(reasons[path], []).append(path)
            if reasons[path].startswith(_UNREADY):
                raise ValueError(f"target_modules={target_modules!r}: {_about(path, reasons[path])}")
    if not found:
        why = "; ".join(
            f"{listed(paths)}{'' if len(paths) == 1 else ' each'} {reason}" for reason, paths in by_reason.items()
        )
        raise ValueError(
            f"target_modules={target_modules!r}: the model has no linear layer that can carry a link: "
            f"{why or _kinds(modules)}"
        )
    for reason, paths in by_reason.items():
        subject, why = "it" if len(paths) == 1 else "each", reason.removesuffix(_TIED_ADVICE)
        logger.warning("target_modules=%r leaves out %s: %s %s", target_modules, listed(paths), subject, why)
    return found


def _about(path: str, reason: str) -> str:
    return f"{'the weight of' if reason.startswith('is tied') else 'layer'} {path!r} {reason}"


def _kinds(modules: dict[str, nn.Module]) -> str:
    kinds = dict.fromkeys(type(m).__name__ for m in modules.values() if _has_weight(m))
    return f"(no linear layer; it has {', '.join([*kinds][:6])})" if kinds else "(no linear layer)"


def _by_regex(modules: dict[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"target_modules={pattern!r} is not a regular expression: {error}") from None
    found = {path: m for path, m in modules.items() if path and expression.fullmatch(path) and _has_weight(m)}
    if not found:
        raise ValueError(
            unknown("target_modules", pattern, modules)
            + " (a string is a regular expression for the whole path; for names give a list)"
        )
    return found


def _by_names(modules: dict[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    if not len(names):
        raise ValueError("target_modules=[] is empty: give names, a regular expression, 'all-linear' or None")
    wanted = set()
    for name in names:
        paths = named(modules, name)
        if not paths:
            raise ValueError(unknown("target_modules", name, modules))
        wanted.update(paths)
    return {path: module for path, module in modules.items() if path in wanted}


def _has_weight(module: nn.Module) -> bool:
    return "weight" in module._parameters or isinstance(getattr(module, "weight", None), torch.Tensor)


_META = "has its weight on the meta device: load the weights before making a chain"
_INFERENCE = "was made under torch.inference_mode: its weight cannot be changed in place"
_OWNED = "already carries a link"
_TIED_ADVICE = ": leave the layer out, or untie the weights first"
# obstacles of the whole model, which the caller can remove
_UNREADY = (_META, _INFERENCE, _OWNED)


def _untieable(path: str, module: nn.Module, shared: dict[int, list[str]], modules: dict[str, nn.Module]) -> str | None:
    weight = known_kind(module).parameter(module)
    assert weight is not None  # refusal() has checked
    if id(weight) in shared and len(borrowers(modules[""], path, module)) + 1 != len(shared[id(weight)]):
        names = " and ".join(shared[id(weight)])
        for lender, other in modules.items():
            if other is not module and borrowers(modules[""], lender, other).count(module):
                return f"is tied ({names} are one tensor): give the link to {lender!r}, and both will carry it"
        return f"is tied ({names} are one tensor), so a knot would change them all{_TIED_ADVICE}"
    if weight.is_meta:
        return _META
    if not is_quantized(module) and weight.dtype not in TIEABLE:
        return f"has a {weight.dtype} weight (quantised?): links can be tied into fp32, fp64, bf16 and fp16"
    if not is_quantized(module) and odd_storage(weight):
        kind = f"{type(weight.data).__name__} of layout {weight.layout}"
        return f"has a weight that is a {kind} (quantised?): links can be tied into ordinary dense tensors"
    return _INFERENCE if weight.is_inference() else None


def _require_initialised(model: nn.Module) -> None:
    for name, parameter in parameters_by_name(model).items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"model: {name!r} has no shape yet (a lazy layer): run one batch through the model before making a "
                "ChainOptimizer"
            )
