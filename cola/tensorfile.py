"""Named tensors and one JSON value in a safetensors file, with the header checked before memory is taken."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from cola.files import StoreError, parse

_ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMS, _MAX_SIZE = 64, 1 << 63  # of torch; products of more and larger numbers could take for ever
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
        StoreError: the header is damaged, or promises other sizes than the file has.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    content = _check_header(data, path)
    try:
        return load_tensors(data), content
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise StoreError(f"{path} is not a readable safetensors file: {error}") from None


def _check_header(data: bytes, path: Path) -> Any:
    """Compare what the header promises with the bytes that are there; returns the JSON content."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise StoreError(f"{path} is not a safetensors file, or is truncated: {len(data)} bytes, header of {length}")
    header = parse(data[8 : 8 + length], path)
    if not isinstance(header, dict):
        raise StoreError(f"{path}: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    spans = []
    for name, entry in header.items():
        try:
            itemsize, shape, (start, stop) = _ITEMSIZE[entry["dtype"]], entry["shape"], entry["data_offsets"]
            sizes = [*shape, start, stop]
            if len(shape) > _MAX_DIMS:
                raise ValueError(f"{len(shape)} dimensions")
        except (TypeError, KeyError, ValueError):
            raise StoreError(f"{path}: its header does not describe tensor {name!r:.80}") from None
        if any(type(size) is not int or not 0 <= size <= len(data) for size in (start, stop)) or any(
            type(size) is not int or not 0 <= size < _MAX_SIZE for size in sizes
        ):
            raise StoreError(f"{path}: its header gives tensor {name!r:.80} impossible sizes")
        if math.prod(shape) * itemsize != stop - start:
            raise StoreError(
                f"{path}: tensor {name!r:.80} of shape {shape!s:.80} does not fit its {stop - start} bytes"
            )
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise StoreError(f"{path}: its tensors overlap or leave gaps")
        end = stop
    if end != len(data) - 8 - length:
        raise StoreError(f"{path}: its tensors take {end} bytes, and {len(data) - 8 - length} are there")
    if not isinstance(metadata, dict) or not isinstance(text := metadata.get(_KEY, "null"), str):
        raise StoreError(f"{path}: its header's metadata are not text")
    return parse(text.encode(), path)
