"""What an optimizer's state dict carries for the chain beside its counters: the tied links and the residuals.

It is a plain dict of tensors and one JSON text under the top-level key ``"cola"``, so `torch.save` and
``torch.load(weights_only=True)`` keep it. Distributed checkpointing drops top-level keys that it does not know.
Then the weights, which the model's own state dict brings, and the training go on exactly, but the chain lacks its first
links and says so when it is asked for them. A run with compensated rounding cannot go on like that, and is refused:
most of what its small updates have added up to may be in the residuals alone. Nor can one that re-quantises its weights
from the original codes and all links.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cola import replay
from cola.fingerprint import Fingerprint
from cola.live import LiveLink
from cola.store import Ledger, link_from_parts, link_to_parts
from cola.version import FORMAT

KEY = "cola"


@dataclass(frozen=True)
class Carried:
    """What was read: the chain (None if the entry was dropped), and the residual buffers by layer."""

    ledger: Ledger | None
    residuals: Mapping[str, Tensor]


def pack(ledger: Ledger, residuals: Mapping[str, Tensor]) -> dict[str, Any]:
    """The entry. Tensors are the live ones, not copies, as in any optimizer's state dict."""
    tensors: dict[str, Tensor] = {}
    links = []
    for link in ledger.links:
        parts, content = link_to_parts(link)
        tensors.update({f"{link.index}/{name}": tensor for name, tensor in parts.items()})
        links.append(content)
    text = json.dumps(
        {
            "version": FORMAT,
            "missing": ledger.missing,
            "keep": ledger.keep,
            "base": None if ledger.base is None else ledger.base.to_json(),
            "links": links,
            "residuals": list(residuals),
        }
    )
    return {"text": text, "links": tensors, "residuals": dict(residuals)}


def read(entry: Any, index: int, live: LiveLink, *, finished: bool = False) -> Carried:
    """The entry of a saved state, checked against the chain that is to go on.

    Args:
        entry: what `pack` gave; None where it was dropped.
        index: of the live link, i.e. the number of links tied before it.
        live: of the chain that is to go on; only read.
        finished: whether it does not go on, so that it needs no residuals.

    Raises:
        ValueError: damaged, a link is missing, or residuals are needed and were dropped.
    """
    if entry is None:
        carried = Carried(None, {})
    else:
        try:
            carried = _read(entry)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"the state's {KEY!r} entry, which holds the tied links, is damaged: {error}") from None
    ledger = carried.ledger
    if ledger is not None and ledger.missing + len(ledger.links) != index:
        held = [link.index for link in ledger.links]
        raise ValueError(f"the state is at link {index} and holds the links {held}: a link is missing")
    if finished:
        return carried
    if index and live.originals:
        if ledger is None or ledger.missing or not ledger.keep:
            raise ValueError(
                "quantized='requantize' needs all links at every knot, and the saved state lacks some: keep them "
                f"(keep_links=True), and save by opt.save, or by torch.save of opt.state_dict() with its {KEY!r} entry"
            )
        difference = None if ledger.base is None else replay.codes_differ(ledger.base, live.originals)
        if difference is not None:
            raise ValueError(
                f"quantized='requantize' starts from the original codes at every knot, and {difference}: make the "
                "ChainOptimizer over the untouched base, and load the model's state dict after that"
            )
    for path, layer in live.layers.items():
        if index and live.rounding_of(path) == "compensated":
            residual = carried.residuals.get(path)
            if residual is None:
                raise ValueError(
                    f"compensated rounding needs the residual of layer {path!r}, and the saved state has none: a "
                    f"framework dropped the state's {KEY!r} entry. Save such a run by opt.save, or by torch.save of "
                    "opt.state_dict()"
                )
            if residual.shape != layer.weight.shape:
                raise ValueError(
                    f"the residual of layer {path!r} is {tuple(residual.shape)}, the weight {tuple(layer.weight.shape)}"
                )
    return carried


def _read(entry: Mapping[str, Any]) -> Carried:
    content = json.loads(entry["text"])
    if content["version"] != FORMAT:
        raise ValueError(f"it has format {content['version']!r:.40}, and this version of cola reads format {FORMAT}")
    parts: list[dict[str, Tensor]] = [{} for _ in content["links"]]
    for name, tensor in entry["links"].items():
        number, _, part = name.partition("/")
        place = int(number) - content["missing"]
        if not 0 <= place < len(parts):
            raise ValueError(f"it has tensors of link {number}, which it does not describe")
        parts[place][part] = tensor.cpu()
    links = [link_from_parts(tensors, about) for tensors, about in zip(parts, content["links"])]
    base = None if content["base"] is None else Fingerprint.from_json(content["base"])
    residuals = {path: entry["residuals"][path] for path in content["residuals"]}
    return Carried(Ledger(links, content["missing"], content["keep"], base), residuals)
