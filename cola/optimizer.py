"""ChainOptimizer, Algorithm 1: train; at a knot tie the link, record it, extend the chain, reset the state."""

import html
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cola.chain.chain import Chain
from cola.checkpoint.base_model import BaseModel
from cola.checkpoint.resumable import Resumable
from cola.checkpoint.state import arguments_of
from cola.common import interrupts
from cola.common.contexts import unaffected
from cola.common.distributed import agreed_mean
from cola.knot import merged
from cola.knot.log import show
from cola.knot.reset import GroupWatch, Reset, require_keepable, require_reset, reset_name
from cola.knot.transaction import Knot
from cola.lora.config import LinkConfig, link_config_of
from cola.lora.coverage import Coverage, announced, counted, covered
from cola.lora.integrity import require_removable, warn_of_loaded_link, weights_of
from cola.lora.link import KnotReport
from cola.lora.live import LiveLink
from cola.lora.names import called
from cola.lora.trainable import warn_of_half
from cola.lora.untrained import Untrained
from cola.policies import KnotPolicy, Signal
from cola.wrapper.frameworks import warn_of_bare_framework
from cola.wrapper.link_groups import warn_of_relative_steps
from cola.wrapper.loss_meter import LossMeter
from cola.wrapper.real_steps import moves, rates_are_zero, stateless
from cola.wrapper.wrapper import require_base

logger = logging.getLogger("cola")

#: ‖ΔW‖/‖W‖ of a layer above which a knot warns, once; small models stand more (experiments/RESULTS.md, "Rates")
LARGE_LINK = 0.05


class ChainOptimizer(Resumable):
    """Train a chain of LoRAs with any base optimizer (Chain of LoRA, Algorithm 1).

    Puts a low-rank link ``W x + s·B A x`` on the target layers and gives the factors to the base optimizer. After each
    real `step` the policy decides whether to tie a knot: ``W ← W + s·B A``, a new draw of A, zero for B, and fresh
    state of the base optimizer for the factors. Other trained parameters (biases, ``modules_to_save``) keep their
    state. ``with ChainOptimizer(...) as opt:`` calls `finish` at the end of the block, unless the block raises.

    Args:
        base: an optimizer class, or any callable ``params -> Optimizer``.
        model: any module; adapted in place, and its other parameters are frozen until `finish`.
        policy: when to tie.
        link: settings of the links; PEFT's LoraConfig is understood, and refused where it says more.
        rounding: how a tie rounds: ``"nearest"``, ``"stochastic"``, ``"compensated"``, or ``"auto"``, which is nearest
            for fp32 and fp64 weights and the measured best for half precision.
        quantized: how links are tied to quantised layers (bitsandbytes): ``"stack"`` keeps them next to the weight and
            loses nothing; ``"requantize"`` quantises ``W₀ + ΣsBA`` anew at each knot, and reports the error.
        seed: seed of all draws. No global random state is read or changed.
        reset: what a knot does to the base's state for the factors: ``"state"`` makes it fresh, as in the paper;
            ``"keep"`` keeps it; ``"transport"`` rotates the moments of Adam-like bases, Muon and SGD into the new
            link's directions. Or a function of (base, old, new) that changes it and nothing else, called with the new
            link in place and the old state. ``old`` and ``new`` map layers' paths to (A, B); the new ones are the
            base's Parameters.
        keep_links: keep the tied links in `chain` (on the CPU, adapter-sized each).
        verbose: print a line per knot, in a distributed run on process 0 alone.
        **base_kwargs: for ``base``.

    Attributes:
        base: the wrapped optimizer, which owns ``param_groups``, ``state`` and ``defaults``.
        chain: the tied links.
        policy: the argument.
        steps: real optimizer steps so far.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an impossible target, rank or option; the model is untouched then.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> from cola import StepKnots
    >>> opt = ChainOptimizer(
    ...     torch.optim.AdamW, model, policy=StepKnots(every=2), link=LinkConfig(r=1, target_modules="all-linear")
    ... )
    >>> for _ in range(5):
    ...     model(torch.ones(3, 4)).square().mean().backward()
    ...     opt.step()
    ...     opt.zero_grad()
    >>> report = opt.finish()
    >>> len(opt.chain), type(model[0]).__name__
    (3, 'Linear')
    """

    @unaffected()
    def __init__(
        self,
        base: Callable[..., Optimizer],
        model: nn.Module,
        policy: KnotPolicy,
        *,
        link: LinkConfig = LinkConfig(),  # noqa: B008 (frozen)
        rounding: str = "auto",
        quantized: str = "stack",
        seed: int = 0,
        keep_links: bool = True,
        reset: Reset = "state",
        verbose: bool = False,
        **base_kwargs: Any,
    ) -> None:
        require_base(base, base_kwargs, inspect.signature(ChainOptimizer).parameters)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} must be an nn.Module (not its parameters)")
        if not isinstance(policy, KnotPolicy):
            raise TypeError(
                f"policy={policy!r} must be a KnotPolicy object, e.g. PlateauKnots() or "
                "EvenKnots(length=3, total_steps=n); for a single link use NeverKnots()"
            )
        link = link_config_of(link)
        if not isinstance(verbose, bool):
            raise TypeError(f"verbose={verbose!r:.80} must be True or False")
        require_reset(reset, link.known_ranks())
        self._factory, self._base_kwargs = base, base_kwargs
        self.policy, self.reset = policy, reset
        self.live = LiveLink(model, link, rounding, seed, quantized)
        try:
            self.base = self._make_base()
            require_keepable(self.base, reset, self._new_base)
            self.chain = Chain(keep=keep_links)
            self._base_model = BaseModel(self.live, self.chain)
            self._begin_first_link()
        except BaseException:
            self.live.detach()
            raise
        self._extras = {}
        self._made_with = arguments_of(self.live, reset_name(reset))
        self._bound: list[nn.Parameter] | None = self._all_trained()
        self.steps = 0
        self.finished = False
        self._knotting = self._tying = False
        self._merged: merged.Block | None = None  # the open one
        self._integrated = False  # whether an integration finishes the chain, or the user was told that none does
        self._held = {}
        self._untrained = Untrained()
        self._numbers: tuple[int, int] | None = None  # of parameters, while no link is live
        self._probed: list[int] = []  # groups whose state comes from a probe step
        self._groups = GroupWatch()
        self._losses = LossMeter(called(model))
        self._verbose = verbose
        self._listeners: list[Callable[[KnotReport], None]] = []
        self._loss: Tensor | None = None
        self._epoch: float | None = None
        warn_of_half({**self.live.factors_by_name(), **self.live.trained()})
        if not link._draws_pairs:
            warn_of_relative_steps(self.base)
        self._coverage = announced(self.live)
        super().__setstate__({})  # makes the hook tables of torch.optim.Optimizer

    # training

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the base, then tie a knot if the policy asks for one.

        Steps without any gradient, and probe steps (all learning rates and all gradients zero, as distributed
        checkpointing takes to create state), reach the base and do not count.

        Args:
            closure: as for the base.

        Returns:
            The base's result.

        Raises:
            KnotError: the link is not finite; the knot has changed nothing, and the step stands.
            RuntimeError: after `finish`, or a loaded state does not belong to the model's weights.
        """
        if self.finished or self._merged:
            if self.finished and closure is None and rates_are_zero(self.base.param_groups):
                return None  # distributed checkpointing wants state to be created, and there is nothing left to train
            self._require_running("step()")
        args, kwargs = self._before_step(closure) if self._optimizer_step_pre_hooks else ((closure,), {})
        closure = args[0] if args else kwargs.get("closure")
        groups = self.base.param_groups if self._ready else self.param_groups
        if closure is None and not moves(groups):
            result = self._probe(groups)
        else:
            if not self._ready:
                self._get_ready()
            result = self._step_base(closure, groups)
            self._counted(groups)
            if self.policy.update(Signal(self.steps, self._epoch, self._loss, agreed_mean, self)):
                self._knot(extend=True)
        if self._optimizer_step_post_hooks:
            self._after_step(args, kwargs)
        return result

    step.hooked = True  # type: ignore[attr-defined]  # keeps torch from wrapping it: it runs its hooks itself

    def _knot(self, *, extend: bool) -> KnotReport:
        """Tie one knot of Algorithm 1. Whatever can fail does so before the first of the four steps."""
        with self._transaction(extend) as knot:
            knot.tie()
            report = knot.record()
            if extend:
                knot.extend()
                knot.reset()
            else:
                self._leave()
        self._announce(report)
        return report

    def observe(self, loss: Tensor | float | None = None, *, epoch: float | None = None) -> None:
        """Tell the policy the next step's loss (several calls are averaged) or the number of epochs completed.

        The loss is found without this if the loop backpropagates the ``.loss`` of the model's output, if the step gets
        a closure, or if an integration gives the loss. A loss passed here replaces those.
        """
        self._require_running("observe()")
        if epoch is not None:
            self._epoch = float(epoch)
        if loss is not None:
            self._losses.tell(loss)

    def _optimised(self, loss: Tensor) -> None:
        """Set the next step's mean loss, as a training framework computed it; `observe` takes precedence."""
        self._losses.give(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base's; also forgets the losses of the gradients."""
        self._require_unmerged("zero_grad()")
        self._losses.drop(self.base.param_groups)
        self.base.zero_grad(set_to_none=set_to_none)

    def on_knot(self, fn: Callable[[KnotReport], None]) -> Callable[[KnotReport], None]:
        """Call ``fn(report)`` after every knot; usable as a decorator."""
        self._require_running("on_knot()")
        if not callable(fn):
            raise TypeError(f"on_knot(fn={fn!r}) needs a callable that takes a KnotReport")
        self._listeners.append(fn)
        return fn

    def tie(self) -> KnotReport:
        """Tie a knot now and extend the chain, whatever the policy says.

        Raises:
            KnotError: the link is not finite, or an invariant of the knot does not hold.
            RuntimeError: after `finish`.
        """
        self._require_running("tie()")
        return self._knot(extend=True)

    def finish(self, merge: bool = True) -> KnotReport | None:
        """Tie the last link and restore the model's classes, state-dict keys and ``requires_grad``.

        Quantised layers with stacked links keep them, frozen: their class stays a subclass of the original, with
        ``chain_A`` and ``chain_B`` in the state dict. Store such a model by `Chain.to_peft`.

        Args:
            merge: False drops the live link instead of tying it. If it started at a product, the weights take that
                back, rounded once more, so they equal the chain's within that rounding.

        A warning says so if no knot was tied in the run, though the policy could tie some, or if it had planned more.

        Returns:
            The last knot's report; None if the link was dropped, or untrained with nothing else to record.

        Raises:
            KnotError: the link is not finite; the model is untouched and still chained.
            RuntimeError: called twice.
        """
        self._require_running("finish()")
        self._require_outside_a_knot("finish()")
        if merge:
            self._require_trainable()
        else:
            require_removable(self.live)
        self._untrained.end(self.live, self.steps, self._tied_at())
        if merge and self._has_something_to_tie():
            report = self._knot(extend=False)
        else:
            report = None
            self.live.starts.drop()
            if merge:
                self._untrained.look(self.live, self.base, self.steps - self._tied_at())
            self._leave()
        shortfall = self.policy._shortfall(self.steps, one_link=report is not None and not report.index)
        if shortfall:
            logger.warning("%s", shortfall)
        return report

    def __enter__(self) -> Self:
        self._require_running("with")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """`finish`, unless the block raised: then nothing is tied, and the model stays chained."""
        if kind is None and not self.finished:
            self.finish()

    def merged(self) -> AbstractContextManager[nn.Module]:
        """The merged model in mid-run, to evaluate or save: ``with opt.merged() as model:``.

        Inside the block the model is as `finish` would leave it: plain classes, the original state-dict keys and
        ``requires_grad``, and the live link in the weights. A state dict taken inside keeps these values after it; the
        model itself, and the one that PEFT's ``unload()`` returns, become the run's again.

        After the block training goes on bit for bit, also if the block raises. The adapted layers, the parameters
        trained alongside, buffers, gradients, modes (``model.eval()``), PEFT's settings and the base's state are as
        before, whatever the block wrote to them. Frozen parameters are not copied: a warning names those that the
        block wrote to (not through ``.data``, which leaves no trace). Torch's global random states are left to the
        block. Do not change the model's structure in the block. After `finish` the block just gets the model.

        It takes the memory of a copy of the adapted weights, of the parameters trained alongside, of the model's
        buffers, and of the residuals of compensated rounding. Call it between steps: a loss that waits for its
        backward does not survive it.

        Yields:
            The model that was passed in.

        Raises:
            KnotError: the link is not finite, or others have replaced a layer or its weight; nothing has changed.
            RuntimeError: the model is sharded (FSDP2), or during a knot (in ``reset`` or ``init``), or inside another
                such block. In the block, of whatever trains, ties, saves, loads, copies or pickles the optimizer.

        >>> from cola import NeverKnots
        >>> model, link = nn.Sequential(nn.Linear(2, 2)), LinkConfig(r=1, target_modules="all-linear")
        >>> opt = ChainOptimizer(torch.optim.SGD, model, policy=NeverKnots(), link=link)
        >>> with opt.merged() as model:
        ...     sorted(model.state_dict())
        ['0.bias', '0.weight']
        """
        return merged.Block(self)

    def __getstate__(self) -> dict[str, Any]:
        self._require_unmerged("copying or pickling the optimizer")
        return super().__getstate__()

    # everything else that a user calls; saving and loading are in Resumable

    @property
    def model(self) -> nn.Module:
        """The model that was passed in."""
        return self.live.model

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base: frozen ones of the model, or any others. Knots leave them alone.

        Raises:
            ValueError: one is the weight of an adapted layer.
        """
        self._require_running("add_param_group()")
        self._add_group(param_group)
        self._base_model.settled = self._ready = False
        self._coverage = covered(self.live)

    def coverage(self) -> Coverage:
        """The share of the model that the links reach, and what is left out and why; `print` shows a table.

        Available at any time, even after `finish`.
        """
        return self._coverage

    @property
    def reports(self) -> tuple[KnotReport, ...]:
        """The reports of the knots so far, in order, but for links that the chain lacks (`Chain.missing`)."""
        return tuple(link.report for link in self.chain)

    def print_trainable_parameters(self) -> None:
        """Print the number of trained parameters and their share, as PEFT's method of this name does.

        The factors of the live link are among both numbers. After `finish` the last link's numbers are printed.
        """
        trained, total = self._numbers or counted(self.live.model, self._all_in_groups())
        share = 100 * trained / max(total, 1)
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def __repr__(self) -> str:
        if "finished" not in vars(self):  # a debugger shows it while the constructor fails
            return "ChainOptimizer(being made)"
        links = self.chain.missing + len(self.chain)
        live = f"link {self.live.index}, r={self.live.rank_of(self.live.index)}"
        where = f"finished with {links} link{'' if links == 1 else 's'}" if self.finished else live
        return f"ChainOptimizer({where}, {self.policy!r}, {type(self.base).__name__}, {self.steps} steps)"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code><br>{self.chain._repr_html_()}"

    # parts of a step

    def _step_base(self, closure: Callable[[], Any] | None, groups: list[dict[str, Any]]) -> Any:
        """Take a step of the base, noting which group entries it changes."""
        before = self._groups.before(groups)
        result = self.base.step() if closure is None else self.base.step(self._losses.first_of(closure))
        self._groups.after(before, self.base.param_groups)
        return result

    def _probe(self, groups: list[dict[str, Any]]) -> Any:
        """Pass a step that moves nothing to the base, and note the groups whose state it creates."""
        self._require_trainable()
        self._untrained.count(groups, self.steps)
        self._probed, self._ready = sorted({*self._probed, *stateless(self.base)}), False
        return self._step_base(None, groups)

    def _counted(self, groups: list[dict[str, Any]]) -> None:
        """Count a real step."""
        if not self._ready:
            self._bound, self._probed = None, []
            # a closure, or a hook of the base, may have added groups or loaded a state
            self._ready = self._loaded is None and (self._base_model.settled or not self.chain.keep)
        self.steps += 1
        self.chain.live = True
        self._loss = self._losses.take(groups)

    def _get_ready(self) -> None:
        """Prepare the first real step, or the first after groups were added, a state loaded or a probe step taken."""
        self._require_weights()
        if self._bound is not None:
            self._require_trainable()
        if not self._integrated:
            self._integrated = True  # once is enough
            warn_of_bare_framework()
        if not self.steps:
            self._require_given_back()
            warn_of_loaded_link(self.live)
        self._base_model.settle()
        self._held = weights_of(self.live)
        self.live.starts.forget_untouched()
        if self._probed:
            self._reset([p for i in self._probed for p in self.param_groups[i]["params"]])

    def _require_given_back(self) -> None:
        """Check that the weights still lack the product that was subtracted when the first link began."""
        if self.live.starts and self._given_back not in (None, self._base_model.weights().digest):
            raise RuntimeError(
                "the model's weights were loaded after the first link began, so its s·BA counts twice: "
                "load the weights before the ChainOptimizer is made"
            )
        self._given_back = None

    def _begin_first_link(self) -> None:
        """If the first link does not start at zero, record the base model and subtract the product from its weights."""
        if self.live.starts.are_drawn():
            if self.chain.keep:
                self.chain.base = self._base_model.fingerprint()
            self.live.starts.give_back_first()
            self._given_back = self._base_model.weights().digest

    @contextmanager
    def _transaction(self, extend: bool) -> Iterator[Knot]:
        """Prepare a knot, then shield its steps from interruption."""
        self._require_outside_a_knot("tie()")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a knot cannot be tied under torch.inference_mode(): leave it first (no_grad is fine)")
        self._knotting = self._tying = True
        try:
            self._require_trainable()
            self._require_weights()
            self._require_given_back()
            self._base_model.settle()
            mode = self._leave_training_mode()
            try:
                knot = Knot(self, extend=extend)
            except BaseException:
                self._mode(mode)
                raise
            with interrupts.deferred():
                yield knot
                if extend:
                    self._mode(mode)
                    self._held = weights_of(self.live)
        finally:
            self._knotting = self._tying = False

    def _announce(self, report: KnotReport) -> None:
        logger.info("%s", report)
        if self._verbose:
            show(report)
        single = self.finished and report.index == 0  # more and shorter links are no advice then
        if report.share > LARGE_LINK and not single and not any(r.share > LARGE_LINK for r in self.reports[:-1]):
            path = max(report.layers, key=lambda path: report.layers[path].share)
            logger.warning(
                "link %d changed layer %r by %.1f %% of ‖W‖. On a large model more than %.0f %% is much: if the "
                "held-out loss suffers, use a smaller learning rate or lora_alpha, or more and shorter links",
                report.index,
                path,
                100 * report.share,
                100 * LARGE_LINK,
            )
        self._knotting = True  # a listener cannot tie a knot
        try:
            self.policy.knotted(self.steps)
            for listener in self._listeners:
                listener(report)
        finally:
            self._knotting = False

    def _leave(self) -> None:
        """Release the model, after the live link has been tied or dropped."""
        self._numbers = counted(self.live.model, self._all_in_groups())
        rows = (layer.trained_rows for layer in self.live.rows.values())
        spent = {id(p) for p in (*self.live.factors_by_name().values(), *rows)}
        self._losses.remove()
        self._base_model.close()
        self.live.detach(spent=True)
        self.live.warn_of_empty_layers()
        for group in self.base.param_groups:  # schedulers need the groups, but not the factors in them
            for p in group["params"]:
                if id(p) in spent:
                    self.base.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) not in spent]
        self._bound, self._held, self.finished = None, {}, True
        self.chain.live = False

    def _has_something_to_tie(self) -> bool:
        """Whether the live link changes the model, or something else has changed that its knot would record."""
        trained = bool(self.live.trained()) and self.steps > self._tied_at()
        given_back = bool(self.live.starts) and self.steps > 0  # only a tie restores the start to the bit
        return not self.live.is_zero() or trained or given_back or self._base_model.has_unrecorded()

    def _all_in_groups(self) -> list[nn.Parameter]:
        # Accelerate puts placeholders there that are not Parameters
        return [p for group in self.param_groups for p in group["params"] if isinstance(p, nn.Parameter)]

    def _tied_at(self) -> int:
        return self.chain[-1].step if len(self.chain) else 0

    def _require_running(self, call: str) -> None:
        if self.finished:
            raise RuntimeError(f"{call} after finish(): this chain is complete; make a new ChainOptimizer to go on")
        self._require_unmerged(call)

    def _require_unmerged(self, call: str) -> None:
        if self._merged:
            raise RuntimeError(
                f"{call} inside `with opt.merged()`: the live link is tied for the block only; leave the block first"
            )

    def _require_outside_a_knot(self, call: str) -> None:
        if self._knotting:
            raise RuntimeError(
                f"{call} is called in a listener of on_knot, and would tie a knot inside a knot: call it after step()"
            )
