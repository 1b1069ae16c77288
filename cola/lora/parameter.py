"""Links on single parameters of a module: the stacked weights of fused experts, and the packed ones of attention.

A `ParameterView` shows such a parameter as a layer of its own, whose path is the parameter's name. The link's factors
lie next to it in the module, and the module's code finds ``W + s·B A`` where it reads the parameter.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from cola.common.distributed import is_sharded
from cola.lora.layer import FACTORS, AdaptedLayer, make_room, rebind
from cola.lora.linked_weight import LinkedWeight, linked


class ParameterView(nn.Module):
    """A module's parameter, seen as a layer. Views of the same parameter are equal.

    Args:
        owner: the module.
        name: of its parameter.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.place = (owner, name)  # in a tuple, so that the owner is no child

    @property
    def weight(self) -> Tensor:
        """The parameter itself."""
        owner, name = self.place
        weight = owner._parameters[name]
        assert weight is not None
        return weight

    @property
    def names(self) -> tuple[str, str]:
        """Names of A and B in the owner."""
        first, second = (f"{self.place[1]}_{factor}" for factor in FACTORS)
        return first, second

    @property
    def held(self) -> tuple[nn.Module, tuple[str, ...]]:
        """The owner, and the names of A and B in it."""
        return self.place[0], self.names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterView) and self.place[0] is other.place[0] and self.place[1] == other.place[1]

    def __hash__(self) -> int:
        return hash((id(self.place[0]), self.place[1]))

    def extra_repr(self) -> str:
        """The owner's class and the parameter's name."""
        owner, name = self.place
        return f"{type(owner).__name__}.{name}"


@dataclass
class _Live:
    """What a link on a parameter is, next to its factors; kept on the owner."""

    scaling: float = 0.0
    lora_dropout: float = 0.0
    rank: int = 0
    allowed_ranks: tuple[int, ...] | None = None


def _of_live(name: str) -> Any:
    """An attribute that is kept on the owner."""

    def get(view: Any) -> Any:
        return getattr(view.live, name)

    def put(view: Any, value: Any) -> None:
        setattr(view.live, name, value)

    return property(get, put)


class LinkedParameter(AdaptedLayer):
    """A parameter with a link; m×n, or E×m×n for E experts.

    As in PEFT (``target_parameters``) the last dimension counts as the input, unless the owner of stacked experts says
    ``is_transposed``.
    """

    plain_class = ParameterView
    linear: ClassVar[bool] = False
    place: tuple[nn.Module, str]
    names: tuple[str, str]

    scaling = _of_live("scaling")
    lora_dropout = _of_live("lora_dropout")
    rank = _of_live("rank")
    allowed_ranks = _of_live("allowed_ranks")
    held = ParameterView.held

    @classmethod
    def parameter(cls, module: nn.Module) -> nn.Parameter | None:
        """The parameter; None if the owner computes it."""
        owner, name = cast(LinkedParameter, module).place
        return owner._parameters.get(name)

    @classmethod
    def form(cls, module: nn.Module) -> str:
        """As `AdaptedLayer.form`."""
        owner, name = cast(LinkedParameter, module).place
        packed = isinstance(owner, nn.MultiheadAttention) and name == "in_proj_weight"
        return "attention input" if packed else "parameter"

    @classmethod
    def is_transposed(cls, module: nn.Module) -> bool:
        """Whether the owner stores E×in×out."""
        owner, name = cast(LinkedParameter, module).place
        weight = owner._parameters[name]
        return weight is not None and weight.dim() == 3 and getattr(owner, "is_transposed", False) is True

    @classmethod
    def sides(cls, module: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """As `AdaptedLayer.sides`."""
        return (A.mT, B.mT) if cls.is_transposed(module) else (B, A)

    @classmethod
    def refusal(cls, module: nn.Module, *, stacked: bool = False) -> str | None:
        """As `AdaptedLayer.refusal`."""
        owner, name = cast(LinkedParameter, module).place
        weight = owner._parameters.get(name)
        if weight is None:
            return "is computed (a parametrization?) and so cannot be tied in place"
        if weight.dim() not in (2, 3):
            return f"has the shape {tuple(weight.shape)}, and links go on matrices and on stacks of them"
        if isinstance(owner, AdaptedLayer):
            return "belongs to a layer that carries a link: a link goes on the layer or on a parameter of it"
        if "forward" in vars(owner):
            return "belongs to a module whose forward was replaced (a dispatch hook?): make the ChainOptimizer before"
        return None

    @property
    def live(self) -> _Live:
        """The link's state."""
        owner, name = self.place
        return cast(ReadsParameters, owner).lora_links[name]

    @property
    def lora_A(self) -> nn.Parameter:  # type: ignore[override]
        """A, r×in or E×r×in."""
        return cast(nn.Parameter, self.place[0]._parameters[self.names[0]])

    @property
    def lora_B(self) -> nn.Parameter:  # type: ignore[override]
        """B, out×r or E×out×r."""
        return cast(nn.Parameter, self.place[0]._parameters[self.names[1]])

    def _hold(self, A: Tensor, B: Tensor) -> None:
        owner, name = self.place
        links = {**(owner.lora_links if isinstance(owner, ReadsParameters) else {}), name: _Live()}
        plain = owner.plain_class if isinstance(owner, ReadsParameters) else type(owner)
        owner.__class__ = reading(plain, tuple(links))
        vars(owner)["lora_links"], vars(owner)["lora_open"] = links, None
        for own, factor in zip(self.names, (A, B)):
            owner.register_parameter(own, nn.Parameter(factor))

    def put(self, A: Tensor, B: Tensor, scaling: float, *, mask: bool) -> None:
        """As `AdaptedLayer.put`; a kind with a `put` of its own keeps A where others keep indices."""
        super().put(A, B, scaling, mask=mask)

    def detach(self, *, spent: bool = False) -> None:
        """As `AdaptedLayer.detach`; the owner gets its class back with the last link."""
        owner, name = self.place
        for own in self.names:
            del owner._parameters[own]
        links = {other: live for other, live in cast(ReadsParameters, owner).lora_links.items() if other != name}
        plain = cast(ReadsParameters, owner).plain_class
        owner.__class__ = reading(plain, tuple(links)) if links else plain
        vars(owner)["lora_links"] = links
        if not links:
            del vars(owner)["lora_links"], vars(owner)["lora_open"]
        rebind(owner)
        self.__class__ = ParameterView  # type: ignore[assignment]


class ReadsParameters(nn.Module):
    """A module with links on some of its parameters. `reading` puts this class in front of the module's own.

    Its attributes begin with ``lora_``, so that they hide none of the module's own.

    Attributes:
        lora_links: the links by the parameters' names.
        lora_open: the linked weights of the forward pass that is running, so that reading one again is free.
    """

    plain_class: ClassVar[type[nn.Module]] = nn.Module
    lora_names: ClassVar[tuple[str, ...]] = ()
    lora_links: dict[str, _Live]
    lora_open: dict[str, LinkedWeight] | None

    @property
    def lora_entries(self) -> tuple[str, ...]:
        """Names of the links' Parameters."""
        return tuple(f"{name}_{factor}" for name in self.lora_links for factor in FACTORS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's."""
        if not isinstance(self, ReadsParameters):  # a hook kept this bound method after the chain was finished
            return type(self).forward(self, *args, **kwargs)
        vars(self)["lora_open"] = {}
        try:
            return self.plain_class.forward(self, *args, **kwargs)
        finally:
            vars(self)["lora_open"] = None

    def lora_weight(self, name: str) -> Tensor:
        """The parameter with its link."""
        view = cast(LinkedParameter, view_of(self, name))
        if is_sharded(view.plain_weight):  # FSDP2 looks for its own parameter; modules compute with whole ones
            return view.plain_weight
        opened = vars(self).get("lora_open")
        if opened is not None and name in opened:
            return opened[name]
        left, right = LinkedParameter.sides(view, view.lora_A, view.lora_B)
        dropout = view.lora_dropout if self.training else 0.0
        title = f"{self.plain_class.__name__}.{name}"
        weight = linked(view.plain_weight, left, right, view.scaling, dropout, title)
        if opened is not None:
            opened[name] = weight
        return weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As any module's, after making room for links of other permitted ranks."""
        for name in self.lora_links:
            view = cast(LinkedParameter, view_of(self, name))
            make_room(view, *(state_dict.get(prefix + own) for own in view.names))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.plain_class, type(self).lora_names), self.__dict__


def entries_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the attributes of a module that make up live links."""
    if isinstance(module, ReadsParameters):
        return module.lora_entries
    return module.entries if isinstance(module, AdaptedLayer) else ()


def view_of(owner: nn.Module, name: str) -> ParameterView:
    """The view of a parameter, with its link if it has one."""
    view = ParameterView(owner, name)
    if isinstance(owner, ReadsParameters) and name in owner.lora_links:
        view.__class__ = LinkedParameter.over(ParameterView)  # type: ignore[assignment]
    return view


def reading(plain: type[nn.Module], names: tuple[str, ...]) -> type[ReadsParameters]:
    """The class for modules of class ``plain`` with links on these parameters."""
    if (plain, names) not in _CLASSES:
        own: dict[str, Any] = {name: _property(name) for name in names}
        own.update(plain_class=plain, lora_names=names, forward=torch.compiler.disable(ReadsParameters.forward))
        _CLASSES[plain, names] = type(f"Linked{plain.__name__}", (ReadsParameters, plain), own)
    return _CLASSES[plain, names]


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[ReadsParameters]] = {}


def _property(name: str) -> Any:
    return property(lambda self: self.lora_weight(name))


def _empty(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An instance for unpickling to fill."""
    return nn.Module.__new__(reading(plain, names))
