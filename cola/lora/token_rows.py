"""Rows of an embedding or an output head that are trained whole, while the rest of the weight stays frozen.

As in PEFT (``trainable_token_indices``) the row itself is trained, not a change of it. The layer's own code is left as
it is, and finds the trained rows where it reads the weight; a knot writes them into the weight.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola.common.contexts import transformed
from cola.common.distributed import copy_whole, is_sharded, part_here, whole
from cola.lora.layer import class_over, empty, rebind
from cola.lora.linked_weight import LinkedWeight, wrapper
from cola.lora.reading import lend, take_back


class RowsWeight(LinkedWeight):
    """W with some of its rows replaced, while a model computes.

    Attributes:
        plain: W, m×n.
        numbers: of the k rows, increasing.
        rows: their values, k×n; rounded to W's dtype where they are read.

    >>> W = with_rows(torch.ones(3, 2), torch.tensor([1]), torch.zeros(1, 2))
    >>> F.embedding(torch.tensor([0, 1]), W)
    tensor([[1., 1.],
            [0., 0.]])
    >>> F.linear(torch.ones(2), W)
    tensor([2., 0., 2.])
    """

    numbers: Tensor
    rows: Tensor

    formed: ClassVar[str] = (
        "trained rows cannot follow: the weight is formed with them there at every call, which takes the memory of "
        "another weight"
    )
    refused: ClassVar[str] = "its trained rows could not follow: leave it out of trainable_token_indices"

    @classmethod
    def rule(cls, func: Any) -> Callable[..., Any] | None:
        """As `LinkedWeight.rule`."""
        return _RULES.get(func)

    def summed(self) -> Tensor:
        """W with the rows in it."""
        return self.plain.index_copy(0, self.numbers, self.rows.to(self.plain.dtype))


def with_rows(plain: Tensor, indices: Tensor, rows: Tensor, title: str = "a weight") -> RowsWeight:
    """``plain`` with other rows; see `RowsWeight`."""
    trained = torch.is_grad_enabled() and rows.requires_grad and not transformed()
    weight: Any = _Replaced.apply(plain, indices, rows) if trained else wrapper(RowsWeight, plain)
    weight.plain, weight.numbers, weight.rows, weight.title = plain, indices, rows, title
    return weight


class _Replaced(torch.autograd.Function):
    """The rows' place in the graph, for custom functions, whose backward gives a gradient of the whole weight."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.dtype = rows.dtype
        return wrapper(RowsWeight, plain)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (indices,) = grads, ctx.saved_tensors
        return None, None, grad.index_select(0, indices).to(ctx.dtype)


def _embedding(ids: Any, w: Any, *args: Any, **options: Any) -> Any:
    if not isinstance(w, RowsWeight) or isinstance(ids, RowsWeight):
        return NotImplemented
    out = F.embedding(ids, w.plain, *args, **options)
    places = torch.searchsorted(w.numbers, ids.long()).clamp(max=len(w.numbers) - 1)
    trained = (w.numbers[places] == ids).unsqueeze(-1)
    return torch.where(trained, F.embedding(places, w.rows).to(out.dtype), out)


def _linear(x: Any, w: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(w, RowsWeight) or isinstance(x, RowsWeight):
        return NotImplemented
    flat = x.reshape(-1, x.shape[-1])
    out = F.linear(flat, w.plain, bias)
    own = F.linear(flat, w.rows.to(w.plain.dtype), None if bias is None else bias[w.numbers])
    put = torch.index_copy if transformed() else Tensor.index_copy_  # in place, because logits are large
    return put(out, -1, w.numbers, own.to(out.dtype)).view(*x.shape[:-1], out.shape[-1])


def _cast(w: Any, *args: Any, **options: Any) -> Any:
    plain = w.plain.to(*args, **options)
    rows = w.rows.to(w.plain.dtype).to(plain)  # rounded as in W
    return with_rows(plain, w.numbers.to(plain.device), rows, w.title)


_RULES: dict[Any, Callable[..., Any]] = {F.embedding: _embedding, F.linear: _linear, Tensor.to: _cast}


class TokenRows(nn.Module):
    """A layer with trained rows. `train_rows` puts this class in front of the layer's own.

    Attributes:
        trained_rows: k×n, in fp32 or wider; the same Parameter until `detach`.
        row_indices: the rows' numbers, increasing; a buffer that is not saved.
        borrowers: the layers that share the weight, and read it with these rows.
    """

    plain_class: ClassVar[type[nn.Module]] = nn.Module
    #: name of the Parameter
    entries: ClassVar[tuple[str, ...]] = ("trained_rows",)
    borrowers: Sequence[nn.Module] = ()
    trained_rows: nn.Parameter
    row_indices: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight with the trained rows, for the layer's own code."""
        return self.read(self.plain_weight, self.training)

    @property
    def plain_weight(self) -> Tensor:
        """The stored weight, which has the rows of the last knot."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def read(self, plain: Tensor, training: bool) -> Tensor:
        """The weight with the trained rows, to read in place of ``plain``."""
        if is_sharded(plain):  # FSDP2 looks for its own parameter; layers compute with whole ones
            return plain
        return with_rows(plain, self.row_indices, self.trained_rows, f"{self.plain_class.__name__}.weight")

    def write(self) -> None:
        """Write the trained rows into the stored weight."""
        put_rows(self.plain_weight, self.row_indices, whole(self.trained_rows.detach()))

    @torch.no_grad()
    def take(self, values: Tensor) -> None:
        """Go on from these values, k×n."""
        copy_whole(self.trained_rows, values)

    def detach(self) -> None:
        """Write the rows into the weight, and restore the classes of the layer and of those that share the weight."""
        self.write()
        take_back(self)
        del self._parameters["trained_rows"], self._buffers["row_indices"]
        vars(self)["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - {"row_indices"}
        self.__class__ = self.plain_class  # type: ignore[assignment]
        rebind(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return empty, (TokenRows, self.plain_class), self.__dict__


def train_rows(layer: nn.Module, indices: Sequence[int], others: Sequence[nn.Module]) -> TokenRows:
    """Let ``layer`` train these rows, and ``others``, which share its weight, read them."""
    weight = layer._parameters["weight"]
    assert weight is not None
    numbers = torch.tensor(indices, device=weight.device)
    rows = weight.detach()[numbers].to(torch.promote_types(weight.dtype, torch.float32))
    layer.__class__ = class_over(TokenRows, type(layer))
    assert isinstance(layer, TokenRows)
    layer.register_buffer("row_indices", numbers, persistent=False)
    layer.trained_rows = nn.Parameter(rows)
    lend(layer, others)
    return layer


@torch.no_grad()
def put_rows(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """``weight[indices] ← values``, rounded to nearest. Of a sharded weight each process writes its part.

    >>> weight = torch.zeros(3, 1)
    >>> put_rows(weight, torch.tensor([2]), torch.ones(1, 1))
    >>> weight.tolist()
    [[0.0], [0.0], [1.0]]
    """
    part, window = part_here(weight) if is_sharded(weight) else (weight, None)
    if window is not None:
        rows, columns = window
        here = (indices >= rows.start) & (indices < rows.stop)
        indices, values = indices[here] - rows.start, values[here][:, columns]
    part.index_copy_(0, indices.to(part.device), values.to(part))
