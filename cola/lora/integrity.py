"""Checks that the layers with the live link have not been changed by others.

PEFT may merge or unload an adapter, and users may replace or offload a layer, or parametrize its weight. A link tied
into such a layer would be added twice, or to a weight that the model no longer reads.
"""

import logging
from collections.abc import Mapping

from torch import nn

from cola.common.distributed import is_sharded
from cola.knot.tie import TIEABLE, KnotError
from cola.lora import peft
from cola.lora.kinds import is_quantized
from cola.lora.layer import AdaptedLayer
from cola.lora.live import LiveLink
from cola.lora.names import layer_at, modules_by_name, unwrap
from cola.lora.parameter import ParameterView, ReadsParameters
from cola.lora.peft import PeftLayer
from cola.lora.token_rows import TokenRows

logger = logging.getLogger("cola")

_GIVE_UP = "or let the model go as it is by opt.finish(merge=False), without this link in the chain"


def require_intact(live: LiveLink) -> None:
    """Raise KnotError, which says what happened and what to do, if others have changed a layer. Changes nothing."""
    inside, modules = {id(module) for module in unwrap(live.model).modules()}, modules_by_name(live.model)
    for path in live.layers:
        reason = _absence(path, live, inside, modules) or _change(path, live)
        if reason is not None:
            raise KnotError(f"layer {path!r} {reason}. Nothing has been changed")
    for path, rows in live.rows.items():
        weight = rows._parameters.get("weight")
        if modules.get(path) is not rows or not isinstance(rows, TokenRows):
            reason = "has been replaced (resize_token_embeddings?), and its trained rows with it: put it back"
        elif weight is None or any(other._parameters.get("weight") is not weight for other in rows.borrowers):
            reason = "no longer shares its weight with the layers that shared it: tie them again"
        else:
            continue
        raise KnotError(f"layer {path!r} {reason}. Nothing has been changed")


def require_removable(live: LiveLink) -> None:
    """Raise KnotError if removing the live link would break the model. Changes nothing."""
    inside = {id(module) for module in unwrap(live.model).modules()}
    for path, layer in live.layers.items():
        reason = None
        if isinstance(layer, PeftLayer):
            if id(layer.module) in inside and layer.module.merged:
                reason = peft.refusal(layer.module, own=True)
        elif layer.kind.parameter(layer.holder) is None:
            reason = _COMPUTED
        if reason is not None:
            raise KnotError(f"layer {path!r} {reason}. Nothing has been changed")


def warn_of_loaded_link(live: LiveLink) -> None:
    """Warn, before the first step of a run, of a link that is already trained: its history is missing.

    PEFT's layers are not checked: an adapter may be trained before it becomes a chain's first link.
    """
    own = [path for path, layer in live.layers.items() if isinstance(layer, AdaptedLayer)]
    if not all(map(live.is_untrained, own)):
        logger.warning(
            "the link was trained before this optimizer's first step: the model's state dict was loaded without the "
            "optimizer's. Links that were tied before are in the weights but not in the chain, so exports lack them, "
            "and the policy begins anew. Load the optimizer's state dict as well, or use opt.save and opt.load"
        )


def weights_of(live: LiveLink) -> dict[str, nn.Parameter]:
    """The weights as Parameters, by path, for `require_same_weights` to compare."""
    weights = ((path, layer.kind.parameter(layer.holder)) for path, layer in live.layers.items())
    return {path: weight for path, weight in weights if weight is not None}


def require_same_weights(live: LiveLink, held: Mapping[str, nn.Parameter]) -> None:
    """Raise KnotError if a weight has been replaced since training began, when `weights_of` gave ``held``.

    Call `require_intact` first. Layers that ``held`` lacks are not compared. Changes nothing.
    """
    for path, weight in weights_of(live).items():
        before = held.get(path, weight)
        if before is not weight and not is_sharded(before) and not is_sharded(weight):  # FSDP2 swaps them itself
            raise KnotError(
                f"layer {path!r} has been given another weight after training had begun, which the chain does not "
                f"record: put the old weight back, {_GIVE_UP}. Nothing has been changed"
            )


_COMPUTED = (
    "has a weight that is computed (a parametrization, weight_norm or pruning came after the ChainOptimizer), into "
    "which nothing can be tied: remove it first, e.g. by torch.nn.utils.parametrize.remove_parametrizations"
)


def _absence(path: str, live: LiveLink, inside: set[int], modules: Mapping[str, nn.Module]) -> str | None:
    """Why the layer is no longer in its place; None if it is."""
    layer = live.layers[path]
    if isinstance(layer, PeftLayer) and id(layer.module) not in inside:
        if layer.module.merged:
            return (
                "has been merged and unloaded by PEFT (merge_and_unload), so its weight holds the live link already "
                "and would get it a second time: call opt.finish() before model.unload() next time, " + _GIVE_UP
            )
        return f"has been unloaded by PEFT, and the live link with it: call opt.finish() first, {_GIVE_UP}"
    holder = layer.holder
    if layer_at(modules, path) == holder:
        return None
    elsewhere = next((other for other, module in modules.items() if module is holder), None)
    if elsewhere is not None:
        return f"is now at {elsewhere!r}, where the chain's record would not find it: put it back"
    there = layer_at(modules, path)
    what = "has been deleted" if there is None else f"has been replaced by a {type(there).__name__}"
    if isinstance(there, ParameterView):
        what = "now belongs to another module"
    return f"{what}, and the live link went with it: put the adapted layer back, {_GIVE_UP}"


def _change(path: str, live: LiveLink) -> str | None:
    """Why the layer cannot be tied; None if it can."""
    layer = live.layers[path]
    holder = layer.holder
    if isinstance(layer, PeftLayer):
        if layer.gone():
            return f"has lost its PEFT adapter {layer.adapter!r}, and the live link with it: load it again, {_GIVE_UP}"
        reason = peft.refusal(layer.module, own=True)
        if reason is not None:
            return reason
    elif not isinstance(layer.held[0], AdaptedLayer | ReadsParameters):
        return f"has become a {type(holder).__name__}: put the adapted layer back, {_GIVE_UP}"
    weight = layer.kind.parameter(holder)
    if weight is None:
        return _COMPUTED
    if any(other._parameters.get("weight") is not weight for other in layer.borrowers):
        return "no longer shares its weight with the layers that shared it: tie them again, " + _GIVE_UP
    if weight.is_meta or layer.lora_A.is_meta or layer.lora_B.is_meta:
        return (
            "has its parameters on the meta device: they were offloaded after the ChainOptimizer was made "
            "(cpu_offload, disk_offload, a device_map with offloading), so the optimizer has nothing to train there. "
            "Keep the adapted layers on a device"
        )
    if weight.dtype not in TIEABLE and not is_quantized(holder):
        return f"has a {weight.dtype} weight now (quantised?), into which nothing can be tied: quantise before training"
    return None
