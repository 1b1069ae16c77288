"""Parts of a fused projection: which output rows of a layer make up its query, key, value, gate or up projection.

A layer whose parts have links of ranks r_q, r_k, … carries one link of rank Σr. A holds the parts' A one under the
other, and B is zero but for each part's own rows in its own columns (`cola.lora.parted`).
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from cola.common.arguments import integer
from cola.lora.per_layer import expression, unmatched


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a layer.

    Attributes:
        name: such as ``"q"``.
        rank: of the first link.
        rows: the output rows, int64, rising, on the CPU.
    """

    name: str
    rank: int
    rows: Tensor

    def describe(self) -> list[Any]:
        """Name, rank, number of rows and their digest, as JSON values."""
        digest = hashlib.sha256(self.rows.numpy().astype("<i8").tobytes()).hexdigest()[:16]
        return [self.name, self.rank, len(self.rows), digest]


#: number of groups of rows, and the rows of each part in a group, in order
Layout = tuple[int, Mapping[str, int]]


def _equal(size: int, names: str = "qkv") -> Layout:
    return 1, dict.fromkeys(names, size)


def _grouped(heads: int, pairs: int, width: int) -> Layout:
    """All queries, then all keys, then all values."""
    return 1, {"q": heads * width, "k": pairs * width, "v": pairs * width}


def _by_head(heads: int, width: int) -> Layout:
    """Query, key and value of one head, then those of the next."""
    return heads, dict.fromkeys("qkv", width)


def _gpt2(attention: Any) -> Layout:
    return _equal(attention.embed_dim, "kv" if attention.is_cross_attention else "qkv")


def _phi3(attention: Any) -> Layout:
    config = attention.config
    return _grouped(config.num_attention_heads, config.num_key_value_heads, attention.head_dim)


def _falcon(attention: Any) -> Layout:
    heads, pairs, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    if attention.new_decoder_architecture:
        return pairs, {"q": heads // pairs * width, "k": width, "v": width}
    return _grouped(heads, 1, width) if attention.multi_query else _by_head(heads, width)


def _bigcode(attention: Any) -> Layout:
    if attention.is_cross_attention:
        return _equal(attention.embed_dim, "kv")
    heads, width = attention.num_heads, attention.head_dim
    return _grouped(heads, 1, width) if attention.multi_query else _by_head(heads, width)


def _gate_up(mlp: Any) -> Layout:
    return 1, dict.fromkeys(("gate", "up"), mlp.gate_up_proj.out_features // 2)


#: class of the module (of transformers) that holds the projection -> the projection's name, and its layout
LAYOUTS: Mapping[str, tuple[str, Callable[[Any], Layout]]] = {
    "GPT2Attention": ("c_attn", _gpt2),
    "GPTBigCodeAttention": ("c_attn", _bigcode),
    "MptAttention": ("Wqkv", lambda a: _equal(a.hidden_size)),
    "DbrxAttention": ("Wqkv", lambda a: _grouped(a.num_heads, a.num_key_value_heads, a.head_dim)),
    "ModernBertAttention": ("Wqkv", lambda a: _equal(a.config.num_attention_heads * a.head_dim)),
    "Phi3Attention": ("qkv_proj", _phi3),
    "GPTNeoXAttention": ("query_key_value", lambda a: _by_head(a.config.num_attention_heads, a.head_size)),
    "BloomAttention": ("query_key_value", lambda a: _by_head(a.num_heads, a.head_dim)),
    "PersimmonAttention": ("query_key_value", lambda a: _by_head(a.num_heads, a.head_dim)),
    "FalconAttention": ("query_key_value", _falcon),
    **dict.fromkeys(("Phi3MLP", "GlmMLP", "Glm4MLP", "Glm4vTextMLP", "DiaMLP"), ("gate_up_proj", _gate_up)),
}


def known_rows(owner: nn.Module, name: str, out: int) -> dict[str, Tensor]:
    """The rows of each part of the projection ``name`` of ``owner``, which has ``out`` rows; empty if unknown."""
    for kind in type(owner).__mro__:
        projection, layout = LAYOUTS.get(kind.__name__, ("", None))
        if projection == name and layout is not None:
            groups, sizes = layout(owner)
            if groups * sum(sizes.values()) != out:
                return {}  # a shard of it
            cut = torch.arange(out, device="cpu").view(groups, -1).split(list(sizes.values()), 1)
            return {part: rows.flatten() for part, rows in zip(sizes, cut)}
    return {}


def require_valid(parts: Any) -> None:
    """Check the ``parts`` of a LinkConfig.

    Raises:
        ValueError, TypeError: it is no such dict, or a rank or row is out of range.
    """
    if not isinstance(parts, Mapping):
        raise TypeError(f"parts={parts!r:.200} must be a dict of layers' names, each with a dict of its parts")
    for pattern, chosen in parts.items():
        expression("parts", pattern)
        if not isinstance(chosen, Mapping) or not chosen:
            raise TypeError(f"parts={{{pattern!r}: {chosen!r:.200}}} must give a dict of parts, such as {{'q': 8}}")
        for name, value in chosen.items():
            where = f"parts={{{pattern!r}: {{{name!r}: {value!r:.200}}}}}"
            pair = value if isinstance(value, tuple) and len(value) == 2 else (value, range(1))
            rank = integer(pair[0])
            if not isinstance(name, str) or rank is None or rank <= 0:
                raise ValueError(f"{where} must give a positive rank, or a tuple (rank, rows)")
            if not all(isinstance(rows, range) and len(rows) and min(rows) >= 0 for rows in _ranges(pair[1])):
                raise ValueError(
                    f"{where} must give the rows as a range of numbers from 0, or a list of such ranges: "
                    "(8, range(0, 64))"
                )


def parts_of(
    link: Any, shapes: Mapping[str, tuple[int, ...] | None], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[Part, ...]]:
    """The parts of the layers that ``parts`` matches; a layer belongs to the first name that matches it.

    Args:
        link: a LinkConfig.
        shapes: (out, in) of the adapted layers, by path; None for those that cannot have parts.
        modules: all modules of the model, by path.

    Raises:
        ValueError: a name matches no layer, a layer or a part of it is unknown, or a rank or a row does not fit.
    """
    found: dict[str, tuple[Part, ...]] = {}
    for pattern, chosen in link.parts.items():
        mine = [path for path in shapes if path not in found and re.match(rf"(.*\.)?({pattern})$", path)]
        if not mine:
            raise unmatched("parts", pattern, shapes)
        for path in mine:
            shape = shapes[path]
            if shape is None:
                raise ValueError(f"parts={{{pattern!r}: …}} matches {path!r}, which is no linear layer: leave it out")
            taken = next((p for p in link.rank_pattern if re.match(rf"(.*\.)?({p})$", path)), None)
            if taken is not None:
                raise ValueError(f"rank_pattern={{{taken!r}: …}} and parts both give ranks to {path!r}: leave one out")
            owner, _, name = path.rpartition(".")
            known = known_rows(modules[owner], name, shape[0])
            found[path] = tuple(_part(path, shape, known, *item) for item in chosen.items())
            _require_disjoint(path, found[path])
    return found


def _part(path: str, shape: tuple[int, ...], known: Mapping[str, Tensor], name: str, value: Any) -> Part:
    rank, given = value if isinstance(value, tuple) else (value, None)
    out, inner = shape
    if given is not None:
        rows = torch.tensor(sorted({row for rows in _ranges(given) for row in rows}), device="cpu")
        if rows[-1] >= out:
            raise ValueError(f"parts: {name!r} has row {rows[-1]}, and the weight of layer {path!r} is {out}x{inner}")
    elif name in known:
        rows = known[name]
    elif known:
        raise ValueError(f"parts: layer {path!r} has the parts {', '.join(known)}, and no {name!r}")
    else:
        raise ValueError(
            f"parts: which of the {out} rows of layer {path!r} are {name!r} is not known here: say it, such as "
            f"{{{name!r}: ({rank}, range({out // 3}))}}"
        )
    if rank > min(len(rows), inner):
        raise ValueError(
            f"parts: rank {rank} of {name!r} is above the rank of that part of layer {path!r}, which is "
            f"{len(rows)}x{inner}"
        )
    return Part(name, rank, rows)


def _ranges(rows: Any) -> Sequence[Any]:
    return list(rows) if isinstance(rows, (list, tuple)) else [rows]


def _require_disjoint(path: str, parts: Sequence[Part]) -> None:
    owner: dict[int, str] = {}
    for part in parts:
        for row in part.rows.tolist():
            if row in owner:
                raise ValueError(f"parts: row {row} of layer {path!r} is in {owner[row]!r} and in {part.name!r}")
            owner[row] = part.name


def slices(ranks: Sequence[int]) -> list[slice]:
    """The directions of each part in a link of these ranks.

    >>> slices([8, 4])
    [slice(0, 8, None), slice(8, 12, None)]
    """
    return [slice(end - rank, end) for rank, end in zip(ranks, accumulate(ranks))]


def joined(pairs: Sequence[tuple[Tensor, Tensor]], parts: Sequence[Part], out: int) -> tuple[Tensor, Tensor]:
    """The parts' factors (A_p, B_p) as those of one link: the A stacked, each B in its own rows and columns."""
    ranks = [len(A) for A, _ in pairs]
    B = pairs[0][1].new_zeros(out, sum(ranks))
    for part, (_, own), directions in zip(parts, pairs, slices(ranks)):
        B[part.rows, directions] = own
    return torch.cat([A for A, _ in pairs]), B
