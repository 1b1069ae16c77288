"""The weights from base and links: ties recorded links again, as the run did, hence to the same bits.

The same bits need the same device and library versions; elsewhere the sums are taken in another order, and the result
agrees within the rounding of the weight's dtype.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cola.adapters import AdaptedLayer, adapted_class, is_quantized, quantized, refusal
from cola.adapters.codes import codes_of
from cola.adapters.targets import canonical, modules_by_name, parameters_by_name, shared_weights, unwrap
from cola.distributed import copy_whole, tie_anywhere
from cola.fingerprint import Fingerprint, LayerPrint, checksum, fingerprint
from cola.link import Factor, Link
from cola.tie import Tie, key, residual_like

Base = nn.Module | Mapping[str, Tensor]


def layer_class(module: nn.Module) -> type[AdaptedLayer]:
    """How ``module`` stores its weight, whether it carries a live link or not."""
    return type(module) if isinstance(module, AdaptedLayer) else adapted_class(module)


def paths(links: Iterable[Link]) -> list[str]:
    """The layers that any of the links changes."""
    return list(dict.fromkeys(path for link in links for path in link.factors))


def take_fingerprint(model: nn.Module, layers: Iterable[str], base: Base | None = None) -> Fingerprint:
    """`fingerprint` of the named layers.

    Args:
        model: whose layers they are.
        layers: their paths.
        base: where their weights are read; None for the model itself.
    """
    modules = modules_by_name(model)
    values = _values(model if base is None else base)
    held = {path: modules[path] for path in layers}
    codes = {path: _print(module, _parts(module, path, base)) for path, module in held.items() if is_quantized(module)}
    weights = {path: values[_weight_of(path)] for path in held if path not in codes}
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
    transposed = [path for path in weights if layer_class(modules[path]).transposed]
    found = fingerprint(weights, transposed, name if isinstance(name, str) and name else None)
    return Fingerprint({path: codes.get(path) or found.layers[path] for path in held}, found.name)


def print_origins(model: nn.Module, origins: Mapping[str, quantized.Origin]) -> Fingerprint:
    """`fingerprint` of what quantised layers are re-quantised from."""
    modules = modules_by_name(model)
    return Fingerprint({path: _print(modules[path], origin.stored) for path, origin in origins.items()})


def check(
    model: nn.Module,
    links: Sequence[Link],
    recorded: Fingerprint | None,
    *,
    base: Base | None = None,
    live: bool = False,
) -> None:
    """Whether the links can be tied into ``model``; changes nothing.

    Args:
        model: that will carry them.
        links: to be tied.
        recorded: fingerprint of the base that they were trained on; None skips that comparison.
        base: where the untouched weights are; None for the model itself.
        live: the model carries a live link of the caller's own.

    Raises:
        ValueError: a layer is missing, of another shape, cannot be tied, or has other weights.
    """
    modules, values = modules_by_name(model), _values(model if base is None else base)
    theirs = modules_by_name(base) if isinstance(base, nn.Module) else modules
    together = {name: names for names in shared_weights(model).values() for name in names}
    for link in links:
        for path, factor in link.factors.items():
            _require_layer(path, factor, modules, live=live, stacked=live or base is not None)
            for name in _stored_names(modules[path], path, base):
                if name not in values:
                    raise ValueError(f"base has no {name!r}: give the untouched model or its state dict")
            if is_quantized(modules[path]) != is_quantized(theirs[path]):
                raise ValueError(
                    f"base has a {type(theirs[path]).__name__} at {path!r}: give it quantised as the model is"
                )
        for path, value in link.trained.items():
            tied = together.get(path, ())
            _require_trained_together(path, tied, link)
            # a file of weights may hold a tied one once
            stored = next((values[name] for name in (path, *tied) if name in values), None)
            if stored is None or stored.shape != value.shape:
                raise ValueError(f"the chain trained {path!r} {tuple(value.shape)}, which this model does not have")
    if recorded is not None:
        layers = [
            path
            for path in recorded.layers
            if path in modules and all(name in values for name in _stored_names(modules[path], path, base))
        ]
        difference = recorded.difference(take_fingerprint(model, layers, base))
        if difference is not None:
            raise ValueError(f"wrong base: {difference}. Links belong on the weights that they were trained on")


@torch.no_grad()
def tie_links(
    model: nn.Module,
    links: Iterable[Link],
    residuals: dict[str, Tensor] | None = None,
    device: str | None = "cpu",
    origins: Mapping[str, quantized.Origin] | None = None,
) -> list[dict[str, Tie]]:
    """Tie the links into the weights, in order. Call `check` first.

    Args:
        model: changed in place.
        links: to be tied.
        residuals: of compensated rounding, by layer; added to.
        device: where they are kept; None for the weight's own.
        origins: what quantised layers are re-quantised from, by layer; brought up to date. None for what they hold.

    Returns:
        What each tie did, per link and layer.
    """
    modules, values, links = modules_by_name(model), _values(model), list(links)
    residuals = {} if residuals is None else residuals
    ties: list[dict[str, Tie]] = []
    codes = [path for path in paths(links) if is_quantized(modules[path])]
    for link in links:
        floats = [path for path in link.factors if path not in codes]
        ties.append({path: _tie_factor(modules[path], path, link, residuals, device) for path in floats})
        for path, value in link.trained.items():
            copy_whole(values[path], value)
    for path in codes:
        module, both = modules[path], [(ours, link.factors.get(path)) for ours, link in zip(ties, links)]
        for way in quantized.QUANTIZED:  # all links at once: they are quantised once; the two ways do not meet
            mine = [(ours, factor) for ours, factor in both if factor is not None and factor.rounding == way]
            origin = None
            if mine and way == "requantize":
                origin = (origins or {}).get(path) or quantized.Origin.of(module, device)
            did = quantized.tie(module, [(f.A, f.B, f.scaling) for _, f in mine], origin)
            for (ours, _), one in zip(mine, did):
                ours[path] = one
    return ties


@torch.no_grad()
def untie(model: nn.Module, links: Sequence[Link], base: Base) -> None:
    """Put the base's values back wherever the links changed something. Call `check` first."""
    values, untouched, modules = _values(model), _values(base), modules_by_name(model)
    for path in paths(links):
        if is_quantized(modules[path]):
            quantized.untie(modules[path], _parts(modules[path], path, base))
            untouched.pop(_weight_of(path))
    for name in dict.fromkeys((*map(_weight_of, paths(links)), *(path for link in links for path in link.trained))):
        if name in untouched:  # check() has seen to it that it is there under one of its names
            copy_whole(values[name], untouched[name])


def settle(model: nn.Module, links: Iterable[Link]) -> None:
    """Give quantised layers that `untie` has left without links their plain classes again."""
    modules = modules_by_name(model)
    for path in paths(links):
        quantized.settle(modules[path])


def _tie_factor(module: nn.Module, path: str, link: Link, residuals: dict[str, Tensor], device: str | None) -> Tie:
    factor = link.factors[path]
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    left, right = layer_class(module).factors(factor.A, factor.B)
    compensated = factor.rounding == "compensated"
    if compensated and path not in residuals:
        residuals[path] = residual_like(weight, device or weight.device)
    return tie_anywhere(
        weight,
        left,
        right,
        factor.scaling,
        rounding=factor.rounding,
        seed=key(link.seed, link.index, path, "rounding"),
        residual=residuals[path] if compensated else None,
    )


def _print(module: nn.Module, parts: Mapping[str, Tensor]) -> LayerPrint:
    """Of a quantised layer: codes, scales and what is stacked beside them."""
    codes = codes_of(module)
    text = "\n".join(f"{name} {tuple(t.shape)} {t.dtype} {checksum(t)}" for name, t in sorted(parts.items()))
    return LayerPrint(codes.shape, codes.kind, False, hashlib.sha256(text.encode()).hexdigest()[:32])


def _parts(module: nn.Module, path: str, base: Base | None) -> dict[str, Tensor]:
    """What a quantised layer is made of: the model's own, or in the base's place."""
    if base is None:
        return quantized.parts(module)
    if isinstance(base, nn.Module):
        return quantized.parts(modules_by_name(base)[path])
    values = _values(base)
    return {name: values[f"{path}.{name}".lstrip(".")] for name in quantized.part_names(module)}


def _stored_names(module: nn.Module, path: str, base: Base | None) -> list[str]:
    """Under what names a base holds the weight of a layer."""
    if base is None or isinstance(base, nn.Module) or not is_quantized(module):
        return [_weight_of(path)]
    return [f"{path}.{name}".lstrip(".") for name in quantized.part_names(module)]


def _values(model: Base) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return {name: parameter.detach() for name, parameter in parameters_by_name(model).items()}
    return {canonical(name): value for name, value in model.items()}


def _weight_of(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def _require_layer(path: str, factor: Factor, modules: dict[str, nn.Module], *, live: bool, stacked: bool) -> None:
    module, wanted = modules.get(path), (factor.B.shape[0], factor.A.shape[1])
    if module is None:
        raise ValueError(f"the chain has a link on {path!r}, which this model does not have: is it the right base?")
    reason = None if live and isinstance(module, AdaptedLayer) else refusal(module, stacked=stacked)
    if reason is not None:
        raise ValueError(f"the chain has a link on {path!r}, which {reason}")
    shape = layer_class(module).shape(module)
    if shape != wanted:
        raise ValueError(f"the chain's link on {path!r} is {wanted}, the layer is {shape}: is it the right base?")
    codes = is_quantized(module)
    if codes != (factor.rounding in quantized.QUANTIZED):
        kind = "is quantised" if codes else "is not quantised"
        raise ValueError(
            f"the chain's link on {path!r} was tied by {factor.rounding!r}, and the layer {kind}: load the base as the "
            "run had it" + ("; an adapter is read for it by from_peft(..., rounding='stack')" if codes else "")
        )


def _require_trained_together(path: str, tied: Iterable[str], link: Link) -> None:
    """A tensor that several modules of the model share must have been one when it was trained."""
    for other in tied:
        value = link.trained.get(other)
        if value is None or (value is not link.trained[path] and not torch.equal(value, link.trained[path])):
            raise ValueError(
                f"the chain trained {path!r} apart from {other!r}, and in this model they are one tensor (tied "
                "weights): untie them first (in transformers: tie_word_embeddings=False and a copy of the weight)"
            )
