"""Turns an optimizer's state into JSON and named tensors, and back, exactly and without pickling.

JSON values stand for themselves, except objects. JSON lacks tuples, dicts with keys that are not text, infinite numbers
and tensors: each of these becomes an object with a single key that names its kind.
"""

import math
from typing import Any

from torch import Tensor

_ADVICE = "save the run by torch.save(opt.state_dict()) and the model's state dict instead"


def pack(value: Any, where: str, tensors: dict[str, Tensor], advice: str = _ADVICE) -> Any:
    """``value`` as a JSON value. Its tensors are added to ``tensors``.

    Args:
        value: None, bool, int, float, str, tensor, or nested lists, tuples and dicts of these.
        where: begins the names of tensors, and names places in messages.
        tensors: by name.
        advice: ends the message of an error.

    Raises:
        TypeError: it holds something else, which only pickling could keep; the message says where.

    >>> pack({0: (1.5, math.inf)}, "state", {})
    {'dict': [[0, {'tuple': [1.5, {'float': 'inf'}]}]]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        name, again = where, 0
        while name in tensors:  # keys such as 0 and "0", or "a/b" and "b" within "a", read alike
            again += 1
            name = f"{where}~{again}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{where}/{i}", tensors, advice) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {
            "dict": [
                [pack(key, f"{where}/key{i}", tensors, advice), pack(item, f"{where}/{key}", tensors, advice)]
                for i, (key, item) in enumerate(value.items())
            ]
        }
    raise TypeError(
        f"{where} is a {type(value).__name__} ({value!r:.60}), which cannot be saved without pickling: {advice}"
    )


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `pack` was given.

    Raises:
        ValueError: ``packed`` was not made by `pack`, or one of its tensors is missing.
    """
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1:
        ((kind, content),) = packed.items()
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "tensor" and content in tensors:
            return tensors[content]
        if kind == "tuple" and isinstance(content, list):
            return tuple(unpack(item, tensors) for item in content)
        if kind == "dict" and isinstance(content, list):
            return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    raise ValueError(f"{packed!r:.80} is not a packed value, or its tensor is missing")
