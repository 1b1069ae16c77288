"""The live link: the adapters that are being trained, on the layers that carry them.

It holds modules, never Parameters: frameworks replace Parameters (FSDP2) and weights, and what is looked up at
each knot cannot be stale.
"""

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from cola.common.arguments import choice
from cola.common.distributed import is_sharded, release, require_supported, require_unwrapped, shapes_are_free, whole
from cola.knot.sharded import obstacle_anywhere, tie_anywhere
from cola.knot.tie import ROUNDINGS, KnotError, Tie, key, residual_like, tolerance
from cola.lora import quantized
from cola.lora.config import LayerPlan, LinkConfig, Prepared, prepare
from cola.lora.init import Pair
from cola.lora.kinds import adapted_class, is_conv1d
from cola.lora.layer import AdaptedLayer
from cola.lora.link import Factor, Link
from cola.lora.names import called, listed, modules_by_name, require_plain_name, unwrap
from cola.lora.peft import PeftConv1D, PeftLayer, link_config, require_whole
from cola.lora.quantized import is_quantized
from cola.lora.targets import find_peft_layers, find_saved, find_targets
from cola.lora.trainable import Beside
from cola.lora.unsaved import Note, forget, remind

logger = logging.getLogger("cola")

#: `rounding="auto"`: what each weight dtype gets. The measurement behind it is in experiments/RESULTS.md, "Rounding".
AUTO_ROUNDING = {
    torch.float64: "nearest",
    torch.float32: "nearest",
    torch.bfloat16: "stochastic",
    torch.float16: "stochastic",
}

Carrier = AdaptedLayer | PeftLayer
_FACTORS = ("lora_A", "lora_B")


class LiveLink:
    """Puts links on a model, ties them, and takes them off.

    Args:
        model: any module; adapted in place.
        config: what a link is.
        rounding: ``"auto"`` or one of `cola.knot.tie.ROUNDINGS`.
        seed: key of all draws.
        quantised: one of `cola.lora.quantized.QUANTIZED`.

    Raises:
        ValueError: a bad target, rank or rounding; the model is untouched then.
    """

    def __init__(
        self, model: nn.Module, config: LinkConfig, rounding: str, seed: int, quantised: str = "stack"
    ) -> None:
        if rounding != "auto" and rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} is unknown: choose 'auto' or one of {', '.join(ROUNDINGS)}")
        choice("quantized", quantised, quantized.QUANTIZED)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed={seed!r} must be an integer")
        require_supported(model)
        require_whole(called(model))
        tuned = find_peft_layers(model)
        config, plans = link_config(config, tuned, called(model)) if tuned else (config, {})
        self.note = Note()
        self.model, self.config, self.rounding, self.seed = model, config, rounding, seed
        self.quantized, self.index = quantised, 0
        self.residuals: dict[str, Tensor] = {}
        inside = modules_by_name(model)
        modules = {path: inside[path] for path in tuned} or find_targets(model, config.target_modules)
        if not tuned:
            require_unwrapped(model, {path: module.weight for path, module in modules.items()})  # type: ignore[misc]
        saved = find_saved(model, config.modules_to_save, modules)
        self.plans = {path: plans.get(path, LayerPlan(config)) for path in modules}
        for path in modules:
            require_plain_name(path)  # what could not be saved under its name is refused before it is trained
        small: list[str] = []
        for path, module in list(modules.items()):
            shape, plan = adapted_class(module).shape(module), self.plans[path]
            ranks = plan.known_ranks() or (plan.rank_of(0),)
            if max(ranks) > min(shape) and config.target_modules == "all-linear" and len(modules) > 1:
                # a small classification head should not stand in the way of "all"
                small.append(path)
                del modules[path], self.plans[path]
            elif max(ranks) > min(shape):
                raise ValueError(
                    f"r={max(ranks)} is above the rank of layer {path!r}, whose weight is {shape[0]}x{shape[1]}: "
                    f"choose r of at most {min(shape)}"
                )
        if small:
            whose = "its" if len(small) == 1 else "their"
            logger.warning(
                "target_modules='all-linear' leaves out %s: r=%d is above %s rank", listed(small), max(ranks), whose
            )
        prepared = self._draw(0, {path: adapted_class(module).shape(module) for path, module in modules.items()})
        device = config.residual_device
        self.originals = {
            path: quantized.OriginalWeight.of(module, device)
            for path, module in modules.items()
            if is_quantized(module) and quantised == "requantize"
        }
        # from here on nothing can fail
        self.layers: dict[str, Carrier] = {}
        self._requires_grad = {name: p.requires_grad for name, p in unwrap(model).named_parameters()}
        self._held = quantized.hold_layout(unwrap(model))
        self.beside = Beside(model)
        if tuned:
            self._adopt(tuned)
        else:
            for path, module in modules.items():
                self._attach(path, module, prepared)
                if config.bias == "lora_only":
                    self.beside.add(module, "bias")
        for module in saved:
            for owner in module.modules():
                for name in owner._parameters:
                    self.beside.add(owner, name)
        for parameter in unwrap(model).parameters():
            parameter.requires_grad_(False)
        for parameter in (*self.adapters(), *self.trained().values()):
            parameter.requires_grad_(True)
        self._reminded = remind(model, self.note)

    # what it holds

    def adapters(self) -> list[nn.Parameter]:
        """The factors that are trained, A before B, in the model's order."""
        names = {"both": ("lora_A", "lora_B"), "A": ("lora_A",), "B": ("lora_B",)}[self.config.train]
        return [getattr(layer, name) for layer in self.layers.values() for name in names]

    def factors_by_name(self) -> dict[str, nn.Parameter]:
        """Both factors of every layer that has them, by path: PEFT may have deleted an adapter."""
        held = {
            path: layer for path, layer in self.layers.items() if not (isinstance(layer, PeftLayer) and layer.gone())
        }
        return {f"{path}.{name}": getattr(layer, name) for path, layer in held.items() for name in _FACTORS}

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters trained beside the adapters, by canonical path; they live through every knot."""
        return self.beside.parameters()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each layer."""
        return {path: type(layer).shape(layer) for path, layer in self.layers.items()}  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        """The link's rank, the largest where layers differ."""
        return max(layer.rank for layer in self.layers.values())

    def rank_of(self, index: int) -> int:
        """Rank of link ``index``, the largest where layers differ."""
        return max(plan.rank_of(index) for plan in self.plans.values())

    @property
    def scaling(self) -> float:
        """The link's s in the first layer."""
        return next(iter(self.layers.values())).scaling

    def scaling_of(self, index: int) -> float:
        """s of link ``index`` in the first layer."""
        return next(iter(self.plans.values())).scaling_of(index)

    def scalings(self) -> dict[str, float]:
        """The link's s in each layer."""
        return {path: layer.scaling for path, layer in self.layers.items()}

    def holder(self, path: str) -> nn.Module:
        """The module that has the weight of a layer: the layer itself, or the one that PEFT has wrapped."""
        layer = self.layers[path]
        return layer.module.base_layer if isinstance(layer, PeftLayer) else layer

    def rounding_of(self, path: str) -> str:
        """How ties of one layer are rounded; of a quantised layer, what is done instead."""
        if is_quantized(self.holder(path)):
            return self.quantized
        return AUTO_ROUNDING[self.layers[path].weight.dtype] if self.rounding == "auto" else self.rounding

    def is_zero(self) -> bool:
        """Whether the link changes nothing (it has not been trained)."""
        zero_first = "lora_A" if self.config.train == "A" else "lora_B"
        return not any(whole(getattr(layer, zero_first)).any().item() for layer in self.layers.values())

    # a knot, in the order in which the optimizer calls

    @torch.no_grad()
    def check(self) -> None:
        """Refuse to tie what would damage the weights, and make room for what the tie needs.

        Raises:
            KnotError: a factor, the weight or their sum is not finite in the weight's dtype; names the layer.
            ValueError: compensated rounding of sharded weights.
        """
        for path, layer in self.layers.items():
            if is_sharded(layer.weight) and is_quantized(self.holder(path)):
                raise ValueError(f"layer {path!r} is quantised and sharded, which cannot be tied: use DDP")
            if is_sharded(layer.weight) and self.rounding_of(path) == "compensated":
                raise ValueError(
                    "rounding='compensated' keeps a buffer per weight, which sharded weights do not have: use "
                    "'stochastic'"
                )
            A, B = whole(layer.lora_A), whole(layer.lora_B)
            for name, factor in (("A", A), ("B", B)):
                if not torch.isfinite(factor).all():
                    raise KnotError(
                        f"link {self.index} is not tied: lora_{name} of layer {path!r} has non-finite values. The "
                        "base weights are untouched: go back to a checkpoint, or drop the link by finish(merge=False)"
                    )
            left, right = layer.factors(A, B)
            if is_quantized(self.holder(path)):
                triple = A[: layer.rank], B[:, : layer.rank], layer.scaling
                reason = quantized.obstacle(self.holder(path), [triple], self.originals.get(path))
            else:
                reason = obstacle_anywhere(layer.weight, left, right, layer.scaling)
            if reason is not None:
                raise KnotError(
                    f"link {self.index} is not tied: layer {path!r} {reason}. Nothing has been changed: go back to a "
                    "checkpoint, drop the link by finish(merge=False), or use a smaller learning rate or a wider dtype"
                )
            if self.rounding_of(path) == "compensated" and path not in self.residuals:
                device = self.config.residual_device or layer.weight.device
                self.residuals[path] = residual_like(layer.weight, device)

    @torch.no_grad()
    def snapshot(self) -> dict[str, Pair]:
        """Copies of the factors, cut to the link's rank, on their device."""
        return {
            path: (whole(layer.lora_A)[: layer.rank].clone(), whole(layer.lora_B)[:, : layer.rank].clone())
            for path, layer in self.layers.items()
        }

    def factors(self, snapshot: Mapping[str, Pair]) -> dict[str, Factor]:
        """The snapshot as the ledger keeps it."""
        return {
            path: Factor(A.cpu(), B.cpu(), self.layers[path].scaling, self.rounding_of(path))
            for path, (A, B) in snapshot.items()
        }

    def present(self, snapshot: Mapping[str, Pair]) -> Prepared:
        """The present link in the form of `prepare`'s, to go back to."""
        return Prepared(snapshot, self.scaling, self.rank, self.scalings())

    def prepare(self, index: int) -> Prepared:
        """Draw link ``index``; changes nothing."""
        return self._draw(index, self.shapes())

    @torch.no_grad()
    def begin(self, index: int, prepared: Prepared) -> None:
        """Put link ``index`` in the place of the present one: same Parameters, new values, no gradients."""
        for path, layer in self.layers.items():
            mask, room, (A, B) = self._masks(layer.lora_A), layer.lora_A.shape[0], prepared.pairs[path]
            if mask and len(A) > room:
                raise KnotError(
                    f"link {index} has rank {len(A)}, above the {room} that there is room for, and shapes "
                    "may not change here: give r as a sequence, or the largest rank first"
                )
            scalings = prepared.scalings
            layer.put(A, B, self.plans[path].scaling_of(index) if scalings is None else scalings[path], mask=mask)
            layer.lora_A.grad = layer.lora_B.grad = None
        self.index = self.note.tied = index

    def resume(self, index: int) -> None:
        """Say that the factors at hand are link ``index``'s: the model's state dict has brought their values, or will.

        Factors of another rank are replaced by that link's draw, so that there is room for the values to come.
        """
        prepared = self.prepare(index)
        self.index = self.note.tied = index
        for path, layer in self.layers.items():
            mask, (A, B), scaling = self._masks(layer.lora_A), prepared.pairs[path], self.plans[path].scaling_of(index)
            # a masked link that comes from a distributed run has zeros beyond its rank
            masked = layer.lora_A.shape[0] > len(A) and not whole(layer.lora_A)[len(A) :].any()
            if mask or masked or layer.lora_A.shape[0] == len(A):
                layer.rank, layer.scaling = len(A), scaling
            else:
                layer.put(A, B, scaling, mask=mask)

    def take_residuals(self, residuals: Mapping[str, Tensor]) -> None:
        """Go on with copies of these residual buffers, where the configuration keeps them."""
        device = self.config.residual_device
        self.residuals = {
            path: residual.to(device or self.layers[path].weight.device, copy=True)
            for path, residual in residuals.items()
            if path in self.layers
        }

    def take_links(self, links: Iterable[Link]) -> None:
        """Count these links among those that the layers to be re-quantised have been given."""
        recorded = list(links)
        for path, origin in self.originals.items():
            factors = [link.factors[path] for link in recorded if path in link.factors]
            mine = [(f.A, f.B, f.scaling) for f in factors if f.rounding == "requantize"]
            self.originals[path] = origin.bare().extended(mine)

    def tie(self, index: int, snapshot: Mapping[str, Pair], scalings: Mapping[str, float]) -> dict[str, Tie]:
        """Add the snapshot of link ``index`` to the weights, in place; beside or into codes where they are quantised.

        Raises:
            KnotError: a stored weight is farther from the exact sum than rounding explains.
        """
        ties = {}
        for path, (A, B) in snapshot.items():
            layer, scaling = self.layers[path], scalings[path]
            if is_quantized(self.holder(path)):
                (ties[path],) = quantized.tie(self.holder(path), [(A, B, scaling)], self.originals.get(path))
                continue
            left, right = layer.factors(A, B)
            rounding = self.rounding_of(path)
            ties[path] = tie_anywhere(
                layer.weight.detach(),
                left,
                right,
                scaling,
                rounding=rounding,
                seed=key(self.seed, index, path, "rounding"),
                residual=self.residuals.get(path) if rounding == "compensated" else None,
            )
            limit = tolerance(layer.weight, ties[path], A.shape[0])
            if not (math.isfinite(limit) and ties[path].deviation <= limit):
                raise KnotError(
                    f"link {index}: the tied weight of layer {path!r} is {ties[path].deviation:.3g} from W + sBA, and "
                    f"rounding to {layer.weight.dtype} explains {limit:.3g}: please report this"
                )
        return ties

    def require_extended(self, snapshot: Mapping[str, Pair]) -> None:
        """Check what a new link must be: one factor zero, and the drawn one not the old one.

        Raises:
            KnotError: it is not.
        """
        zero, drawn = ("lora_A", "lora_B") if self.config.train == "A" else ("lora_B", "lora_A")
        for path, layer in self.layers.items():
            old = snapshot[path][1 if drawn == "lora_B" else 0]
            new = whole(getattr(layer, drawn))
            # a selector that has gone round all coordinates is the old one by right
            again = new.shape == old.shape and torch.equal(new, old) and self.config.init != "selector"
            if whole(getattr(layer, zero)).any() or again:
                raise KnotError(f"link {self.index} of layer {path!r} did not start afresh: please report this")

    def detach(self, *, spent: bool = False) -> None:
        """Take the link off the model: classes, state-dict keys and ``requires_grad`` are as before.

        Args:
            spent: the link has been tied or dropped, so PEFT's layers, which stay, must not add it once more.
        """
        for layer in self.layers.values():
            if isinstance(layer, AdaptedLayer):
                release(unwrap(self.model), layer, ("lora_A", "lora_B"))
            layer.detach(spent=spent)
        forget(self._reminded)
        quantized.release_layout(self._held)
        if spent and any(isinstance(layer, PeftLayer) for layer in self.layers.values()):
            logger.info(
                "PEFT's layers stay on the model with B = 0, so its save_pretrained() writes an adapter of zeros: call "
                "unload() for the plain model, or opt.chain.to_peft(directory) for an adapter with all links"
            )
        for name, parameter in unwrap(self.model).named_parameters():
            if parameter.is_floating_point():  # one that the user has quantised since can have no gradient
                parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))

    # inside

    def _masks(self, tensor: Tensor) -> bool:
        change = self.config.rank_change
        return change == "mask" or (change == "auto" and not shapes_are_free(tensor))

    def _adopt(self, tuned: Mapping[str, nn.Module]) -> None:
        """Take PEFT's layers as they are: the first link is what they hold, and what they train beside it stays so."""
        for path, module in tuned.items():
            kind = PeftConv1D if is_conv1d(module.base_layer) else PeftLayer  # type: ignore[arg-type]
            self.layers[path] = kind(module, self.plans[path].known_ranks())
        factors = {id(p) for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)}
        for owner in modules_by_name(self.model).values():
            for name, p in owner._parameters.items():
                if p is not None and p.requires_grad and id(p) not in factors:
                    self.beside.add(owner, name)

    def _attach(self, path: str, module: nn.Module, prepared: Prepared) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        dtype = self.config.dtype_for(weight)
        kind = adapted_class(module)
        A, B = (factor.to(device=weight.device, dtype=dtype) for factor in prepared.pairs[path])
        module.__class__ = kind
        assert isinstance(module, AdaptedLayer)
        known = self.config.known_ranks()
        room = max(known or (prepared.rank,)) if self._masks(weight) else prepared.rank
        module.attach(A.new_zeros(room, A.shape[1]), B.new_zeros(B.shape[0], room), prepared.scaling, 0.0)
        module.put(A, B, prepared.scaling, mask=True)
        module.lora_dropout, module.allowed_ranks = self.config.lora_dropout, known
        self.layers[path] = module

    def _draw(self, index: int, shapes: Mapping[str, tuple[int, int]]) -> Prepared:
        return prepare(self.config, self.plans, shapes, seed=self.seed, link=index)
