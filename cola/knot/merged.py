"""The merged model in mid-run: the live link is tied for a while, then everything is put back to the bit."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cola.common import interrupts
from cola.common.distributed import is_sharded
from cola.lora import quantized
from cola.lora.coverage import counted
from cola.lora.layer import rebind
from cola.lora.names import odd_storage, unwrap
from cola.lora.peft import PeftLayer


def require_mergeable(opt: Any) -> None:
    """Raise RuntimeError if the live link cannot be tied for a while. Changes nothing."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("merged() under torch.inference_mode(): enter it inside the block instead")
    if any(is_sharded(layer.weight) for layer in opt.live.layers.values()):
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
        self.mode: str | None = None  # of a base with modes, once it has left it
        self.checks = opt._loaded, opt._given_back
        carriers = [layer for layer in live.layers.values() if isinstance(layer, PeftLayer)]
        holders = {id(layer.holder): layer.holder for layer in live.layers.values()}
        self.peft = bool(carriers)
        handles = [opt._losses.handle, *opt._base_model.handles, *(layer.hook for layer in carriers)]
        self.handles: list[RemovableHandle] = handles
        self.hooks = [(handle.id, hooks, dict(hooks)) for handle in handles for hooks in _dicts(handle)]
        self.saves = [(save.module, vars(save.module).get("save_pretrained")) for save in live.saves]
        self.told = live.note.told
        self.adapted = [(module, type(module), dict(vars(module))) for module in holders.values()]
        self.modules = [(m, m.training, [dict(table) for table in _tables(m)]) for m in model.modules()]
        held = {id(p): p for p in model.parameters()}
        held.update((id(p), p) for group in opt.param_groups for p in group["params"])
        self.parameters = [(p, p.requires_grad, p.grad, None if odd_storage(p) else p.data) for p in held.values()]
        self.starts = dict(live.starts.of), dict(live.starts._untouched)
        self.residuals, self.originals = live.residuals, {path: replace(o) for path, o in live.originals.items()}
        dense = [layer.holder for layer in live.layers.values() if not layer.kind.quantized]
        changed: list[Tensor] = [p for module in dense for p in module._parameters.values() if p is not None]
        changed += [layer.lora_B for layer in carriers]
        codes = {id(layer.holder) for layer in live.layers.values() if layer.kind.quantized}
        changed += [b for m in model.modules() if id(m) not in codes for b in m._buffers.values() if b is not None]
        if callable(getattr(opt.base, "eval", None)):  # moves what it trains
            changed += [p for group in opt.param_groups for p in group["params"]]
        self.values = [(tensor, tensor.detach().clone()) for tensor in changed if not tensor.is_meta]
        parts = {path: quantized.parts(live.layers[path].holder) for path in live.originals}
        self.codes = {path: {name: part.clone() for name, part in own.items()} for path, own in parts.items()}

    def set_aside(self) -> None:
        """Take gradients, residuals and hooks away from the block."""
        for parameter, *_ in self.parameters:
            parameter.grad = None
        self.live.residuals = {path: residual.clone() for path, residual in self.residuals.items()}
        for handle in self.handles:
            handle.remove()

    def remind(self) -> None:
        """Let PEFT's ``save_pretrained`` warn in the block too: its layers stay, with nothing in them."""
        if self.peft:
            self.live.note.merged, self.live.note.told = True, False
            self._put_saves_back()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        live = self.live
        for module, kind, attributes in self.adapted:
            module.__class__ = kind
            vars(module).update(attributes)
            rebind(module)
        for module, training, tables in self.modules:
            module.training = training
            for table, entries in zip(_tables(module), tables):
                table.clear()
                table.update(entries)
        for parameter, _, _, data in self.parameters:  # model.half() in the block gives them other memory
            if data is not None and parameter.data_ptr() != data.data_ptr():
                parameter.data = data
        live.starts.of, live.starts._untouched = self.starts
        live.residuals, live.originals = self.residuals, self.originals
        if self.mode is not None:
            self.opt._mode(self.mode)
        for tensor, value in self.values:
            tensor.copy_(value)
        for path, parts in self.codes.items():
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


def _dicts(handle: RemovableHandle) -> list[dict[int, Any]]:
    """The dictionaries that hold a hook."""
    found = [ref() for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref)]
    return [hooks for hooks in found if hooks is not None]
