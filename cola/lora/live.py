"""The live link: the factors in training, on the layers that carry them.

It holds modules, never Parameters, which frameworks (FSDP2) replace: each knot looks them up.
"""

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola.common.arguments import choice
from cola.common.distributed import (
    is_sharded,
    local,
    release,
    require_supported,
    require_unwrapped,
    shapes_are_free,
    whole,
)
from cola.knot.tie import ROUNDINGS, KnotError, Tie, key, residual_like
from cola.lora import per_layer, quantized, row_targets
from cola.lora.config import LayerPlan, LinkConfig
from cola.lora.init import Pair
from cola.lora.kinds import is_quantized, known_kind
from cola.lora.layer import FACTORS, AdaptedLayer, Triple
from cola.lora.link import Factor, LayerReport, Link, Rows
from cola.lora.names import called, listed, modules_by_name, require_plain_name, shared_weights, unwrap
from cola.lora.parted import Parted, parting
from cola.lora.parts import parts_of
from cola.lora.peft import PeftLayer, link_config, require_whole
from cola.lora.reading import LinkedEmbedding
from cola.lora.selected import selecting
from cola.lora.start import Starts
from cola.lora.targets import WHOLE, borrowers, find_peft_layers, find_saved, find_targets, require_dropped
from cola.lora.token_rows import TokenRows, train_rows
from cola.lora.trainable import Trainable
from cola.lora.unsaved import SaveStatus, restore_save, warn_on_save

logger = logging.getLogger("cola")

#: `rounding="auto"` by weight dtype. experiments/RESULTS.md, "Rounding", has the measurements behind it.
AUTO_ROUNDING = {
    torch.float64: "nearest",
    torch.float32: "nearest",
    torch.bfloat16: "stochastic",
    torch.float16: "stochastic",
}

Carrier = AdaptedLayer | PeftLayer


class LiveLink:
    """Puts links on a model, ties them, and removes them.

    Args:
        model: any module; adapted in place.
        config: settings of the links.
        rounding: ``"auto"`` or one of `cola.knot.tie.ROUNDINGS`.
        seed: seed of all draws.
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
        self.note = SaveStatus()
        self.model, self.config, self.rounding, self.seed = model, config, rounding, seed
        self.quantized, self.index = quantised, 0
        self.residuals: dict[str, Tensor] = {}
        self.starts = Starts(self)
        inside = modules_by_name(model)
        narrow = functools.partial(per_layer.narrowed, config)
        modules = {path: inside[path] for path in tuned}
        modules = modules or find_targets(model, config.target_modules, narrow, config.target_parameters)
        heads = [*config.modules_to_save, *per_layer.heads_to_train(config, inside)]
        saved = find_saved(model, heads, modules)
        rows = row_targets.find_rows(model, config.trainable_token_indices, saved)
        row_targets.require_no_link(rows, modules, config.target_modules)
        if not tuned:
            every = {**modules, **{path: row.layer for path, row in rows.items()}}
            require_unwrapped(model, {path: module.weight for path, module in every.items()})  # type: ignore[misc]
            require_dropped(config.lora_dropout, modules)
        if not tuned:
            plans = {path: LayerPlan(config, *own) for path, own in per_layer.first_values(config, modules).items()}
        self.plans = {path: plans.get(path, LayerPlan(config)) for path in modules}
        if config.parts:
            kinds = {path: known_kind(module) for path, module in modules.items()}
            shapes = {path: kind.shape(modules[path]) if kind.linear else None for path, kind in kinds.items()}
            for path, parts in parts_of(config, shapes, inside).items():
                self.plans[path] = replace(self.plans[path], parts=parts)
        for path in (*modules, *rows):
            require_plain_name(path)  # refuse before training what could not be saved under its name
        self._fit_ranks(modules)
        drawn = {  # PEFT's layers have their first link already
            path: self._draw(path, module, 0, config._dtype_for(module.weight))  # type: ignore[arg-type]
            for path, module in ({} if tuned else modules).items()
        }
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
        self.trainable = Trainable(model)
        if tuned:
            self._adopt(tuned)
        else:
            for path, module in modules.items():
                self._attach(path, module, *drawn[path])
                if config.bias == "lora_only":
                    self.trainable.add(module, "bias")
        for module in saved:
            for owner in module.modules():
                for name in owner._parameters:
                    self.trainable.add(owner, name)
        self.rows = {path: train_rows(row.layer, row.indices, row.others) for path, row in rows.items()}
        for layer in self.rows.values():
            self.trainable.add(layer, TokenRows.entries[0])
        for parameter in unwrap(model).parameters():
            parameter.requires_grad_(False)
        for parameter in (*self.adapters(), *self.trained().values()):
            parameter.requires_grad_(True)
        self.saves = warn_on_save(model, self.note)

    def _fit_ranks(self, modules: dict[str, nn.Module]) -> None:
        """Refuse layers whose rank is below r; targets of the whole model leave them out, if others are left."""
        small: list[str] = []
        for path, module in list(modules.items()):
            shape, plan = self._drawn_shape(module)[-2:], self.plans[path]
            if plan.parts:
                continue  # each of them fits
            rank = max(plan.known_ranks() or (plan.rank_of(0),))
            if rank > min(shape) and self.config.target_modules in WHOLE and len(modules) > 1:
                small.append(path)  # a small classification head, say
                del modules[path], self.plans[path]
            elif rank > min(shape):
                *_, out, inner = known_kind(module).shape(module)
                padding = ", the row of padding left out" if inner != shape[1] else ""
                raise ValueError(
                    f"r={rank} is above the rank of layer {path!r}, whose weight is {out}x{inner}: "
                    f"choose r of at most {min(shape)}{padding}"
                )
        if small:
            whose = "its" if len(small) == 1 else "their"
            logger.warning(
                "target_modules=%r leaves out %s: r=%d is above %s rank",
                self.config.target_modules,
                listed(small),
                rank,
                whose,
            )

    def __repr__(self) -> str:
        count = len(self.layers)
        return f"LiveLink(link {self.index}, r={self.rank_of(self.index)}, {count} layer{'' if count == 1 else 's'})"

    # contents

    def adapters(self) -> list[nn.Parameter]:
        """The trained factors, A before B, in the model's order."""
        names = FACTORS if self.config.train == "both" else (f"lora_{self.config.train}",)
        return [getattr(layer, name) for layer in self.layers.values() for name in names]

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the factor that usually starts at zero, by layer; this process's part of sharded ones."""
        factors = {path: getattr(layer, self.zero_first(path)) for path, layer in self.layers.items()}
        return {path: local(factor.grad.detach()) for path, factor in factors.items() if factor.grad is not None}

    def factors_by_name(self) -> dict[str, nn.Parameter]:
        """The Parameters of every layer's link, by path, but for adapters that PEFT has deleted."""
        return {
            f"{path}.{name}": getattr(layer, name)
            for path, layer in self.layers.items()
            if not (isinstance(layer, PeftLayer) and layer.gone())
            for name in FACTORS
            if isinstance(getattr(layer, name), nn.Parameter)  # an A that selects inputs is none
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """The extra trained parameters (biases, heads, rows), by canonical path."""
        return self.trainable.parameters()

    def row_names(self) -> dict[str, tuple[str, TokenRows]]:
        """The weights with trained rows, by each of their names: the layer's path, and the layer."""
        shared, found = shared_weights(self.model), {}
        for path, layer in self.rows.items():
            own = f"{path}.weight".lstrip(".")
            for name in dict.fromkeys((own, *shared.get(id(layer.plain_weight), ()))):
                found[name] = path, layer
        return found

    def trained_rows(self) -> dict[str, Rows]:
        """Copies on the CPU of the rows that are trained, by name of the weight."""
        copies = {
            path: Rows(layer.row_indices.cpu(), whole(layer.trained_rows.detach()).cpu().clone())
            for path, layer in self.rows.items()
        }
        return {name: copies[path] for name, (path, _) in self.row_names().items()}

    def take_rows(self, links: Iterable[Link]) -> None:
        """Go on from the rows of the weights, and from those that ``links``, which are tied, have recorded."""
        links = list(links)
        for name, (_, layer) in self.row_names().items():
            mine = layer.row_indices.cpu()
            values = whole(layer.plain_weight.detach())[layer.row_indices].to(layer.trained_rows.dtype)
            recorded = [link.rows[name] for link in links if name in link.rows]
            for rows in recorded:  # more precise than the weight may be
                here = torch.isin(mine, rows.indices)
                places = torch.searchsorted(rows.indices, mine[here])
                values[here.to(values.device)] = rows.values[places].to(values)
            layer.take(values)

    def zero_first(self, path: str) -> str:
        """Name of the factor of a layer that usually starts at zero."""
        looks_up = self.layers[path].kind.looks_up and self.config.train == "both"
        return FACTORS[0] if self.config.train == "A" or looks_up else FACTORS[1]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """(out, in) of each layer, or (E, out, in)."""
        return {path: layer.kind.shape(layer.holder) for path, layer in self.layers.items()}

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

    def rounding_of(self, path: str) -> str:
        """How ties of one layer are rounded; for a quantised layer ``"stack"`` or ``"requantize"``."""
        layer = self.layers[path]
        if layer.kind.quantized:
            return self.quantized
        return AUTO_ROUNDING[layer.plain_weight.dtype] if self.rounding == "auto" else self.rounding

    def is_untrained(self, path: str) -> bool:
        """Whether the link of one layer still has its first values."""
        layer, factor = self.layers[path], self.factor(path)
        if factor.start is not None:
            return all(map(torch.equal, (factor.A, factor.B), factor.start))
        if self.config._draws_pairs:  # the init has chosen which factor starts at zero
            return not (factor.A.any() and factor.B.any())
        return not whole(getattr(layer, self.zero_first(path)).detach()).any().item()

    def is_zero(self) -> bool:
        """Whether the link is untrained in all layers, and so changes nothing."""
        return all(map(self.is_untrained, self.layers))

    # a knot

    @torch.no_grad()
    def check(self) -> None:
        """Before a tie, raise KnotError if a factor, a weight or their sum is not finite in the weight's dtype.

        Also raises ValueError for sharded weights that cannot be tied, and makes the residual buffers of the tie.
        """
        for path, layer in self.layers.items():
            if is_sharded(layer.plain_weight) and layer.kind.quantized:
                raise ValueError(f"layer {path!r} is quantised and sharded, which cannot be tied: use DDP")
            if is_sharded(layer.plain_weight) and self.rounding_of(path) == "compensated":
                raise ValueError(
                    "rounding='compensated' keeps a buffer per weight, which sharded weights do not have: use "
                    "'stochastic'"
                )
            factor = self.factor(path)
            for name, values in (("A", factor.A), ("B", factor.B)):
                if not torch.isfinite(values).all():
                    raise KnotError(
                        f"link {self.index} is not tied: lora_{name} of layer {path!r} has non-finite values. The "
                        "base weights are untouched: go back to a checkpoint, or drop the link by finish(merge=False)"
                    )
            own = factor.A, factor.B, factor.scaling
            reason = layer.kind.obstacle(layer.holder, [own], self.originals.get(path))
            if reason is not None:
                raise KnotError(
                    f"link {self.index} is not tied: layer {path!r} {reason}. Nothing has been changed: go back to a "
                    "checkpoint, drop the link by finish(merge=False), or use a smaller learning rate or a wider dtype"
                )
            if self.rounding_of(path) == "compensated":
                self._residual(path)
        for path, rows in self.rows.items():
            if not torch.isfinite(whole(rows.trained_rows.detach()).to(rows.plain_weight.dtype)).all():
                raise KnotError(
                    f"link {self.index} is not tied: the trained rows of {path!r} have non-finite values. Nothing has "
                    "been changed: go back to a checkpoint"
                )

    @torch.no_grad()
    def snapshot(self) -> dict[str, Factor]:
        """Copies of the link's share of each layer, on its device."""
        factors = {path: self.factor(path) for path in self.layers}
        return {path: replace(factor, A=factor.A.clone(), B=factor.B.clone()) for path, factor in factors.items()}

    def prepare(self, index: int, opt: Any = None) -> dict[str, Factor]:
        """Draw link ``index``; ``opt`` is the `ChainOptimizer`, for inits that look at it. Changes nothing."""
        drawn = {}
        for path, layer in self.layers.items():
            pair = self._draw(path, layer.holder, index, layer.lora_B.dtype, opt if index else None)
            drawn[path] = self.factor_of(index, path, *pair)
        return drawn

    def _draw(self, path: str, module: nn.Module, index: int, dtype: torch.dtype, opt: Any = None) -> Pair:
        kind, shape = known_kind(module), self._drawn_shape(module)
        A, B = self.plans[path].draw(
            path,
            shape,
            seed=self.seed,
            link=index,
            dtype=dtype,
            opt=opt,
            looks_up=kind.looks_up,
        )
        padding = getattr(module, "padding_idx", None)
        if shape != kind.shape(module):
            A = torch.cat([A[:, :padding], A.new_zeros(len(A), 1), A[:, padding:]], 1)
        elif kind.looks_up and padding is not None:
            A[:, padding] = 0  # its row is not trained: neither is it moved by B alone
        return A, B

    def _drawn_shape(self, module: nn.Module) -> tuple[int, ...]:
        """The shape for which a link is drawn: the weight's, without the row of padding if A selects rows."""
        kind, padding = known_kind(module), getattr(module, "padding_idx", None)
        *stack, out, inner = kind.shape(module)
        skips = kind.looks_up and padding is not None and self.config._selects
        return (*stack, out, inner - skips)

    def factor_of(self, index: int, path: str, A: Tensor, B: Tensor) -> Factor:
        """A and B as link ``index``'s share of one layer."""
        layer, scaling = self.layers[path], self.plans[path].scaling_of(index)
        return Factor(A, B, scaling, self.rounding_of(path), form=layer.kind.form(layer.holder))

    @torch.no_grad()
    def begin(self, index: int, link: Mapping[str, Factor]) -> None:
        """Replace the present link by link ``index``: same Parameters, new values, no gradients."""
        for path, layer in self.layers.items():
            mask, room, factor = self._masks(layer.lora_A), layer.lora_A.shape[-2], link[path]
            if mask and factor.rank > room:
                raise KnotError(
                    f"link {index} has rank {factor.rank}, there is room for {room}, and shapes may not change "
                    "here: give r as a sequence, or the largest rank first"
                )
            layer.put(factor.A, factor.B, factor.scaling, mask=mask)
            self._divide(path, index)
            layer.lora_A.grad = layer.lora_B.grad = None
        self.index = self.note.tied = index

    def make_room(self, rooms: Mapping[str, int]) -> None:
        """Give layers whose Parameters have become smaller than this their zeros beyond the rank again."""
        for path, layer in self.layers.items():
            rank, extra = layer.rank, rooms[path] - layer.lora_A.shape[-2]
            if extra > 0:
                A, B = F.pad(layer.lora_A.detach(), (0, 0, 0, extra)), F.pad(layer.lora_B.detach(), (0, extra))
                layer.put(A, B, layer.scaling, mask=False)
                layer.rank = rank

    def resume(self, index: int) -> None:
        """Continue with link ``index``, whose values the model's state dict has brought or will bring.

        Factors of another rank become zeros of the link's rank, as room for these values.
        """
        self.index = self.note.tied = index
        for path, layer in self.layers.items():
            rank, scaling = self.plans[path].rank_of(index), self.plans[path].scaling_of(index)
            room, mask = layer.lora_A.shape[-2], self._masks(layer.lora_A)
            # a masked link from a distributed run has zeros beyond its rank
            if mask or room == rank or (room > rank and not whole(layer.lora_A)[..., rank:, :].any()):
                layer.rank, layer.scaling = rank, scaling
            else:
                *stack, out, inner = layer.kind.shape(layer.holder)
                A, B = layer.lora_A.new_zeros(*stack, rank, inner), layer.lora_B.new_zeros(*stack, out, rank)
                layer.put(A, B, scaling, mask=mask)
            self._divide(path, index)

    def take_residuals(self, residuals: Mapping[str, Tensor]) -> None:
        """Continue with copies of these residual buffers, on the device that the configuration sets."""
        device = self.config.residual_device
        self.residuals = {
            path: residual.to(device or self.layers[path].plain_weight.device, copy=True)
            for path, residual in residuals.items()
            if path in self.layers
        }

    def take_links(self, links: Iterable[Link]) -> None:
        """Make ``links`` those that the re-quantised layers have taken up so far."""
        recorded = list(links)
        for path, original in self.originals.items():
            factors = [link.factors[path] for link in recorded if path in link.factors]
            mine = [triple for f in factors if f.rounding == "requantize" for triple in f.triples()]
            self.originals[path] = original.bare().extended(mine)

    @torch.no_grad()
    def tie(self, index: int, link: Mapping[str, Factor]) -> dict[str, Tie]:
        """Add ``s·B A`` of link ``index`` to the weights, in place, and return each layer's tie of the whole link.

        The trained rows are written into their weights.

        Raises KnotError if a stored weight is further from the exact sum than rounding explains.
        """
        ties = {}
        for path, factor in link.items():
            done = self.add(path, (factor.A, factor.B, factor.scaling), index, "rounding")
            start = self.starts.of.get(path)
            if start is not None:
                done = replace(done, delta=factor.norm(), lost=math.hypot(start.lost, done.lost))
            ties[path] = done
        for rows in self.rows.values():
            rows.write()
        self.starts.clear()
        return ties

    def report(self, path: str, tie: Tie) -> LayerReport:
        """One layer's share of a knot."""
        return LayerReport(tie.delta, tie.lost, self.rounding_of(path), tie.weight)

    def require_extended(self, old: Mapping[str, Factor]) -> None:
        """Raise KnotError unless the new link has one zero factor, and the other differs from the old link's."""
        for path in () if self.config._draws_pairs else self.layers:
            zero, drawn = ("A", "B") if self.zero_first(path) == FACTORS[0] else ("B", "A")
            new, before = getattr(self.factor(path), drawn), getattr(old[path], drawn)
            # a selector rightly repeats once it has gone round all coordinates
            again = new.shape == before.shape and torch.equal(new, before) and self.config.init != "selector"
            if getattr(self.factor(path), zero).any() or again:
                raise KnotError(f"link {self.index} of layer {path!r} did not start afresh: please report this")

    def detach(self, *, spent: bool = False) -> None:
        """Remove the link from the model, and restore classes, state-dict keys and ``requires_grad``.

        Args:
            spent: the link has been tied or dropped, so PEFT's layers, which stay, must not add it again.
        """
        self.starts.restore()
        held = [layer.held for layer in self.layers.values() if isinstance(layer, AdaptedLayer)]
        held += [(rows, rows.entries) for rows in self.rows.values()]
        for holder, names in held:  # all before the first detach, which takes FSDP2's class from the holder
            release(unwrap(self.model), holder, names)
        for layer in self.layers.values():
            layer.detach(spent=spent)
        for rows in self.rows.values():
            rows.detach()
        restore_save(self.saves)
        quantized.release_layout(self._held)
        for name, parameter in unwrap(self.model).named_parameters():
            if parameter.is_floating_point():  # the user may have quantised it since
                parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))

    def warn_of_empty_layers(self) -> None:
        """Say that a PEFT model's own ``save_pretrained`` would lose the chain, once it is finished."""
        if not self.note.unloads and any(isinstance(layer, PeftLayer) for layer in self.layers.values()):
            logger.warning(
                "PEFT's layers stay on the model with B = 0, so its save_pretrained() writes an adapter of zeros: call "
                "unload() for the plain model, or opt.chain.to_peft(directory) for an adapter with all links"
            )

    def factor(self, path: str) -> Factor:
        """The link's share of one layer, cut to its rank; views, not copies."""
        layer, start = self.layers[path], self.starts.of.get(path)
        A, B = whole(layer.lora_A.detach()), whole(layer.lora_B.detach())
        B = layer.within(B) if isinstance(layer, Parted) else B
        A, B = A[..., : layer.rank, :], B[..., : layer.rank]
        # the model may have been moved to another device since the link began
        pair = None if start is None else (start.A.to(A.device), start.B.to(A.device))
        return Factor(A, B, layer.scaling, self.rounding_of(path), pair, layer.kind.form(layer.holder))

    @torch.no_grad()
    def add(self, path: str, link: Triple, index: int, purpose: str) -> Tie:
        """``W ← round(W + s·B A)`` of one layer; stochastic rounding draws by ``index`` and ``purpose``."""
        layer, rounding = self.layers[path], self.rounding_of(path)
        memory: Any = self._residual(path) if rounding == "compensated" else self.originals.get(path)
        seed = key(self.seed, index, path, purpose)
        try:
            return layer.kind.tie(layer.holder, link, rounding=rounding, seed=seed, memory=memory)
        except KnotError as error:
            raise KnotError(f"link {index}, layer {path!r}: {error}") from None

    def _residual(self, path: str) -> Tensor:
        if path not in self.residuals:
            weight = self.layers[path].plain_weight
            self.residuals[path] = residual_like(weight, self.config.residual_device or weight.device)
        return self.residuals[path]

    def _divide(self, path: str, index: int) -> None:
        """Tell a layer with parts which of link ``index``'s directions are whose."""
        layer, plan = self.layers[path], self.plans[path]
        if isinstance(layer, Parted):
            layer.divide(plan.parts, plan.part_ranks(index))

    def _masks(self, tensor: Tensor) -> bool:
        change = self.config.rank_change
        return change == "mask" or (change == "auto" and not shapes_are_free(tensor))

    def _adopt(self, tuned: Mapping[str, nn.Module]) -> None:
        """Make PEFT's adapter the first link, and go on training everything that PEFT trains."""
        for path, module in tuned.items():
            self.layers[path] = PeftLayer(module, self.plans[path].known_ranks())
        factors = {id(p) for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)}
        for owner in modules_by_name(self.model).values():
            for name, p in owner._parameters.items():
                if p is not None and p.requires_grad and id(p) not in factors:
                    self.trainable.add(owner, name)

    def _attach(self, path: str, module: nn.Module, A: Tensor, B: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        dtype = self.config._dtype_for(weight)
        A, B = (factor.to(device=weight.device, dtype=dtype) for factor in (A, B))
        adapted = known_kind(module).over(type(module))
        adapted = selecting(adapted) if self.config._keeps_indices else adapted
        module.__class__ = parting(adapted) if self.plans[path].parts else adapted
        assert isinstance(module, AdaptedLayer)
        known, scaling = self.plans[path].known_ranks(), self.plans[path].scaling_of(0)
        room = max(known or (A.shape[-2],)) if self._masks(weight) else A.shape[-2]
        empty = A.new_zeros(*A.shape[:-2], room, A.shape[-1]), B.new_zeros(*B.shape[:-1], room)
        module.attach(*empty, scaling, 0.0)
        module.put(A, B, scaling, mask=True)
        module.lora_dropout, module.allowed_ranks = self.config.lora_dropout, known
        self.layers[path] = module
        self._divide(path, 0)
        if isinstance(module, LinkedEmbedding):
            module.lend(borrowers(self.model, path, module))
