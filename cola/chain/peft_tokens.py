"""Trained rows of embeddings in PEFT's format: ``trainable_token_indices``, and the rows themselves in the file.

PEFT keeps the value of a row, not its change, so the rows of the last link are those of the chain. Like PEFT, which
looks for layers by the ends of their paths, this needs nothing but names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola.chain.files import StoreError
from cola.chain.fingerprint import Fingerprint
from cola.common.arguments import integer
from cola.lora.link import Link, Rows, are_rows
from cola.lora.names import require_plain_name
from cola.lora.per_layer import TOKENS

_DELTA = ".token_adapter.trainable_tokens_delta"


def exported(links: Sequence[Link], base: Fingerprint | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The rows that the chain has trained, as tensors of an adapter's file and entries of its configuration.

    Raises:
        ValueError: links trained different rows of a weight, or PEFT would confuse its layer with others.
    """
    tensors, indices = {}, {}
    for name, rows in {name: rows for link in links for name, rows in link.rows.items()}.items():
        require_plain_name(name)
        layer = name.removesuffix(".weight")
        every = [link.rows[name].indices for link in links if name in link.rows]
        if not all(torch.equal(own, rows.indices) for own in every):
            raise ValueError(
                f"an adapter in PEFT's format cannot hold {name!r}, of which the chain's links trained different rows. "
                "Save the merged model instead"
            )
        _require_findable(layer, links, base)
        tensors[f"{layer}{_DELTA}"] = rows.values
        indices[layer] = rows.indices.tolist()
    return tensors, {TOKENS: indices} if indices else {}


def imported(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path, prefix: str
) -> tuple[dict[str, Tensor], dict[str, Rows]]:
    """The rows in an adapter's file by the name of their weight, after the file's other tensors.

    Raises:
        StoreError: file and configuration disagree; names ``path``.
    """
    chosen = config.get(TOKENS) or {}
    others, rows = dict(tensors), {}
    for key in tensors:
        if not key.endswith(_DELTA):
            continue
        layer = key.removeprefix(prefix).removesuffix(_DELTA)
        try:
            require_plain_name(layer)
        except ValueError as error:
            raise StoreError(f"{path}: {error}") from None
        given = chosen
        if isinstance(chosen, dict):
            given = next((own for name, own in chosen.items() if layer.endswith(name)), None)
        if not isinstance(given, list) or not all(integer(i) is not None and 0 <= i < 1 << 62 for i in given):
            raise StoreError(f"{path} has rows of {layer!r:.120}, and {TOKENS}={chosen!r:.60} does not say which")
        order = sorted(range(len(given)), key=given.__getitem__)
        indices, values = torch.tensor(given, dtype=torch.int64)[order], others.pop(key)
        if values.dim() != 2 or len(values) != len(given) or not are_rows(indices, values):
            raise StoreError(f"{path} has {tuple(values.shape)} for the {len(given)} rows of {layer!r:.120}")
        rows[f"{layer}.weight"] = Rows(indices, values[order])
    if chosen and not rows:
        raise StoreError(f"{path} has no rows, and {TOKENS}={chosen!r:.60} promises some")
    return others, rows


def _require_findable(layer: str, links: Sequence[Link], base: Fingerprint | None) -> None:
    """Refuse a layer that PEFT would confuse with another, whose path ends the same, or change at one place alone."""
    built = base.architecture if base is not None else None
    if built is not None and layer in built.aliases:
        others = ", ".join(map(repr, built.aliases[layer]))
        raise ValueError(
            f"an adapter in PEFT's format cannot hold rows of {layer!r}: the model has this module at {others} as "
            "well, and PEFT would change it at one place alone. Save the merged model instead"
        )
    names = base.prints() if base is not None else {}
    modules = {name.rpartition(".")[0] for name in names} | {path for link in links for path in link.factors}
    other = next((m for m in sorted(modules) if m.endswith(layer) and m != layer), None)
    if other is not None:
        raise ValueError(
            f"an adapter in PEFT's format cannot hold rows of {layer!r}: PEFT would look for {other!r} too, whose path "
            "ends the same. Save the merged model instead"
        )
