"""A linear layer with one low-rank link: ``y = W x + b + s·B (A x)``.

`LowRankLinear` is the fast path: one autograd function that adds the link into the output buffer and keeps only the
input, ``A x`` and the seed of a dropout. `LoRALinear.reference` is its slow twin, made of ordinary operations. It also
serves under autocast and `torch.func`, for a weight that is trained, and for dropout in a compiled model.
"""

import math
from collections.abc import Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola.common.contexts import transformed
from cola.common.distributed import copy_whole
from cola.knot.sharded import obstacle_anywhere, tie_anywhere
from cola.knot.tie import KnotError, Tie, tolerance

#: why a layer whose forward was overwritten cannot carry a link
REPLACED = "has had its forward replaced on the instance (a dispatch hook?): make the ChainOptimizer before that"
#: names of a link's factors on a layer
FACTORS = ("lora_A", "lora_B")
#: (A, B, s) of one link on one layer
Triple = tuple[Tensor, Tensor, float]


class LowRankLinear(torch.autograd.Function):
    """``y = x Wᵀ + b + s·(d(x) Aᵀ) Bᵀ`` with W frozen; x (…, in), W out×in, A r×in, B out×r; d is dropout.

    A may be the r indices of the inputs that it selects; products with it are then gathers. A and B are cast to x's
    dtype; their gradients come back in their own dtype. Backward saves x, ``d(x) Aᵀ`` and the parameters, and draws the
    dropout mask again from its seed, which comes from torch's global generator.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dropout: float = 0.0,
    ) -> Tensor:
        """The layer's output, (…, out)."""
        flat = x.reshape(-1, x.shape[-1])
        mask = None
        if dropout:
            ctx.seed = int(torch.randint(1 << 62, (), device="cpu"))
            mask, scaling = kept(flat, dropout, ctx.seed), scaling / share_kept(dropout)
        down, up = _used(A, B, x.dtype)
        reduced = times(down, _masked(flat, mask))
        out = F.linear(x, weight, bias)  # exactly the plain layer's call; no view of it leaves (FSDP2 would warn)
        out.view(-1, out.shape[-1]).addmm_(reduced, up.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, A, B, reduced)
        ctx.scaling, ctx.dropout = scaling, dropout
        # F.linear may return a view, and autograd forbids in-place operations on a view that a Function returns
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Gradients for x, bias, A and B; none for W. Autograd casts those of A and B to the factors' dtype."""
        (grad,) = grads
        x, weight, A, B, reduced = ctx.saved_tensors
        s = ctx.scaling
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        down, up = _used(A, B, grad.dtype)
        needs_x, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        mask = kept(flat, ctx.dropout, ctx.seed) if ctx.dropout and (needs_x or needs_A) else None
        if torch.is_grad_enabled():  # for a second derivative: the saved product carries no graph
            reduced = times(down, _masked(flat, mask))
        grad_x = grad_bias = grad_A = grad_B = None
        # `addmm` with beta=0 is a product times s in one call; its first argument only lends its shape.
        # Small products first, while the gradient is still in cache.
        if needs_B:  # computed as r×out and transposed: BLAS is twice as fast this way
            grad_B = torch.addmm(up.detach().t(), reduced.t(), grad, beta=0, alpha=s).t().contiguous()
        if needs_x or needs_A:
            grad_reduced = grad.mm(up)
            if needs_A:
                grad_A = torch.addmm(down.detach(), grad_reduced.t(), _masked(flat, mask), beta=0, alpha=s)
            if needs_x and mask is None:
                grad_x = _add_back(grad.mm(weight), grad_reduced, down, s).view(x.shape)
            elif needs_x:
                through = _add_back(torch.zeros_like(flat), grad_reduced, down, s)
                grad_x = grad.mm(weight).add_(_masked(through, mask)).view(x.shape)
        if needs_bias:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None


def times(A: Tensor, x: Tensor) -> Tensor:
    """``x Aᵀ``; x is (…, in), and A is r×in or the indices of the r inputs that it selects."""
    return F.linear(x, A) if A.dim() == 2 else x.index_select(-1, A)


def _add_back(target: Tensor, x: Tensor, A: Tensor, s: float) -> Tensor:
    """``target + s·x A``, in place; A as in `times`."""
    return target.addmm_(x, A, alpha=s) if A.dim() == 2 else target.index_add_(-1, A, x, alpha=s)


def _used(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # skip no-op casts: call overhead dominates short steps
    if A.dim() == 1:
        return A, B.to(dtype)
    return (A, B) if A.dtype == B.dtype == dtype else (A.to(dtype), B.to(dtype))


def kept(like: Tensor, dropout: float, seed: int) -> Tensor:
    """The mask of a dropout: integers as wide as ``like``'s numbers, with all bits set (kept) or none.

    A seed always gives the same mask on one device. Four entries share a 64-bit draw and use 15 bits each, which is
    several times faster than a draw per entry; a bit mask is several times faster than booleans.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(1 << 63), None, generator=generator)
    words = draws.view(torch.int16)[: like.numel()].view(like.shape)
    words.bitwise_and_(_DRAWS - 1).sub_(_dropped(dropout))  # negative where dropped
    return words.bitwise_right_shift_(15).bitwise_not_().to(_BITS[like.element_size()])


def share_kept(dropout: float) -> float:
    """The probability with which `kept` keeps an entry: ``1 − dropout`` to the nearest 2⁻¹⁵, never 0."""
    return 1 - _dropped(dropout) / _DRAWS


_DRAWS = 1 << 15
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _dropped(dropout: float) -> int:
    return min(round(dropout * _DRAWS), _DRAWS - 1)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values
    if torch.is_grad_enabled():  # for a second derivative
        return torch.where(mask != 0, values, 0)
    return values.view(mask.dtype).bitwise_and(mask).view(values.dtype)


class AdaptedLayer(nn.Module):
    """A layer with a live link. Each subclass is a kind: it supports one kind of module.

    A module is adapted in place: its object, hooks and parameters stay, and its class becomes one made by `over`, which
    adds ``s·B A x`` to the output. `detach` restores the class and leaves no trace of the link.

    To add a kind, write a subclass that sets `plain_class` and computes `forward` with `link`, and pass it to
    `cola.register_kind`. The class methods below take plain modules and assume a weight called ``weight`` of shape
    out×in; override those for which this is wrong.

    Attributes:
        lora_A: r×in; the same Parameter from `attach` to `detach`. An A that selects inputs is no Parameter
            (`cola.lora.selected`).
        lora_B: out×r; the same Parameter from `attach` to `detach`.
        lora_down: what `times` takes for A, usually A itself.
        lora_up: B as the layer computes with it, usually B itself.
        scaling: the scale s.
        lora_dropout: probability that training drops an input of the link (the plain layer's input is never dropped).
        rank: the link's rank; the Parameters may be larger, with zeros beyond it, where shapes cannot change.
        allowed_ranks: ranks that a loaded state may have; None for any.

    >>> class Gain(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight, self.gain = nn.Parameter(torch.ones(2, 3)), 0.5
    ...
    ...     def forward(self, x):
    ...         return self.gain * (x @ self.weight.t())
    >>> class GainWithLink(AdaptedLayer):
    ...     plain_class = Gain
    ...
    ...     def forward(self, x):
    ...         return Gain.forward(self, x) + self.gain * self.link(x)
    >>> GainWithLink.matches(Gain()), GainWithLink.shape(Gain())
    (True, (2, 3))
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    weight: Tensor
    scaling: float
    lora_dropout: float
    rank: int
    allowed_ranks: tuple[int, ...] | None

    #: the class of the modules of this kind
    plain_class: ClassVar[type[nn.Module]] = nn.Module
    #: whether the weight is stored as in×out
    transposed: ClassVar[bool] = False
    #: whether ``target_modules="all-linear"`` includes this kind
    linear: ClassVar[bool] = True
    #: whether its inputs are indices of rows of the weight
    looks_up: ClassVar[bool] = False
    #: whether the weight is stored as codes, into which no sum can be rounded
    quantized: ClassVar[bool] = False
    #: names of buffers that links add to a layer
    added: ClassVar[tuple[str, ...]] = ()
    #: names of the attributes that make up the live link
    entries: ClassVar[tuple[str, ...]] = FACTORS
    #: the kind, in a class made by `over`
    _made_by: ClassVar[type | None] = None

    # the kind

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind, with or without a link."""
        return isinstance(module, cls.plain_class)

    @classmethod
    def refusal(cls, module: nn.Module, *, stacked: bool = False) -> str | None:
        """Why a plain module of this kind cannot carry a link, as the end of a sentence; None if it can.

        Args:
            module: one that `matches`.
            stacked: whether it may already have tied links next to its weight, as quantised layers can.
        """
        if cls._forward_of(module) is not type(module).forward:
            return f"is a {type(module).__name__} that overrides forward, which a link could not follow"
        if "forward" in vars(module):
            return REPLACED
        if cls.parameter(module) is None:
            return "has a weight that is computed (a parametrization?) and so cannot be tied in place"
        return None

    @classmethod
    def _forward_of(cls, module: nn.Module) -> Any:
        """The forward that a link can follow."""
        return cls.plain_class.forward

    @classmethod
    def over(cls, plain: type[nn.Module]) -> "type[AdaptedLayer]":
        """This class, derived for modules of class ``plain``."""
        return class_over(cls, plain)

    @classmethod
    def parameter(cls, module: nn.Module) -> nn.Parameter | None:
        """The stored weight of a plain or adapted module; None if it is computed."""
        return module._parameters.get("weight")

    @classmethod
    def matrix(cls, module: nn.Module) -> Tensor:
        """The stored weight, detached, as a matrix, or as E of them (fused experts); it shares the weight's memory."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.detach()

    @classmethod
    def form(cls, module: nn.Module) -> str:
        """How a module of this kind uses its weight, as a chain records it; see `cola.chain.fingerprint.LayerPrint`."""
        return "linear"

    @classmethod
    def is_transposed(cls, module: nn.Module) -> bool:
        """Whether the weight is stored as in×out."""
        return cls.transposed

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, ...]:
        """(out, in) of the weight of a plain or adapted module of this kind; (E, out, in) of fused experts."""
        *stack, m, n = cls.matrix(module).shape
        return (*stack, n, m) if cls.is_transposed(module) else (*stack, m, n)

    @classmethod
    def factors(cls, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(L, R) such that the stored weight, as `matrix` shows it, changes by ``s·L R``."""
        return (A.mT, B.mT) if cls.transposed else (B, A)

    @classmethod
    def sides(cls, module: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """`factors` for this module, where its kind alone does not decide."""
        return cls.factors(A, B)

    @classmethod
    def parts(cls, module: nn.Module) -> dict[str, Tensor]:
        """Tensors of the module's state dict that it computes with but keeps outside its parameters and buffers."""
        return {}

    @classmethod
    def obstacle(cls, module: nn.Module, links: Sequence[Triple], memory: Any = None) -> str | None:
        """Why tying all of ``links`` would damage the weight, as the end of a sentence about the layer; None if not.

        Args:
            module: plain or adapted.
            links: (A, B, s) of each link.
            memory: as in `tie`.
        """
        pairs = [cls.sides(module, A, B) for A, B, _ in links]
        if len(links) == 1:
            return obstacle_anywhere(cls.matrix(module), *pairs[0], links[0][2])
        left = torch.cat([left.double() * s for (left, _), (*_, s) in zip(pairs, links)], -1)
        right = torch.cat([right.to(left.device).double() for _, right in pairs], -2)
        return obstacle_anywhere(cls.matrix(module), left, right, 1.0)

    @classmethod
    def tie(cls, module: nn.Module, link: Triple, *, rounding: str, seed: int, memory: Any = None) -> Tie:
        """Add ``s·B A`` to the module's weight, in place.

        Args:
            module: plain or adapted.
            link: (A, B, s).
            rounding: one of `cola.knot.tie.ROUNDINGS`.
            seed: for stochastic rounding.
            memory: the residual buffer of compensated rounding, in the weight's shape; None for other roundings.

        Raises:
            KnotError: the stored weight is further from the exact sum than rounding explains.
        """
        A, B, scaling = link
        weight = cls.matrix(module)
        left, right = cls.sides(module, A, B)
        residual = None if memory is None else memory.view(weight.shape)
        done = tie_anywhere(weight, left, right, scaling, rounding=rounding, seed=seed, residual=residual)
        limit = tolerance(weight, done, A.shape[-2])
        if not (math.isfinite(limit) and done.deviation <= limit):
            raise KnotError(
                f"the tied weight is {done.deviation:.3g} from W + sBA, and rounding to {weight.dtype} explains "
                f"{limit:.3g}: please report this"
            )
        cls.put_back(module, weight)
        return done

    @classmethod
    def put_back(cls, module: nn.Module, matrix: Tensor) -> None:
        """Store the changed `matrix` in the weight, where it does not share the weight's memory."""

    # the link

    def attach(self, A: Tensor, B: Tensor, scaling: float, dropout: float) -> None:
        """Give the layer its link, right after its class has become this one."""
        self._hold(A, B)
        self.scaling, self.lora_dropout = scaling, dropout
        self.rank, self.allowed_ranks = A.shape[-2], (A.shape[-2],)

    def _hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    @property
    def lora_down(self) -> Tensor:
        """A."""
        return self.lora_A

    @property
    def lora_up(self) -> Tensor:
        """B."""
        return self.lora_B

    def put(self, A: Tensor, B: Tensor, scaling: float, *, mask: bool) -> None:
        """Make (A, B) the link; the Parameters stay the same objects.

        Args:
            A, B: r×in and out×r, of any rank.
            scaling: the scale s.
            mask: fill the Parameters with zeros beyond the rank instead of resizing them. Training keeps these zeros:
                the gradient of a row of A is a multiple of the matching column of B, and vice versa.
        """
        put_pair(self.lora_A, self.lora_B, A, B, mask=mask)
        self.rank, self.scaling = A.shape[-2], scaling

    def detach(self, *, spent: bool = False) -> None:
        """Remove the link: restore the class, parameters and attributes from before `attach`."""
        for name in (*self.entries, "scaling", "lora_dropout", "rank", "allowed_ranks"):
            delattr(self, name)
        self.__class__ = self.plain_class  # type: ignore[assignment]
        rebind(self)

    def link(self, x: Tensor) -> Tensor:
        """``s·B A x`` in x's dtype; dropout, where set, acts on x in training."""
        A, B = _used(self.lora_down, self.lora_up, x.dtype)
        return self.scaling * F.linear(times(A, F.dropout(x, self.lora_dropout, self.training)), B)

    @property
    def kind(self) -> "type[AdaptedLayer]":
        """The layer's kind."""
        return type(self)

    @property
    def holder(self) -> nn.Module:
        """The module that holds the weight."""
        return self

    @property
    def plain_weight(self) -> Tensor:
        """The stored weight, without the link."""
        return self.weight

    @property
    def held(self) -> tuple[nn.Module, tuple[str, ...]]:
        """The module that holds the weight and the link's Parameters, and the names of these."""
        return self, FACTORS

    #: modules that share the weight, and read it with the link
    borrowers: Sequence[nn.Module] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class made by `over` cannot be pickled by name: record how to make it
        if self._made_by is None:
            return super().__reduce_ex__(protocol)
        return empty, (self._made_by, self.plain_class), self.__dict__

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As any module's, after making room for a link of another permitted rank."""
        make_room(self, state_dict.get(prefix + "lora_A"), state_dict.get(prefix + "lora_B"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The plain layer's text, with the link's rank and scale."""
        return f"{super().extra_repr()}, r={self.rank}, scaling={self.scaling:g}".removeprefix(", ")


class LoRALinear(AdaptedLayer):
    """An `nn.Linear`, or a subclass with the same forward, that carries a link: ``W x + b + s·B A x``."""

    plain_class: ClassVar[type[nn.Module]] = nn.Linear
    bias: Tensor | None

    @classmethod
    def _forward_of(cls, module: nn.Module) -> Any:
        return type(module).forward if type(module).__name__ in LINEAR else cls.plain_class.forward

    def forward(self, x: Tensor) -> Tensor:
        """``W x + b + s·B A x``; dropout, where set, acts on the link's input in training."""
        if not isinstance(self, AdaptedLayer):  # a hook kept this bound method after the chain was finished
            return type(self).forward(self, x)
        weight = self.weight.t() if self.transposed else self.weight
        dropout = self.lora_dropout if self.training else 0.0
        plain_operations = weight.requires_grad or torch.is_autocast_enabled(x.device.type) or transformed()
        if plain_operations or (dropout and _records(x)):
            return self.reference(x)
        return LowRankLinear.apply(x, weight, self.bias, self.lora_down, self.lora_up, self.scaling, dropout)

    def reference(self, x: Tensor) -> Tensor:
        """The same function, from ordinary operations."""
        weight = self.weight.t() if self.transposed else self.weight
        return F.linear(x, weight, self.bias) + self.link(x)


#: subclasses of nn.Linear whose overridden forward still computes ``W x + b``: transformers' Falcon
LINEAR = ("FalconLinear",)


def rebind(module: nn.Module) -> None:
    """Rebind methods that ``module`` keeps as attributes, after its class has changed.

    Dispatch hooks keep the forward that they replace, and refer to it as ``__wrapped__``.
    """
    for name, value in list(vars(module).items()):
        if _bound_to(module, value):
            vars(module)[name] = getattr(type(module), value.__name__).__get__(module)
        while hasattr(value, "__wrapped__"):
            if _bound_to(module, value.__wrapped__):
                value.__wrapped__ = getattr(type(module), value.__wrapped__.__name__).__get__(module)
                break
            value = value.__wrapped__


def _bound_to(module: nn.Module, value: Any) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and hasattr(type(module), value.__name__)


def _records(x: Tensor) -> bool:
    """Whether the call is being compiled or captured: a seed drawn now would be reused by every later call."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def class_over(kind: type, plain: type[nn.Module]) -> Any:
    """The class that adds ``kind`` to modules of class ``plain``."""
    if (kind, plain) not in _CLASSES:
        name = f"{kind.__name__}Over{plain.__name__}"
        _CLASSES[kind, plain] = type(name, (kind, plain), {"plain_class": plain, "_made_by": kind})
    return _CLASSES[kind, plain]


_CLASSES: dict[tuple[type, type], type] = {}


def empty(kind: type, plain: type[nn.Module]) -> nn.Module:
    """An instance of `class_over` for unpickling to fill."""
    return nn.Module.__new__(class_over(kind, plain))


def make_room(layer: Any, A: Tensor | None, B: Tensor | None) -> None:
    """Resize the link of an `AdaptedLayer` or `PeftLayer` to load factors of another permitted rank."""
    mine = layer.lora_A.shape
    if A is None or B is None or A.dim() != len(mine) or A.shape == mine:
        return
    *stack, rank, inner = A.shape
    fits = (*stack, inner) == (*mine[:-2], mine[-1]) and B.shape == (*layer.lora_B.shape[:-1], rank)
    if fits and (layer.allowed_ranks is None or rank in layer.allowed_ranks):
        layer.put(layer.lora_A.new_zeros(A.shape), layer.lora_B.new_zeros(B.shape), layer.scaling, mask=False)


@torch.no_grad()
def put_pair(lora_A: nn.Parameter, lora_B: nn.Parameter, A: Tensor, B: Tensor, *, mask: bool) -> None:
    """`AdaptedLayer.put` for two Parameters."""
    for parameter, value, rank_dim in ((lora_A, A, -2), (lora_B, B, -1)):
        if parameter.shape == value.shape:
            copy_whole(parameter, value)
        elif mask:
            padded = value.new_zeros(parameter.shape)
            padded.narrow(rank_dim, 0, value.shape[rank_dim]).copy_(value)
            copy_whole(parameter, padded)
        else:
            _resize(parameter, value)


def _resize(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a Parameter a value of another shape.

    A live graph (of the caller's last loss) keeps the Parameter's gradient accumulator, which remembers the old shape
    and would refuse the new gradients. Autograd drops it when the dtype changes, hence the detour.
    """
    other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    device, dtype = parameter.device, parameter.dtype
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=other, device=device)
    parameter.data = value.to(device=device, dtype=dtype).contiguous().clone()
