"""Which base a chain belongs to: a fingerprint of the weights that its links were added to.

It costs one pass over the adapted layers. The bits of a weight are summed as integers, block by block, plainly and
weighted by position; integer sums are exact in any order, so every device and thread count gives the same, and the
block sums are hashed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

# 2^31 (bits of an element) · 2^14 (weight) · 2^13 (elements) = 2^58: no sum of a block can overflow int64
_BLOCK = 1 << 13
_BLOCKS_AT_ONCE = 8  # 512 kB as int64, which a core's cache holds


@dataclass(frozen=True)
class LayerPrint:
    """One weight.

    Attributes:
        shape: as stored.
        dtype: e.g. ``"bfloat16"``.
        transposed: whether it is stored in×out (transformers' Conv1D).
        digest: of its bits.
    """

    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    digest: str


@dataclass(frozen=True)
class Fingerprint:
    """The base of a chain.

    Attributes:
        layers: per adapted layer.
        name: hub name or directory that the model says it came from; informal, never compared.
    """

    layers: Mapping[str, LayerPrint] = field(default_factory=dict)
    name: str | None = None

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits for all layers together."""
        text = "\n".join(f"{path} {asdict(layer)}" for path, layer in sorted(self.layers.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, other: "Fingerprint") -> str | None:
        """How ``other`` differs on the layers that both have, in words; None if it does not."""
        for path, mine in self.layers.items():
            theirs = other.layers.get(path)
            if theirs is None:
                continue
            if mine.shape != theirs.shape:
                return f"layer {path!r} is {theirs.shape}, in the chain's base it is {mine.shape}"
            if mine.dtype != theirs.dtype:
                return f"layer {path!r} is {theirs.dtype}, in the chain's base it is {mine.dtype}: load it as that"
            if mine.digest != theirs.digest:
                return f"the weight of layer {path!r} has other values than in the chain's base"
        return None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"name": self.name, "layers": {path: asdict(layer) for path, layer in self.layers.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        """From `to_json`'s."""
        layers = {
            path: LayerPrint(tuple(x["shape"]), x["dtype"], x["transposed"], x["digest"])
            for path, x in value["layers"].items()
        }
        return cls(layers, value["name"])


def fingerprint(weights: Mapping[str, Tensor], transposed: Iterable[str] = (), name: str | None = None) -> Fingerprint:
    """Take the fingerprint of weights.

    Args:
        weights: by the path of their layer.
        transposed: layers whose weight is stored in×out.
        name: of the base, informally.

    >>> weights = {"q_proj": torch.ones(2, 2)}
    >>> fingerprint(weights).difference(fingerprint(weights)) is None
    True
    """
    flipped = set(transposed)
    layers = {
        path: LayerPrint(tuple(w.shape), str(w.dtype).removeprefix("torch."), path in flipped, checksum(w))
        for path, w in weights.items()
    }
    return Fingerprint(layers, name)


@torch.no_grad()
def checksum(weight: Tensor) -> str:
    """Digest of a tensor's bits and their order."""
    if hasattr(weight, "full_tensor"):  # sharded: one layer at a time is gathered
        weight = weight.full_tensor()
    words = {1: torch.uint8, 2: torch.int16}.get(weight.element_size(), torch.int32)
    bits = weight.detach().contiguous().view(-1).view(words)
    order = torch.arange(1, _BLOCK + 1, dtype=torch.int64, device=bits.device)
    at_once = _BLOCKS_AT_ONCE if bits.device.type == "cpu" else 1 << 10
    plain, weighted = [], []
    whole = bits.numel() // _BLOCK * _BLOCK
    for part in (*bits[:whole].split(_BLOCK * at_once), bits[whole:]):
        if part.numel():
            block = part.view(-1, min(_BLOCK, part.numel())).long()
            plain.append(block.sum(1))
            weighted.append(block.mul_(order[: block.shape[1]]).sum(1))
    total = torch.cat([*plain, *weighted]).cpu() if plain else torch.zeros(0, dtype=torch.int64)
    return hashlib.sha256(total.numpy().tobytes()).hexdigest()[:32]
