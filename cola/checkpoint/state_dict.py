"""Keeps a run in an optimizer's state dict: the base's own entries, and one top-level entry ``"cola"``.

The entry holds a JSON text and plain tensors, so `torch.save` and ``torch.load(weights_only=True)`` keep it. The
model's own state dict brings the weights and the live link. Distributed checkpointing drops unknown top-level keys.
Training then continues exactly, but the chain lacks its first links and says so when they are needed.
"""

import json
from typing import Any

from torch import Tensor

from cola.chain.on_disk import ledger_of, ledger_to_json, link_from_parts, link_to_parts
from cola.checkpoint.state import Counters, RunState, decode, encode, require_format
from cola.common.version import FORMAT

KEY = "cola"


def to_state_dict(state: RunState) -> dict[str, Any]:
    """The optimizer's state dict with the entry. As in any state dict, the tensors are not copies."""
    assert state.chain is not None
    content, tensors = encode(state)
    links = []
    for link in state.chain.links:
        parts, about = link_to_parts(link)
        tensors.update({f"links/{link.index}/{name}": tensor for name, tensor in parts.items()})
        links.append(about)
    text = json.dumps({"version": FORMAT, **content, "chain": ledger_to_json(state.chain), "links": links})
    return {**state.optimizer, KEY: {"text": text, "tensors": tensors}}


def from_state_dict(state_dict: dict[str, Any]) -> RunState:
    """Read a run; its ``chain`` is None if a framework has dropped the entry.

    Raises:
        TypeError: ``state_dict`` is not a dict.
        ValueError: it has no counters, or is damaged.
    """
    counters = Counters.of(state_dict)
    optimizer = {key: value for key, value in state_dict.items() if key != KEY}
    entry = state_dict.get(KEY)
    if entry is None:
        return RunState(counters, optimizer)
    try:
        content = json.loads(entry["text"])
        require_format(content["version"], "it")
        tensors = dict(entry["tensors"])
        parts: list[dict[str, Tensor]] = [{} for _ in content["links"]]
        for name in [name for name in tensors if name.startswith("links/")]:
            number, _, part = name.removeprefix("links/").partition("/")
            place = int(number) - content["chain"]["missing"]
            if not 0 <= place < len(parts):
                raise ValueError(f"it has tensors of link {number}, which it does not describe")
            parts[place][part] = tensors.pop(name).cpu()
        links = [link_from_parts(own, about) for own, about in zip(parts, content["links"])]
        return decode(content, tensors, optimizer, ledger_of(content["chain"], links))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"the state's {KEY!r} entry, which holds the tied links, is damaged: {error}") from None
