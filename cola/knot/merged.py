"""The merged model in mid-run: the live link is tied for a while, then everything is put back to the bit."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cola.common import interrupts
from cola.common.distributed import is_sharded, reshard
from cola.lora import quantized
from cola.lora.coverage import counted
from cola.lora.layer import rebind
from cola.lora.names import listed, odd_storage, unwrap
from cola.lora.peft import PeftLayer, is_of_peft

logger = logging.getLogger("cola")


def require_mergeable(opt: Any) -> None:
    """Raise RuntimeError if the live link cannot be tied for a while. Changes nothing."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("merged() under torch.inference_mode(): enter it inside the block instead")
    if any(is_sharded(layer.plain_weight) for layer in opt.live.layers.values()):
        raise RuntimeError(
            "merged() is for models in one piece, and this one is sharded (FSDP2). To evaluate, use the model as it "
            "is: its forward includes the live link. To save, call opt.tie() first, which begins a new link; "
            "torch.distributed.checkpoint then reads the merged weights, and lora_A and lora_B can be left out"
        )


class Block(AbstractContextManager[nn.Module]):
    """Inside the block the model of a `ChainOptimizer` is as `finish` would leave it; see `ChainOptimizer.merged`."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt
        self.before: Before | None = None

    def __enter__(self) -> nn.Module:
        opt = self.opt
        if opt.finished:
            return opt.model
        opt._require_running("merged()")
        if opt._tying:
            raise RuntimeError(
                "merged() during a knot, in reset= or init=: call it in a listener of on_knot, or after step()"
            )
        reshard(opt.live.model)
        require_mergeable(opt)
        opt._require_trainable()
        numbers = counted(opt.live.model, opt._all_in_groups())
        before = Before(opt)
        try:
            with interrupts.deferred():
                opt._require_weights()
                opt._require_given_back()
                before.set_aside()
                tied = opt._has_something_to_tie()
                before.mode = opt._leave_training_mode()
                if tied:
                    opt.live.check()
                    opt.live.tie(opt.live.index, opt.live.snapshot())
                else:
                    opt.live.starts.drop()
                opt.live.detach(spent=True)
                before.remind()
                quantized.hold_layout(unwrap(opt.live.model))  # an evaluation would rearrange the codes
                before.watch()
                # the optimizer holds the block, so that one which nobody else holds stays open
                self.before, opt._merged, opt._numbers = before, self, numbers
        except BaseException:
            self._leave(before)
            raise
        return opt.model

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            self._leave(self.before)

    def _leave(self, before: "Before") -> None:
        with interrupts.deferred():
            before.restore()
            self.before = self.opt._merged = self.opt._numbers = None


class Before:
    """A run between two steps: all that a tie and `LiveLink.detach` change, or the user in the block."""

    def __init__(self, opt: Any) -> None:
        live, model = opt.live, opt.live.model
        self.opt, self.live = opt, live
        self.watched: list[tuple[str, Tensor, int]] = []
        self.mode: str | None = None  # of a base with modes, once it has left it
        self.checks = opt._loaded, opt._given_back
        carriers = [layer for layer in live.layers.values() if isinstance(layer, PeftLayer)]
        rows: list[nn.Module] = [*live.rows.values()]
        holders = {id(m): m for layer in live.layers.values() for m in (layer.holder, layer.held[0], *layer.borrowers)}
        holders.update((id(m), m) for layer in live.rows.values() for m in (layer, *layer.borrowers))
        self.peft = bool(carriers)
        handles = [opt._losses.handle, *opt._base_model.handles, *(layer.hook for layer in carriers)]
        self.handles: list[RemovableHandle] = handles
        self.hooks = [(handle.id, hooks, dict(hooks)) for handle in handles for hooks in _dicts(handle)]
        self.saves = [(save.module, vars(save.module).get("save_pretrained")) for save in live.saves]
        self.told = live.note.told
        self.adapted = [(module, type(module), dict(vars(module))) for module in holders.values()]
        self.modules = [(m, m.training, [dict(table) for table in _tables(m)]) for m in model.modules()]
        self.settings = [(vars(module), _settings(module)) for module in model.modules()]
        held = {id(p): p for p in model.parameters()}
        trained = opt._all_in_groups()
        held.update((id(p), p) for p in trained)
        self.parameters = [(p, p.requires_grad, p.grad, p.data if _is_plain(p) else None) for p in held.values()]
        self.starts = dict(live.starts.of), dict(live.starts._untouched)
        self.residuals, self.originals = live.residuals, {path: replace(o) for path, o in live.originals.items()}
        dense = [m for l in live.layers.values() if not l.kind.quantized for m in {l.holder, l.held[0]}]
        changed: list[Tensor] = [p for m in (*dense, *rows) for p in m._parameters.values() if p is not None]
        changed += [*(layer.lora_B for layer in carriers), *trained]
        codes = {id(layer.holder) for layer in live.layers.values() if layer.kind.quantized}
        buffers = [b for m in model.modules() if id(m) not in codes for b in m._buffers.values() if b is not None]
        present = {id(t): t for t in (*held.values(), *changed, *buffers)}.values()
        memories = {_memory(t) for t in (*changed, *buffers) if _is_plain(t)}
        self.moved = [(t, t.data) for t in present if _is_plain(t) and _memory(t) in memories]
        self.trained = [(p, p.data) for p in trained if _is_plain(p)]
        odd = [t for t in (*changed, *buffers) if not (_is_plain(t) or t.is_meta or t.is_inference())]
        self.values = [(tensor, tensor.detach().clone()) for tensor in odd]
        self.coded = [live.layers[path].holder for path in live.originals]
        parts = {path: quantized.parts(live.layers[path].holder) for path in live.originals}
        self.codes = {path: {name: part.clone() for name, part in own.items()} for path, own in parts.items()}

    def set_aside(self) -> None:
        """Take gradients, residuals and hooks away from the block."""
        for parameter, *_ in self.parameters:
            parameter.grad = None
        self.live.residuals = {path: residual.clone() for path, residual in self.residuals.items()}
        # other memory, so that a state dict taken in the block keeps the merged values after it
        for tensor, data in _apart(self.moved):
            tensor.data = data
        for handle in self.handles:
            handle.remove()

    def watch(self) -> None:
        """Note the state of the parameters that are not put back, at the beginning of the block."""
        put_back = {id(t) for t, _ in self.moved} | {id(t) for t, _ in self.values}
        put_back |= {id(holder.weight) for holder in self.coded}
        names = {id(p): name for name, p in self.live.model.named_parameters()}
        for p, *_ in self.parameters:
            if id(p) in names and id(p) not in put_back and not p.is_inference():
                self.watched.append((names[id(p)], p, p._version))

    def _warn_of_changed(self) -> None:
        """Name the parameters that keep what the block wrote into them."""
        changed = [name for name, p, version in self.watched if p._version != version]
        if changed:
            logger.warning(
                "%s: written to inside `with opt.merged()` and not put back, because only what the optimizer trains is "
                "copied. The run goes on with the new values, which the chain does not record: load the former values "
                "again, or evaluate other weights in a copy of the model",
                listed(changed),
            )

    def remind(self) -> None:
        """Let PEFT's ``save_pretrained`` warn in the block too: its layers stay, with nothing in them."""
        if self.peft:
            self.live.note.merged, self.live.note.told = True, False
            self._put_saves_back()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        live = self.live
        self._warn_of_changed()
        for module, kind, attributes in self.adapted:
            module.__class__ = kind
            vars(module).update(attributes)
            rebind(module)
        for own, settings in self.settings:  # PEFT notes in them what it has merged, disabled and activated
            for name, (value, former) in settings.items():
                _refill(value, former)
                own[name] = value
        for module, training, tables in self.modules:
            module.training = training
            for table, entries in zip(_tables(module), tables):
                table.clear()
                table.update(entries)
        if self.mode is not None:
            for tensor, data in self.trained:  # something for the base to move, whatever the block did to it
                tensor.data = data.clone()
            self.opt._mode(self.mode)
        for tensor, data in self.moved:
            tensor.data = data
        for parameter, _, _, data in self.parameters:  # model.half() in the block gives them other memory
            if data is not None and parameter.data_ptr() != data.data_ptr():
                parameter.data = data
        live.starts.of, live.starts._untouched = self.starts
        live.residuals, live.originals = self.residuals, self.originals
        for tensor, value in self.values:
            tensor.copy_(value)
        for path, parts in self.codes.items():
            quantized.renew(live.layers[path].holder)
            quantized.put_parts(live.layers[path].holder, parts)
        for identity, hooks, former in self.hooks:
            kept = {key: hook for key, hook in former.items() if key in hooks or key == identity}
            later = {key: hook for key, hook in hooks.items() if key not in kept}
            hooks.clear()
            hooks.update({**kept, **later})
        self._put_saves_back()
        live.note.merged, live.note.told = False, self.told
        for parameter, requires_grad, grad, _ in self.parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        self.opt._loaded, self.opt._given_back = self.checks

    def _put_saves_back(self) -> None:
        for module, save in self.saves:
            if save is not None:
                vars(module)["save_pretrained"] = save


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _settings(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """PEFT's notes on a module, with copies: all attributes of its own modules, its configuration on the user's."""
    own, kinds = vars(module), (bool, int, float, str, list, dict, set, tuple, type(None))
    names = own.keys() - _MODULE if is_of_peft(module) else own.keys() & {"peft_config"}
    return {name: (own[name], _copied(own[name])) for name in names if isinstance(own[name], kinds)}


_MODULE = vars(nn.Module()).keys()  # hooks and tables


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else value


def _refill(value: Any, former: Any) -> None:
    """Give a list, dictionary or set its former contents."""
    if isinstance(value, list):
        value[:] = former
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(former)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory can be exchanged."""
    fixed = tensor.is_meta or tensor.is_inference()
    return not (fixed or odd_storage(tensor) or hasattr(tensor, "full_tensor"))


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _apart(tensors: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor with a copy of its data; copies share memory as the data do."""
    sharing: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for tensor, data in tensors:
        sharing.setdefault(_memory(data), []).append((tensor, data))
    for group in sharing.values():
        if len(group) == 1:
            ((tensor, data),) = group
            yield tensor, data.clone()
            continue
        memory = group[0][1].untyped_storage().clone()
        for tensor, data in group:
            yield tensor, data.new_empty(0).set_(memory, data.storage_offset(), data.shape, data.stride())


def _dicts(handle: RemovableHandle) -> list[dict[int, Any]]:
    """The dictionaries that hold a hook."""
    found = [ref() for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref)]
    return [hooks for hooks in found if hooks is not None]
