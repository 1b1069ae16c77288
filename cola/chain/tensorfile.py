"""Reads and writes safetensors files that hold named tensors and one JSON value."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from cola.chain.files import StoreError, parse

_KEY = "cola"


def dump(tensors: dict[str, Tensor], content: Any = None, *, metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file. Equal contents give equal bytes.

    Args:
        tensors: plain tensors on any device.
        content: a JSON value, kept as text in the header.
        metadata: the header's entries for other programs, instead of ``content``.

    Raises:
        TypeError: the format has no place for such a tensor (sparse, distributed, a quantised subclass).
    """
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter) or tensor.is_sparse or tensor.is_quantized:
            raise TypeError(f"{name!r} is a {type(tensor).__name__} ({tensor.layout}), which safetensors cannot hold")
    # cloned, because the format refuses tensors that share a storage
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, metadata or {_KEY: json.dumps(content, allow_nan=False)})


def load(data: bytes, path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name and the ``content`` given to `dump` (None in other programs' files), from a file's bytes.

    Raises:
        StoreError: the file is damaged; names ``path``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    content = _content(data, path)
    try:
        return load_tensors(data), content
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise StoreError(f"{path} is not a readable safetensors file: {error}") from None


def _content(data: bytes, path: Path) -> Any:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise StoreError(f"{path} is not a safetensors file, or is truncated: {len(data)} bytes, header of {length}")
    header = parse(data[8 : 8 + length], path)
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(text := metadata.get(_KEY, "null"), str):
        raise StoreError(f"{path}: its header is not that of a safetensors file")
    return parse(text.encode(), path)
