"""Named tensors and one JSON value in a safetensors file."""

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
        metadata: header entries as other programs expect them, in the place of ``content``.

    Raises:
        TypeError: a tensor is of a kind (sparse, distributed, quantised subclass) that the format lacks.
    """
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter) or tensor.is_sparse or tensor.is_quantized:
            raise TypeError(f"{name!r} is a {type(tensor).__name__} ({tensor.layout}), which safetensors cannot hold")
    # a clone has a storage of its own: the format refuses tensors that share one
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, metadata or {_KEY: json.dumps(content, allow_nan=False)})


def load(data: bytes, path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and JSON value of a safetensors file.

    Args:
        data: the file's bytes.
        path: its name, for messages.

    Returns:
        The tensors by name, and what `dump` was given as ``content`` (None in files of other programs).

    Raises:
        StoreError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    content = _content(data, path)
    try:
        return load_tensors(data), content
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise StoreError(f"{path} is not a readable safetensors file: {error}") from None


def _content(data: bytes, path: Path) -> Any:
    """The JSON content in the header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise StoreError(f"{path} is not a safetensors file, or is truncated: {len(data)} bytes, header of {length}")
    header = parse(data[8 : 8 + length], path)
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(text := metadata.get(_KEY, "null"), str):
        raise StoreError(f"{path}: its header is not that of a safetensors file")
    return parse(text.encode(), path)
