"""A weight with a link on it, for layers whose own code reads the weight: ``W + s·L R``, and never formed if possible.

`LinkedWeight` looks like W to the code that reads it. Products, look-ups and convolutions with it are taken of W and of
the factors apart; taking some experts of a stack takes their factors. An operation without a rule gets the sum itself,
which is right and costs the memory of a weight.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cola.common.contexts import transformed

logger = logging.getLogger("cola")


class LinkedWeight(Tensor):
    """``W + s·L R`` in place of W, while a model computes.

    Attributes:
        plain: W, m×n, E×m×n, or a convolution's.
        left: L, m×r or E×m×r.
        right: R, r×n or E×r×n.
        scaling: s.
        dropout: probability that an input of the link's product is dropped.
        title: names the weight in messages.
        matrices: those of a stack once they were asked for, by whether a graph was recorded.

    >>> W = linked(torch.ones(2, 3), torch.ones(2, 1), torch.ones(1, 3), 0.5)
    >>> F.linear(torch.ones(3), W)
    tensor([4.5000, 4.5000])
    >>> W.sum()
    tensor(9.)
    """

    plain: Tensor
    left: Tensor
    right: Tensor
    scaling: float
    dropout: float
    title: str
    matrices: dict[bool, tuple["LinkedWeight", ...]]

    #: what happens where a function has no rule, and where not even the sum can be given, as the ends of messages
    formed: ClassVar[str] = (
        "a link cannot follow: W + sBA is formed there at every call, which takes the memory of another weight (and "
        "drops no inputs)"
    )
    refused: ClassVar[str] = "its link could not follow: leave the layer out of target_modules (exclude_modules)"

    @classmethod
    def rule(cls, func: Any) -> Callable[..., Any] | None:
        """What computes ``func`` without the sum; None if nothing does."""
        return RULES.get(func) or (_grouped if "grouped_mm" in str(func) else None)

    def summed(self) -> Tensor:
        """``W + s·L R``, formed."""
        delta = (self.left @ self.right).reshape(self.plain.shape)
        return torch.add(self.plain, delta.to(self.plain.dtype), alpha=self.scaling)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Apply the rule for ``func``, or give it the sum."""
        kwargs = kwargs or {}
        rule, name = cls.rule(func), getattr(func, "__name__", "")
        found = NotImplemented if rule is None else rule(*args, **kwargs)
        if found is not NotImplemented:
            return found
        replaced = func == _SET_DATA and not isinstance(args[1], LinkedWeight)  # as resize_token_embeddings does
        if replaced or name in _ASSIGN or (name.endswith("_") and not name.endswith("__")):
            for weight in _all(args[:1] or [*kwargs.values()][:1], {}):
                raise RuntimeError(
                    f"{weight.title} is changed by {'data = …' if replaced else name} while it carries a link, and the "
                    "change would be lost, or the link would count twice: finish() the chain first, or leave the layer "
                    "out of target_modules (exclude_modules)"
                )
        if name in ("__get__", "__set__") or name in _ABOUT:  # its shape, its dtype, …
            weights = [w for w in (*args, *kwargs.values()) if isinstance(w, LinkedWeight)]
            about = func(*(_plain(a) for a in args), **{k: _plain(v) for k, v in kwargs.items()})
            if not isinstance(about, Tensor):
                return about
        else:
            weights = []
        if func is not F.multi_head_attention_forward and name not in _READS:
            _tell(next((w.title for w in weights or _all(args, kwargs)), ""), name or str(func), cls.formed)
        return func(*(_sums(a) for a in args), **{k: _sums(v) for k, v in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse code that goes past `__torch_function__`, where a link would have no effect."""
        name = next((w.title for w in _all(args, kwargs or {})), "a weight")
        raise RuntimeError(
            f"{name} is read by a custom function ({func}), which {cls.refused}, or choose the model's plain "
            "implementation"
        )


def linked(
    plain: Tensor, left: Tensor, right: Tensor, scaling: float, dropout: float = 0.0, title: str = "a weight"
) -> LinkedWeight:
    """``plain`` with a link on it; see `LinkedWeight`."""
    trained = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad) and not transformed()
    weight: Any = _Joined.apply(plain, left, right, scaling) if trained else wrapper(LinkedWeight, plain)
    weight.plain, weight.left, weight.right = plain, left, right
    weight.scaling, weight.dropout, weight.title, weight.matrices = scaling, dropout, title, {}
    return weight


def wrapper(kind: type[LinkedWeight], plain: Tensor) -> Any:
    """A tensor of class ``kind`` that looks like ``plain`` and holds nothing yet."""
    about: Any = {"strides": plain.stride(), "dtype": plain.dtype, "device": plain.device}
    return torch.Tensor._make_wrapper_subclass(kind, plain.shape, **about)


class _Joined(torch.autograd.Function):
    """The link's place in the graph, for custom functions, whose backward gives a gradient of the whole weight."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.scaling = scaling
        return wrapper(LinkedWeight, plain)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (left, right) = grads, ctx.saved_tensors
        grad = grad.to(left.dtype).reshape(*left.shape[:-1], -1)
        return None, ctx.scaling * (grad @ right.mT), ctx.scaling * (left.mT @ grad), None


@functools.lru_cache(maxsize=1 << 10)
def _tell(name: str, func: str, formed: str) -> None:
    """Say once per weight and function that the sum is formed."""
    logger.warning("%s is read by %s, which %s", name, func, formed)


def _all(args: Any, kwargs: Any) -> Iterator[LinkedWeight]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, LinkedWeight):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _all(value, {})


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, LinkedWeight) else value


def _sums(value: Any) -> Any:
    if isinstance(value, LinkedWeight):
        return value.summed()
    return type(value)(map(_sums, value)) if type(value) in (list, tuple) else value


# rules: each computes what the function of its name does, from W and from the factors; NotImplemented leaves it


def _dropped(w: LinkedWeight, x: Tensor) -> Tensor:
    return F.dropout(x, w.dropout) if w.dropout else x


def _plus(out: Tensor, link: Tensor, w: LinkedWeight) -> Tensor:
    return torch.add(out, link.to(out.dtype), alpha=w.scaling)


def _of_matrices(w: LinkedWeight) -> bool:
    """Whether the factors have W's shape; a convolution's W is a matrix with its kernels in rows."""
    return w.left.dim() == w.dim()


def _factors(w: LinkedWeight, x: Tensor) -> tuple[Tensor, Tensor]:
    return w.left.to(x.dtype), w.right.to(x.dtype)


def _linear(x: Any, w: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(w, LinkedWeight) or isinstance(x, LinkedWeight) or w.dim() != 2:
        return NotImplemented
    left, right = _factors(w, x)
    return _plus(F.linear(x, w.plain, bias), F.linear(F.linear(_dropped(w, x), right), left), w)


def _matmul(x: Any, y: Any, **options: Any) -> Any:
    both = isinstance(x, LinkedWeight) and isinstance(y, LinkedWeight)
    if options or both or not _of_matrices(x if isinstance(x, LinkedWeight) else y):
        return NotImplemented
    if isinstance(y, LinkedWeight):
        left, right = _factors(y, x)
        return _plus(x @ y.plain, _dropped(y, x) @ left @ right, y)
    left, right = _factors(x, y)
    return _plus(x.plain @ y, left @ (right @ _dropped(x, y)), x)


def _grouped(x: Any, w: Any, offs: Tensor | None = None, **options: Any) -> Any:
    """Rows of x up to each of ``offs`` times one matrix of the stack."""
    if any(value is not None for value in options.values()) or not isinstance(w, LinkedWeight):
        return NotImplemented
    if isinstance(x, LinkedWeight) or w.dim() != 3 or x.dim() != 2 or not _of_matrices(w):
        return NotImplemented
    grouped = functools.partial(F.grouped_mm, offs=offs)
    left, right = _factors(w, x)
    # the kernel wants rows of whole 16 bytes
    extra = -left.shape[-1] % (16 // left.element_size())
    left, right = F.pad(left, (0, extra)), F.pad(right, (0, 0, 0, extra))
    if w.plain.stride(-1) != 1:  # the stack is transposed; so are its factors
        left, right = left.mT.contiguous().mT, right.mT.contiguous().mT
    return _plus(grouped(x, w.plain), grouped(grouped(_dropped(w, x), left), right), w)


def _embedding(
    ids: Any,
    w: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(w, LinkedWeight) or max_norm is not None:
        return NotImplemented
    rows = F.embedding(ids, w.left, padding_idx, scale_grad_by_freq=scale_grad_by_freq)  # A's gradient is dense
    return _plus(F.embedding(ids, w.plain, padding_idx), rows.to(w.right.dtype) @ w.right, w)


def _conv(
    x: Any,
    w: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    function: Callable[..., Tensor],
) -> Any:
    """A convolution to r channels with the kernel of W, and one with a kernel of 1 from there."""
    if not isinstance(w, LinkedWeight) or isinstance(x, LinkedWeight):
        return NotImplemented
    left, right = _factors(w, x)
    down = right.reshape(-1, *w.plain.shape[1:])
    if groups > 1:
        down = down.repeat(groups, *[1] * (down.dim() - 1))
    up = left.reshape(*left.shape, *[1] * (w.plain.dim() - 2))
    reduced = function(_dropped(w, x), down, None, stride, padding, dilation, groups)
    return _plus(function(x, w.plain, bias, stride, padding, dilation, groups), function(reduced, up, groups=groups), w)


def _item(w: Any, index: Any) -> Any:
    """Some rows of a matrix, which are small; or some matrices of a stack, which stay linked."""
    if not isinstance(w, LinkedWeight) or not isinstance(index, (int, Tensor)):
        return NotImplemented
    if isinstance(index, Tensor) and index.is_floating_point() | (index.dtype in (torch.bool, torch.uint8)):
        return NotImplemented
    if not _of_matrices(w):
        return NotImplemented
    if w.dim() == 2:
        return _plus(w.plain[index], (w.left[index] @ w.right).to(w.plain.dtype), w)
    if w.dim() != 3:
        return NotImplemented
    if isinstance(index, Tensor) and index.dim():
        return _like(w, w.plain[index], w.left[index], w.right[index])
    return _unbound(w)[int(index)]


def _unbound(w: Any, dim: int = 0) -> Any:
    """The matrices of a stack; one node of the graph serves all of them."""
    if w.dim() != 3 or dim not in (0, -3) or not _of_matrices(w):
        return NotImplemented
    recorded = torch.is_grad_enabled()  # matrices that were taken without a graph have no gradient later
    if recorded not in w.matrices:
        parts = zip(w.plain.unbind(), w.left.unbind(), w.right.unbind())
        w.matrices[recorded] = tuple(_like(w, *part) for part in parts)
    return w.matrices[recorded]


def _turned(w: Any, *dims: int, **names: int) -> Any:
    """The transposed weight, ``Wᵀ + s·Rᵀ Lᵀ``."""
    given = {d % w.dim() for d in (*dims, *names.values())} or set(range(w.dim()))  # .T turns all
    if not _of_matrices(w) or given != {w.dim() - 1, w.dim() - 2}:
        return NotImplemented
    return _like(w, w.plain.mT, w.right.mT, w.left.mT)


def _turned_last(w: Any, *_: Any) -> Any:
    return _turned(w, -1, -2)


def _cast(w: Any, *args: Any, **options: Any) -> Any:
    plain = w.plain.to(*args, **options)
    return _like(w, plain, w.left.to(plain.device), w.right.to(plain.device))


def _detached(w: Any) -> Any:
    return _like(w, w.plain.detach(), w.left.detach(), w.right.detach())


def _required(w: Any, requires_grad: bool = True) -> Any:
    w.plain.requires_grad_(requires_grad)
    return w


def _like(w: LinkedWeight, plain: Tensor, left: Tensor, right: Tensor) -> LinkedWeight:
    return linked(plain, left, right, w.scaling, w.dropout, w.title)


RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    **{conv: functools.partial(_conv, function=conv) for conv in (F.conv1d, F.conv2d, F.conv3d)},
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm), _matmul),
    Tensor.__getitem__: _item,
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbound),
    **dict.fromkeys((torch.t, Tensor.t, torch.transpose, Tensor.transpose), _turned),
    Tensor.T.__get__: _turned,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _turned_last,  # type: ignore[attr-defined]
    Tensor.to: _cast,
    **dict.fromkeys((Tensor.detach, Tensor.data.__get__), _detached),  # type: ignore[attr-defined]
    Tensor.requires_grad_: _required,
}
"""Function -> what computes it."""

#: methods that tell something about a tensor without reading its values
_ABOUT = frozenset(
    (
        "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point",
        "ndimension", "nelement", "numel", "size", "storage_offset", "stride", "__len__",
    )
)  # fmt: skip
#: operators that change their first argument
_ASSIGN = frozenset(
    (
        "__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ifloordiv__", "__imod__",
        "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
    )
)  # fmt: skip
#: ``weight.data = …``
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
#: functions for people who look at a weight
_READS = frozenset(("__repr__", "clone", "__get__", "item", "tolist"))
