"""Rebuilds weights from a base model and recorded links: ties them again as the run did, hence to the same bits.

The same bits need the same device, library versions, kernels and number of threads. Other setups sum in another order,
and their weights agree within the rounding of the weight's dtype.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from cola.chain.architecture import Architecture
from cola.chain.fingerprint import Digests, Fingerprint, LayerPrint, TensorPrint, prints_of
from cola.common.distributed import copy_whole
from cola.knot.tie import Tie, key, residual_like
from cola.lora import quantized, stacked
from cola.lora.kinds import is_quantized, known_kind, refusal
from cola.lora.layer import AdaptedLayer
from cola.lora.link import Factor, Link, Rows, combined
from cola.lora.names import (
    base_modules,
    base_tensors,
    buffers_by_name,
    canonical,
    layer_at,
    modules_by_name,
    parameters_by_name,
    shared_weights,
    unwrap,
    weight_name,
)
from cola.lora.token_rows import TokenRows, put_rows

logger = logging.getLogger("cola")

T = TypeVar("T")
Base = nn.Module | Mapping[str, Tensor]


def paths(links: Iterable[Link]) -> list[str]:
    """Paths of the layers that any of the links changes."""
    return list(dict.fromkeys(path for link in links for path in link.factors))


def take_fingerprint(
    model: nn.Module,
    layers: Iterable[str],
    *,
    whole: bool = False,
    known: Mapping[str, TensorPrint] | None = None,
    cache: Digests | None = None,
) -> Fingerprint:
    """Fingerprint of a model's base tensors.

    Args:
        model: with or without links on it.
        layers: paths of the adapted ones.
        whole: cover all parameters and persistent buffers and the architecture, not just those layers' weights.
        known: prints by name, used for tensors that are no longer the base model's.
        cache: remembers digests.
    """
    values, modules, known = base_tensors(model), base_modules(model), known or {}
    adapted = {path: _layer(modules, path) for path in layers}
    names = {path: weight_name(path, module) for path, module in adapted.items()}
    weights = {name: values.pop(name) for name in names.values()}
    parts: dict[str, Tensor] = {}  # of quantised layers: their codes, and the scales and links that go with them
    for path, module in adapted.items():
        if is_quantized(module):
            parts.update(_in_model(path, quantized.parts(module)))
    others = values if whole else {name: tensor for name, tensor in parts.items() if name not in weights}
    fresh = {name: tensor for name, tensor in {**others, **weights}.items() if name not in known}
    without = _rows_in_training(fresh, modules)
    prints = {**prints_of(fresh, (cache or Digests()).of(fresh, without), without), **known}
    layer_prints = {}
    for path, module in adapted.items():
        one, kind = prints[names[path]], known_kind(module)
        transposed = kind.is_transposed(module)
        layer_prints[path] = LayerPrint(one.shape, one.dtype, transposed, one.digest, kind.form(module))
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
    return Fingerprint(
        layer_prints,
        name if isinstance(name, str) and name else None,
        {name: prints[name] for name in others} if whole or others else None,
        Architecture.of(model) if whole else None,
    )


def codes_differ(recorded: Fingerprint, originals: Mapping[str, quantized.OriginalWeight]) -> str | None:
    """How the weights to re-quantise from differ from the recorded base model, in words; None if they do not."""
    tensors: dict[str, Tensor] = {}
    for path, original in originals.items():
        tensors.update(_in_model(path, original.stored))
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
    """Check that the links can be tied into ``model``. Changes nothing.

    Args:
        model: to tie the links into.
        links: to tie.
        recorded: fingerprint of the base model that they were trained on; None skips that comparison.
        base: holds the untouched weights; None if the model does.
        live: the model carries the caller's own live link.
        replaced: names of tensors whose values in the base do not matter, because they will be replaced (a trained
            head, which is drawn anew with every base model); None for those that the links record.

    Returns:
        The names in ``replaced`` whose values differ. A warning names them as well.

    Raises:
        ValueError: a layer is missing, has another shape or cannot be tied, or the base is another one.
    """
    untouched = model if base is None else base
    whole = isinstance(untouched, nn.Module)
    modules, values = modules_by_name(model), _values(untouched)
    theirs = modules_by_name(base) if isinstance(base, nn.Module) else modules
    together = {name: names for names in shared_weights(model).values() for name in names}
    for link in links:
        for path, factor in link.factors.items():
            _require_layer(path, factor, modules, live=live, stacked=live or base is not None)
            if not all(torch.isfinite(values).all() for triple in factor.triples() for values in triple[:2]):
                raise ValueError(f"link {link.index} has non-finite factors on {path!r}: no run ties such a link")
            layer = _layer(modules, path)
            quantised = is_quantized(layer)
            names = quantized.part_names(layer) if quantised and not whole else []
            for name in _in_model(path, dict.fromkeys(names)) or [weight_name(path, layer)]:
                if name not in values:
                    raise ValueError(f"base has no {name!r}: give the untouched model or its state dict")
            other = _layer(theirs, path)
            if quantised != is_quantized(other):
                raise ValueError(f"base has a {type(other).__name__} at {path!r}: give it quantised as the model is")
        for path, value in link.trained.items():
            shared = together.get(path, ())
            _require_trained_together(path, shared, link)
            # a file of weights may hold a shared one once
            stored = next((values[name] for name in (path, *shared) if name in values), None)
            if stored is None or stored.shape != value.shape:
                raise ValueError(f"the chain trained {path!r} {tuple(value.shape)}, which this model does not have")
        for name, rows in link.rows.items():
            _require_rows(name, rows, link, together.get(name, ()), values)
    for path in paths(links) if base is None else ():
        triples = [triple for link in links if path in link.factors for triple in link.factors[path].triples()]
        layer = _layer(modules, path)
        reason = known_kind(layer).obstacle(layer, triples)
        if reason is not None:
            raise ValueError(f"with the chain's links layer {path!r} {reason}: no run ties such a chain")
    if recorded is None:
        return []
    mine = {name for link in links for name in link.trained} if replaced is None else set(replaced)
    mine.update(*(together.get(name, ()) for name in tuple(mine)))
    tensors = base_tensors(untouched) if isinstance(untouched, nn.Module) else values
    others = []
    for difference in recorded.differences(tensors, all_of_it=whole):
        if not (difference.in_values and difference.name in mine):
            raise ValueError(f"wrong base: {difference.how}. Links belong on the weights that they were trained on")
        others.append(difference.name)
    if others:
        logger.warning("the base differs in %s, which the chain replaces by its own values", ", ".join(others))
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
        links: to tie.
        residuals: of compensated rounding, by layer; updated.
        device: for the residuals; None for the weight's own.
        originals: the weights to re-quantise from, by layer; updated. None for those that the layers hold.

    Returns:
        The `Tie` of each layer, per link.
    """
    modules, values, links = modules_by_name(model), _values(model), list(links)
    residuals = {} if residuals is None else residuals
    ties: list[dict[str, Tie]] = []
    codes = [path for path in paths(links) if is_quantized(_layer(modules, path))]
    for link in links:
        floats = [path for path in link.factors if path not in codes]
        ties.append({path: _tie_factor(_layer(modules, path), path, link, residuals, device) for path in floats})
        for path, value in link.trained.items():
            copy_whole(values[path], value)
        for name, rows in link.rows.items():
            put_rows(values[name], rows.indices, rows.values)
    for path in codes:
        module, both = modules[path], [(ours, link.factors.get(path)) for ours, link in zip(ties, links)]
        for way in quantized.QUANTIZED:  # requantise once for all links; a link uses one way only
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
    """Restore the base's values of all tensors that the links changed, and of ``also``. Call `check` first."""
    values, untouched, modules = _values(model), _values(base), modules_by_name(model)
    layers = {path: _layer(modules, path) for path in paths(links)}
    names = {path: weight_name(path, layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        if is_quantized(layer):
            quantized.untie(layer, _parts(layer, path, base))
            untouched.pop(names[path])
    changed = (path for link in links for path in (*link.trained, *link.rows))
    for name in dict.fromkeys((*names.values(), *changed, *also)):
        if name in untouched:  # `check` made sure that one of its names is there
            copy_whole(values[name], untouched[name])


def settle(model: nn.Module, links: Iterable[Link]) -> None:
    """Restore the plain classes of quantised layers that `untie` left without links."""
    modules = modules_by_name(model)
    for path in paths(links):
        stacked.settle(_layer(modules, path))


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


def _parts(module: nn.Module, path: str, base: Base) -> dict[str, Tensor]:
    """The tensors of a quantised layer in the base."""
    if isinstance(base, nn.Module):
        return quantized.parts(modules_by_name(base)[path])
    names, values = quantized.part_names(module), _values(base)
    return {name: values[full] for name, full in zip(names, _in_model(path, dict.fromkeys(names)))}


def _in_model(path: str, parts: Mapping[str, T]) -> dict[str, T]:
    """The parts of the layer at ``path``, by their names in the model."""
    return {f"{path}.{name}".lstrip("."): part for name, part in parts.items()}


def _values(model: Base) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        held: dict[str, Tensor] = {**parameters_by_name(model), **buffers_by_name(model)}
        return {name: tensor.detach() for name, tensor in held.items()}
    return {canonical(name): value for name, value in model.items()}


def _require_layer(path: str, factor: Factor, modules: dict[str, nn.Module], *, live: bool, stacked: bool) -> None:
    module, wanted = layer_at(modules, path), factor.shape
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


def _layer(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The layer at a path where `check` has found one."""
    layer = layer_at(modules, path)
    assert layer is not None
    return layer


def _rows_in_training(tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, list[int]]:
    """The rows that a live chain trains, by the names of their weights."""
    rows = {id(m.plain_weight): m.row_indices.tolist() for m in modules.values() if isinstance(m, TokenRows)}
    return {name: rows[id(tensor)] for name, tensor in tensors.items() if id(tensor) in rows}


def _require_rows(name: str, rows: Rows, link: Link, shared: Iterable[str], values: Mapping[str, Tensor]) -> None:
    """Refuse rows that the weight does not have, or that were trained apart for a weight that is shared here."""
    weight = next((values[other] for other in (name, *shared) if other in values), None)
    last, width = int(rows.indices[-1]), rows.values.shape[1]
    if weight is None or weight.dim() != 2 or last >= len(weight) or width != weight.shape[1]:
        has = "does not have" if weight is None else f"has as {tuple(weight.shape)}"
        raise ValueError(
            f"the chain trained row {last} of {name!r}, {width} wide, which this model {has}: add the new tokens to "
            "it first (resize_token_embeddings)"
        )
    for other in shared:
        theirs = link.rows.get(other, rows)
        if not (torch.equal(theirs.indices, rows.indices) and torch.equal(theirs.values, rows.values)):
            raise ValueError(
                f"the chain trained rows of {name!r} apart from those of {other!r}, and in this model they are one "
                "tensor (tied weights): untie them first"
            )


def _require_trained_together(path: str, shared: Iterable[str], link: Link) -> None:
    """Refuse values that were trained apart for a tensor that several modules of the model share."""
    for other in shared:
        value = link.trained.get(other)
        if value is None or (value is not link.trained[path] and not torch.equal(value, link.trained[path])):
            raise ValueError(
                f"the chain trained {path!r} apart from {other!r}, and in this model they are one tensor (tied "
                "weights): untie them first (in transformers: tie_word_embeddings=False and a copy of the weight)"
            )
