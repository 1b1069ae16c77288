"""The weights from base and links: ties recorded links again, as the run did, hence to the same bits.

The same bits need the same device, library versions, kernels and number of threads; elsewhere the sums are taken in
another order, and the result agrees within the rounding of the weight's dtype.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cola.chain.architecture import Architecture
from cola.chain.fingerprint import Digests, Fingerprint, TensorPrint, fingerprint, weight_of
from cola.common.distributed import copy_whole
from cola.knot.tie import Tie, key, residual_like
from cola.lora import quantized, stacked
from cola.lora.kinds import is_quantized, known_kind, refusal
from cola.lora.layer import AdaptedLayer
from cola.lora.link import Factor, Link, combined
from cola.lora.names import (
    base_modules,
    base_tensors,
    buffers_by_name,
    canonical,
    modules_by_name,
    parameters_by_name,
    shared_weights,
    unwrap,
)

logger = logging.getLogger("cola")

Base = nn.Module | Mapping[str, Tensor]


def paths(links: Iterable[Link]) -> list[str]:
    """The layers that any of the links changes."""
    return list(dict.fromkeys(path for link in links for path in link.factors))


def take_fingerprint(
    model: nn.Module,
    layers: Iterable[str],
    *,
    whole: bool = False,
    known: Mapping[str, TensorPrint] | None = None,
    cache: Digests | None = None,
) -> Fingerprint:
    """`fingerprint` of a model.

    Args:
        model: as it is without links.
        layers: paths of the adapted ones.
        whole: cover all its parameters and persistent buffers, and its architecture, not those layers' weights alone.
        known: prints that stand for tensors which are no longer the base's.
        cache: where digests are remembered.
    """
    values, modules = base_tensors(model), base_modules(model)
    weights = {path: values.pop(weight_of(path)) for path in layers}
    parts = {name: t for path in weights for name, t in parts_of(path, modules[path]).items()}
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
    named = name if isinstance(name, str) and name else None
    rest = values if whole else parts or None
    built = Architecture.of(model) if whole else None
    flipped = transposed(model, weights)
    return fingerprint(weights, flipped, named, rest, known=known, cache=cache, architecture=built)


def parts_of(path: str, module: nn.Module) -> dict[str, Tensor]:
    """What a quantised layer has beside its codes, by name: scales, and the links stacked there; no other layer has."""
    if not is_quantized(module):
        return {}
    parts = {f"{path}.{name}".lstrip("."): tensor for name, tensor in quantized.parts(module).items()}
    parts.pop(weight_of(path))
    return parts


def transposed(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of the layers that store their weight in×out."""
    modules = base_modules(model)
    return [path for path in layers if known_kind(modules[path]).transposed]


def codes_differ(recorded: Fingerprint, originals: Mapping[str, quantized.OriginalWeight]) -> str | None:
    """How what quantised layers are re-quantised from differs from the recorded base, in words; None if it does not."""
    tensors = {
        f"{path}.{name}".lstrip("."): tensor
        for path, origin in originals.items()
        for name, tensor in origin.stored.items()
    }
    return next((difference.how for difference in recorded.differences(tensors, all_of_it=False)), None)


def check(
    model: nn.Module,
    links: Sequence[Link],
    recorded: Fingerprint | None,
    *,
    base: Base | None = None,
    live: bool = False,
    replaced: Iterable[str] | None = None,
) -> list[str]:
    """Whether the links can be tied into ``model``; changes nothing.

    Args:
        model: that will carry them.
        links: to be tied.
        recorded: fingerprint of the base that they were trained on; None skips that comparison.
        base: where the untouched weights are; None for the model itself.
        live: the model carries a live link of the caller's own.
        replaced: names of tensors whose values in the base do not matter, for they get others (a head that was trained
            whole, and is drawn anew with every base); None for those that the links record.

    Returns:
        The names among ``replaced`` whose values do differ; they are logged as well.

    Raises:
        ValueError: a layer is missing, of another shape, cannot be tied, or the base is another one.
    """
    modules, values = modules_by_name(model), _values(model if base is None else base)
    theirs = modules_by_name(base) if isinstance(base, nn.Module) else modules
    together = {name: names for names in shared_weights(model).values() for name in names}
    for link in links:
        for path, factor in link.factors.items():
            _require_layer(path, factor, modules, live=live, stacked=live or base is not None)
            if not all(torch.isfinite(values).all() for triple in factor.triples() for values in triple[:2]):
                raise ValueError(f"link {link.index} has non-finite factors on {path!r}: no run ties such a link")
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
    if recorded is None:
        return []
    mine = {name for link in links for name in link.trained} if replaced is None else set(replaced)
    mine.update(*(together.get(name, ()) for name in tuple(mine)))
    untouched = model if base is None else base
    whole = isinstance(untouched, nn.Module)
    tensors = base_tensors(untouched) if isinstance(untouched, nn.Module) else values
    others = []
    for difference in recorded.differences(tensors, all_of_it=whole):
        if not (difference.in_values and difference.name in mine):
            raise ValueError(f"wrong base: {difference.how}. Links belong on the weights that they were trained on")
        others.append(difference.name)
    if others:
        logger.warning("the base differs in %s, which the chain replaces by what it trained", ", ".join(others))
    return others


@torch.no_grad()
def tie_links(
    model: nn.Module,
    links: Iterable[Link],
    residuals: dict[str, Tensor] | None = None,
    device: str | None = "cpu",
    originals: Mapping[str, quantized.OriginalWeight] | None = None,
) -> list[dict[str, Tie]]:
    """Tie the links into the weights, in order. Call `check` first.

    Args:
        model: changed in place.
        links: to be tied.
        residuals: of compensated rounding, by layer; added to.
        device: where they are kept; None for the weight's own.
        originals: what quantised layers are re-quantised from, by layer; brought up to date. None for what they hold.

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
        for way in quantized.QUANTIZED:  # requantise once for all links; a link uses one mode only
            mine = [(ours, factor) for ours, factor in both if factor is not None and factor.rounding == way]
            original = None
            if mine and way == "requantize":
                original = (originals or {}).get(path) or quantized.OriginalWeight.of(module, device)
            did = iter(quantized.tie(module, [triple for _, f in mine for triple in f.triples()], original))
            for ours, factor in mine:
                ours[path] = combined([next(did) for _ in factor.triples()], factor)
    return ties


@torch.no_grad()
def untie(model: nn.Module, links: Sequence[Link], base: Base, also: Iterable[str] = ()) -> None:
    """Put the base's values back wherever the links changed something, and ``also`` there. Call `check` first."""
    values, untouched, modules = _values(model), _values(base), modules_by_name(model)
    for path in paths(links):
        if is_quantized(modules[path]):
            quantized.untie(modules[path], _parts(modules[path], path, base))
            untouched.pop(weight_of(path))
    changed = (path for link in links for path in link.trained)
    for name in dict.fromkeys((*map(weight_of, paths(links)), *changed, *also)):
        if name in untouched:  # check() has seen to it that it is there under one of its names
            copy_whole(values[name], untouched[name])


def settle(model: nn.Module, links: Iterable[Link]) -> None:
    """Give quantised layers that `untie` has left without links their plain classes again."""
    modules = modules_by_name(model)
    for path in paths(links):
        stacked.settle(modules[path])


def _tie_factor(module: nn.Module, path: str, link: Link, residuals: dict[str, Tensor], device: str | None) -> Tie:
    factor = link.factors[path]
    memory = None
    if factor.rounding == "compensated":
        if path not in residuals:
            weight: Tensor = module.weight  # type: ignore[assignment]
            residuals[path] = residual_like(weight, device or weight.device)
        memory = residuals[path]
    purposes = ("start", "rounding")[-len(factor.triples()) :]
    did = [
        known_kind(module).tie(
            module, triple, rounding=factor.rounding, seed=key(link.seed, link.index, path, purpose), memory=memory
        )
        for triple, purpose in zip(factor.triples(), purposes)
    ]
    return combined(did, factor)


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
        return [weight_of(path)]
    return [f"{path}.{name}".lstrip(".") for name in quantized.part_names(module)]


def _values(model: Base) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        held: dict[str, Tensor] = {**parameters_by_name(model), **buffers_by_name(model)}
        return {name: tensor.detach() for name, tensor in held.items()}
    return {canonical(name): value for name, value in model.items()}


def _require_layer(path: str, factor: Factor, modules: dict[str, nn.Module], *, live: bool, stacked: bool) -> None:
    module, wanted = modules.get(path), (factor.B.shape[0], factor.A.shape[1])
    if module is None:
        raise ValueError(f"the chain has a link on {path!r}, which this model does not have: is it the right base?")
    reason = None if live and isinstance(module, AdaptedLayer) else refusal(module, stacked=stacked)
    if reason is not None:
        raise ValueError(f"the chain has a link on {path!r}, which {reason}")
    shape = known_kind(module).shape(module)
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
