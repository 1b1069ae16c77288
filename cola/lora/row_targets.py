"""Finds the layers whose rows ``trainable_token_indices`` trains, and the layers that share their weights."""

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from cola.lora.kinds import known_kind, refusal
from cola.lora.names import modules_by_name, named, odd_storage, shared_weights, unwrap
from cola.lora.per_layer import TOKENS
from cola.lora.targets import WHOLE
from cola.lora.token_rows import TokenRows

logger = logging.getLogger("cola")


@dataclass(frozen=True)
class RowTarget:
    """Rows to train.

    Attributes:
        layer: an embedding, or an output head.
        indices: of the rows, increasing.
        others: layers that share the weight.
    """

    layer: nn.Module
    indices: list[int]
    others: list[nn.Module]


def find_rows(
    model: nn.Module, chosen: Sequence[int] | Mapping[str, Sequence[int]] | None, saved: Iterable[nn.Module]
) -> dict[str, RowTarget]:
    """The rows to train, by the path of their layer.

    Args:
        model: the model.
        chosen: as in `LinkConfig`.
        saved: modules that are trained whole.

    Raises:
        ValueError: a name matches nothing, an index is outside a weight, or a layer's rows cannot be trained by
            themselves.
    """
    if chosen is None:
        return {}
    modules, shared = modules_by_name(model), shared_weights(model)
    wanted = chosen if isinstance(chosen, Mapping) else {_input_embedding(model, modules): chosen}
    whole = {id(p) for module in saved for p in module.parameters()}
    found: dict[str, RowTarget] = {}
    owners: dict[int, str] = {}  # paths by weight
    for name, given in wanted.items():
        indices = sorted(given)
        for path in _named(modules, name):
            layer = modules[path]
            reason = _refusal(layer, indices)
            if reason is not None:
                raise ValueError(f"{TOKENS}: layer {path!r} {reason}")
            weight = layer._parameters["weight"]
            assert weight is not None
            if id(weight) in whole:
                raise ValueError(
                    f"{TOKENS}: the weight of {path!r} is trained whole by modules_to_save: train it or its rows"
                )
            first = owners.setdefault(id(weight), path)
            if first != path:
                if found[first].indices != indices:
                    raise ValueError(
                        f"{TOKENS}: {first!r} and {path!r} share one weight, and were given different rows: give the "
                        "same ones, or name one of the two"
                    )
                continue
            others = [m for m in modules.values() if m is not layer and m._parameters.get("weight") is weight]
            odd = next((m for m in others if _refusal(m, indices) is not None), None)
            names = shared.get(id(weight), [path])
            if odd is not None or len(names) != len(others) + 1:
                why = "" if odd is None else f": a {type(odd).__name__} could not read its trained rows"
                raise ValueError(f"{TOKENS}: the weight of {path!r} is shared ({' and '.join(names)}){why}")
            found[path] = RowTarget(layer, indices, others)
    return found


def require_no_link(rows: Mapping[str, RowTarget], layers: dict[str, nn.Module], target_modules: object) -> None:
    """Refuse links on layers with trained rows; ``target_modules="all"`` leaves them out of ``layers``.

    Raises:
        ValueError: target_modules names such a layer, or the model has no other.
    """
    mine = {id(module): path for path, row in rows.items() for module in (row.layer, *row.others)}
    for path, layer in list(layers.items()):
        if id(layer) not in mine:
            continue
        if target_modules not in WHOLE or len(layers) == 1:
            raise ValueError(
                f"{TOKENS} trains rows of {mine[id(layer)]!r}, and target_modules puts a link on {path!r}, whose "
                "weight it is: a layer has a link or trained rows"
            )
        del layers[path]
        logger.warning("target_modules=%r leaves out %s, whose rows %s trains", target_modules, path, TOKENS)


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """Path of the model's input embedding."""
    inner = unwrap(model)
    get = getattr(inner, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    path = next((path for path, module in modules.items() if module is embedding), None)
    path = path or next((path for path in modules if path.rpartition(".")[2] == "embed_tokens"), None)
    if path is None:
        raise ValueError(
            f"{TOKENS}: a list means rows of the input embedding, and a {type(inner).__name__} does not say which "
            f"layer that is: give a dict of its name and the list; {_there(modules)}"
        )
    return path


def _named(modules: dict[str, nn.Module], name: str) -> list[str]:
    paths = named(modules, name)
    if not paths:
        raise ValueError(f"{TOKENS}: no module is called {name!r}; {_there(modules, name)}")
    return paths


def _there(modules: Mapping[str, nn.Module], name: str = "") -> str:
    embeddings = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    near = difflib.get_close_matches(name, embeddings, n=3) or embeddings[:8]
    return f"embeddings here are called {', '.join(near) or '(none)'}"


def _refusal(layer: nn.Module, indices: Sequence[int]) -> str | None:
    """Why rows of a layer cannot be trained by themselves, as the end of a sentence; None if they can."""
    if isinstance(layer, TokenRows):
        return "has trained rows already: another ChainOptimizer owns this model; call its finish() first"
    if not isinstance(layer, (nn.Embedding, nn.Linear)):
        return f"is a {type(layer).__name__}: rows are trained of embeddings and output heads"
    reason = refusal(layer)
    if reason is not None:
        return reason
    weight = layer._parameters["weight"]
    assert weight is not None
    if known_kind(layer).quantized or not weight.is_floating_point() or odd_storage(weight):
        return "has a quantised weight, whose rows cannot be trained"
    if weight.is_meta or weight.is_inference():
        return "has a weight that cannot be changed (on the meta device, or made under torch.inference_mode)"
    if indices[-1] >= len(weight):
        return f"has {len(weight)} rows, and {indices[-1]} is not among them (resize_token_embeddings adds rows)"
    if getattr(layer, "scale_grad_by_freq", False):
        return "has scale_grad_by_freq, which would have no effect on trained rows"
    if getattr(layer, "padding_idx", None) in indices:
        return f"never trains row {layer.padding_idx}, its padding_idx: leave that index out"
    return None
