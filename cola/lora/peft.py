"""Chains on the LoRA layers of PEFT, which is not imported: its layers are recognised by their attributes.

A chain ties into the layer's ``base_layer`` and draws the next link into the layer's own ``lora_A`` and ``lora_B``;
forward, dropout, dtype and state-dict keys stay PEFT's.
"""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cola.lora import stacked
from cola.lora.config import LayerPlan, LinkConfig
from cola.lora.kinds import known_kind
from cola.lora.layer import FACTORS, AdaptedLayer, make_room, put_pair
from cola.lora.per_layer import PER_LAYER

logger = logging.getLogger("cola")

#: prefixes of the ``init_lora_weights`` values that change the base model's weights before training
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: the init that draws as PEFT does, per value of ``init_lora_weights``
_INITS = {"true": "kaiming", "false": "kaiming", "gaussian": "gaussian"}
#: the nearest init for some other values; "kaiming" for the rest
_NEAREST = {"orthogonal": "orthogonal", "eva": "orthogonal"}
_PLAIN = (
    "a chain goes on with PEFT's linear layers alone. Give the model without an adapter, and name the layer in "
    "LinkConfig(target_modules=...)"
)
#: fields of LoraConfig that a chain cannot honour, and why; the layers themselves show all others
_REFUSED = {
    "trainable_token_indices": "trains rows of an embedding in PEFT's own module, which a chain would not record: give "
    "the rows to the chain, by LinkConfig(trainable_token_indices=...)",
    "layer_replication": "repeats layers that share their weights, so that a knot in one would change the others: "
    "first make the larger model with separate weights",
}


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that a PEFT method has wrapped around another."""
    return "base_layer" in module._modules and hasattr(module, "active_adapters")


def is_lora_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of PEFT's LoRA layers."""
    return is_tuner_layer(module) and hasattr(module, "lora_A") and hasattr(module, "lora_B")


def is_peft_model(module: nn.Module) -> bool:
    """Whether ``module`` is a `PeftModel`, as `peft.get_peft_model` returns."""
    return any(c.__name__ == "PeftModel" and c.__module__.split(".")[0] == "peft" for c in type(module).__mro__)


def is_of_peft(module: nn.Module) -> bool:
    """Whether PEFT has put ``module`` into the model: a `PeftModel`, a tuner, a layer or a wrapper."""
    return any(c.__module__.split(".")[0] == "peft" for c in type(module).__mro__)


def inner_model(module: nn.Module) -> nn.Module:
    """The user's model inside a `PeftModel`."""
    tuner: Any = module.base_model
    return tuner.model if isinstance(getattr(tuner, "model", None), nn.Module) else tuner


def transparent(parent: nn.Module) -> tuple[str, ...]:
    """Names of the children of ``parent`` that replace it in the original model."""
    if is_tuner_layer(parent):
        return ("base_layer",)
    return ("modules_to_save",) if _trains_copy(parent) else ()


def original(parent: nn.Module) -> str | None:
    """Name of the child of ``parent`` that is the original model's module; None if PEFT has wrapped nothing here."""
    if is_tuner_layer(parent):
        return "base_layer"
    return "original_module" if _trains_copy(parent) else None


def _trains_copy(parent: nn.Module) -> bool:
    """Whether ``parent`` wraps a whole module (a head) of which PEFT trains a copy."""
    return "original_module" in parent._modules and isinstance(parent._modules.get("modules_to_save"), nn.ModuleDict)


def configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's configurations anywhere in ``model``, with the adapters' names."""
    seen: set[int] = set()
    for module in model.modules():
        found = vars(module).get("peft_config")
        for name, config in found.items() if isinstance(found, dict) else ():
            if id(config) not in seen:
                seen.add(id(config))
                yield name, config


def changed_base(model: nn.Module) -> str | None:
    """How PEFT has changed the base model's weights, as a clause; None if it has not."""
    for _, config in configs(model):
        init = str(getattr(config, "init_lora_weights", True)).lower()
        if init.startswith(CHANGES_BASE):
            return f"PEFT's init_lora_weights={init!r} has changed the base's weights before training"
    return None


def require_whole(model: nn.Module) -> None:
    """Raise ValueError unless a chain on PEFT's LoRA layers covers all that PEFT trains and changes nothing else."""
    for name, config in configs(model):
        for option, why in _REFUSED.items():
            value = getattr(config, option, None)
            if value:
                raise ValueError(f"model: {option}={value!r:.60} of PEFT's adapter {name!r} {why}")
    modules = dict(model.named_modules())
    tuned = {path: module for path, module in modules.items() if is_tuner_layer(module)}
    layers = {path: module for path, module in tuned.items() if is_lora_layer(module)}
    for path in tuned.keys() - layers.keys() if layers else ():
        raise ValueError(
            f"model: PEFT has put a {type(tuned[path]).__name__} at {path!r}, which is no LoRA layer, so a chain would "
            "leave out what it trains: use LoRA alone"
        )
    bases = {id(module._modules["base_layer"]): path for path, module in layers.items()}
    for parent, module in modules.items():
        for name, child in () if parent in layers else module._modules.items():
            if id(child) in bases:
                raise ValueError(
                    f"PEFT's layer {bases[id(child)]!r}: the model has its base layer at {f'{parent}.{name}'!r} as "
                    "well, where PEFT has not wrapped it. A knot would change that one too: make them two layers, or "
                    "leave them out of target_modules"
                )


def refusal(module: Any, *, own: bool = False) -> str | None:
    """Why a PEFT LoRA layer with a linear base cannot carry a chain, as the end of a sentence; None if it can.

    With ``own`` it may already carry the caller's chain.
    """
    if not own and any(
        isinstance(getattr(h.hook, "__self__", None), PeftLayer) for h in module._load_state_dict_pre_hooks.values()
    ):
        return "already carries a link: another ChainOptimizer owns this model; call its finish() first"
    if len(module.lora_embedding_A):
        return f"is an embedding with a PEFT adapter: {_PLAIN}"
    names = list(module.lora_A.keys())
    if len(names) != 1:
        return (
            f"carries the PEFT adapters {', '.join(names) or '(none)'}: a knot would change the weights under all of "
            "them, so keep one and delete_adapter the others"
        )
    if module.merged:
        return "has its PEFT adapter merged: call unmerge_adapter() first"
    if module.disable_adapters:
        return "has its PEFT adapter disabled: call enable_adapter_layers() first"
    if list(module.active_adapters) != names:
        return f"has the active adapters {list(module.active_adapters)} and carries {names}: call set_adapter first"
    (name,) = names
    if getattr(module, "lora_variant", {}).get(name) is not None or module.use_dora.get(name):
        kind = "DoRA" if module.use_dora.get(name) or len(module.lora_magnitude_vector) else "a variant of LoRA"
        return f"uses {kind}, whose update is more than s·BA and so is no link of a chain: use plain LoRA"
    if module.lora_bias.get(name):
        return "has lora_bias=True, an update in addition to s·BA: leave it off"
    if type(module.lora_A[name]) is not nn.Linear or type(module.lora_B[name]) is not nn.Linear:
        return f"is a {type(module).__name__} of PEFT, whose factors are not plain linear layers: {_PLAIN}"
    return None


class PeftLayer:
    """A view of a PEFT LoRA layer with the members of `AdaptedLayer` that `LiveLink` uses.

    Everything is looked up on PEFT's module at each access.

    Args:
        module: PEFT's layer, for which `refusal` is None.
        allowed_ranks: ranks that a loaded state may have; None for any.
    """

    def __init__(self, module: Any, allowed_ranks: tuple[int, ...] | None) -> None:
        self.module = module
        self.adapter: str = next(iter(module.lora_A.keys()))
        self.allowed_ranks = allowed_ranks
        self.hook = module.register_load_state_dict_pre_hook(self._make_room)
        if self.kind.quantized:
            stacked.begin(module.base_layer)

    def gone(self) -> bool:
        """Whether PEFT has deleted the adapter."""
        return self.adapter not in self.module.lora_A

    @property
    def lora_A(self) -> nn.Parameter:
        """r×in."""
        return self.module.lora_A[self.adapter].weight

    @property
    def lora_B(self) -> nn.Parameter:
        """out×r."""
        return self.module.lora_B[self.adapter].weight

    @property
    def plain_weight(self) -> Tensor:
        """The base layer's stored weight, without the link."""
        return self.weight

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.module.base_layer.weight

    @property
    def rank(self) -> int:
        """The link's rank; the Parameters may be larger, with zeros beyond it."""
        return self.module.r[self.adapter]

    @rank.setter
    def rank(self, rank: int) -> None:
        self.module.r[self.adapter] = rank

    @property
    def scaling(self) -> float:
        """s."""
        return self.module.scaling[self.adapter]

    @scaling.setter
    def scaling(self, scaling: float) -> None:
        self.module.scaling[self.adapter] = scaling

    @property
    def holder(self) -> nn.Module:
        """The module that holds the weight: the one inside PEFT's."""
        return self.module.base_layer

    @property
    def held(self) -> tuple[nn.Module, tuple[str, ...]]:
        """The module that holds the weight; the factors lie in PEFT's own modules."""
        return self.holder, ()

    @property
    def borrowers(self) -> tuple[nn.Module, ...]:
        """None: a weight that PEFT adapts is shared with nobody."""
        return ()

    @property
    def kind(self) -> type[AdaptedLayer]:
        """The kind of the base layer."""
        return known_kind(self.holder)

    def put(self, A: Tensor, B: Tensor, scaling: float, *, mask: bool) -> None:
        """As `AdaptedLayer.put`."""
        put_pair(self.lora_A, self.lora_B, A, B, mask=mask)
        room = self.lora_A.shape[0]
        self.module.lora_A[self.adapter].out_features = self.module.lora_B[self.adapter].in_features = room
        self.rank, self.scaling = A.shape[0], scaling

    @torch.no_grad()
    def detach(self, *, spent: bool = False) -> None:
        """Release the layer, which stays PEFT's; B is zeroed if the link is spent (tied or dropped)."""
        if spent and not self.gone():
            self.lora_B.zero_()
        stacked.settle(self.module.base_layer)
        self.hook.remove()

    def _make_room(self, module: Any, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        """Make room for a link of another permitted rank, before a state dict is loaded."""
        A, B = (state_dict.get(f"{prefix}{name}.{self.adapter}.weight") for name in FACTORS)
        make_room(self, A, B)


def link_config(
    config: LinkConfig, layers: Mapping[str, Any], model: nn.Module
) -> tuple[LinkConfig, dict[str, LayerPlan]]:
    """``config`` with PEFT's choices filled in: rank and scale of the first link, and the init.

    The configuration takes the values of most layers (of those with its first rank, if it sets r). Layers that differ
    (``rank_pattern``, ``alpha_pattern``) have them in their `LayerPlan`.

    Args:
        config: the caller's. A value that PEFT decides must be the default or agree with PEFT's.
        layers: PEFT's modules by path.
        model: the model that holds them and PEFT's configuration.

    Returns:
        The configuration, and the plan of every layer.

    Raises:
        ValueError: ``config`` disagrees with PEFT.
    """
    own = {path: (next(iter(m.r.values())), next(iter(m.scaling.values()))) for path, m in layers.items()}
    default = LinkConfig()
    ranks = [rank for rank, _ in own.values()]
    meant = ranks if config.r == default.r else [config.rank_of(0)]
    counts = Counter(values for values in own.values() if values[0] in meant)
    given = ("target_modules", "lora_dropout", "bias", "modules_to_save", "dtype", "parts", *PER_LAYER)
    for name in given:
        value = getattr(config, name)
        if value != getattr(default, name):
            raise ValueError(
                f"link=LinkConfig({name}={value!r}) conflicts with the model's PEFT layers, which are used as they "
                "are: set it in PEFT's LoraConfig, or give the model without an adapter"
            )
    if config.train == "A":
        raise ValueError(
            "link=LinkConfig(train='A') needs a first link whose B is drawn, and PEFT's layers start with B = 0: use "
            "'both' or 'B', or give the model without an adapter"
        )
    if not counts:
        raise ValueError(
            f"link=LinkConfig(r={config.r!r}) starts with rank {config.rank_of(0)}, and the model's PEFT layers have "
            f"rank {' or '.join(map(str, sorted(set(ranks))))}: make them agree, or leave r out"
        )
    rank, scale = usual = counts.most_common(1)[0][0]
    if config.r == default.r:
        config = dataclasses.replace(config, r=rank)
    if config.lora_alpha != default.lora_alpha and not math.isclose(config.scaling_of(0), scale):
        raise ValueError(
            f"link=LinkConfig(lora_alpha={config.lora_alpha!r}) means a scale of {config.scaling_of(0):g}, and the "
            f"model's PEFT layers have {scale:g}: make them agree, or leave lora_alpha out"
        )
    width = math.sqrt(rank) if config.scaling == "rslora" else rank
    init = _init_like(layers, model) if config.init == default.init else config.init
    config = dataclasses.replace(config, lora_alpha=scale * width, init=init)
    plans = {path: LayerPlan(config, *(() if values == usual else values)) for path, values in own.items()}
    for path, plan in plans.items():
        room, wanted = own[path][0], max(plan.known_ranks() or (1,))
        if config.rank_change == "mask" and wanted > room:
            raise ValueError(
                f"link=LinkConfig(r={config.r!r}) needs rank {wanted}, and PEFT's layer {path!r} has room for {room}, "
                "which rank_change='mask' keeps: give PEFT's LoraConfig the largest r first, or use the model without "
                "an adapter"
            )
    return config, plans


def _init_like(layers: Mapping[str, Any], model: nn.Module) -> str:
    """The init that draws later links as PEFT drew the first."""
    names = {name for module in layers.values() for name in module.lora_A}
    theirs = next((getattr(c, "init_lora_weights", True) for name, c in configs(model) if name in names), True)
    word = str(theirs).lower()
    if word in _INITS:
        return _INITS[word]
    init = _NEAREST.get(word, "kaiming")
    logger.warning(
        "PEFT started the first link by init_lora_weights=%r; later links start by init=%r, with B = 0. Choose another "
        "by LinkConfig(init=...)",
        theirs,
        init,
    )
    return init
