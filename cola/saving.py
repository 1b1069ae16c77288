"""How a running chain is saved and goes on: the part of `ChainOptimizer` that is not training."""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from cola import carry, checkpoint, counters, interrupts, origin, replay
from cola.chain import Chain
from cola.contexts import unaffected
from cola.distributed import is_sharded
from cola.integrity import require_intact, require_same_weights
from cola.knots import KnotPolicy
from cola.link import Link
from cola.reset import Reset, reset_name
from cola.store import Ledger
from cola.untouched import KnowsBase


class Saves(KnowsBase):
    """Saving and loading, for `ChainOptimizer` to inherit."""

    policy: KnotPolicy
    steps: int
    _epoch: float | None
    _loss: torch.Tensor | None
    _probed: list[int]
    _held: dict[str, nn.Parameter]  # the weights when training began, for `require_same_weights`
    _ready: bool = False  # whether what must be looked at before a step has been
    _expected: str | None = None  # digest of the weights that a loaded state belongs to, until a step has compared it
    _knots: list[Any] | None = None  # of the links that a loaded state tells of, until a step has compared them
    reset: Reset
    _ended: dict[str, Any] | None = None  # the live link as `counters.describe` said of it when the chain was finished

    # in a directory of our own

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a checkpoint: chain, live link, base optimizer, policy, counters and torch's random states.

        It is adapter-sized: the weights are not in it, `load` rebuilds them from the untouched base. Call it between
        steps; gradients that are being accumulated are not saved. The former checkpoint in ``directory`` is replaced as
        a whole or, if anything fails, left as it was, and the run can go on either way. In a distributed run process 0
        writes, with its own random states. Persistent buffers that training has moved (running statistics) are saved;
        other ones are not. The first save reads the whole model once, for its fingerprint. The format is described in
        FORMAT.md.

        Args:
            directory: made if need be; `Chain.load` reads the chain from it as well.

        Raises:
            RuntimeError: after `finish`; the links are not there (``keep_links=False``) to rebuild the weights from; or
                the model is sharded.
            TypeError: the base optimizer's state holds something that only pickling could keep.
            ValueError: the directory holds another program's files under our names.
            OSError: the disk is full, the directory read-only, another process is saving there, …

        >>> import tempfile
        >>> from cola import ChainOptimizer, LinkConfig, StepKnots
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 1))
        >>> def wrap(model):
        ...     link = LinkConfig(r=1, target_modules="all-linear")
        ...     return ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link)
        >>> model = copy.deepcopy(base)
        >>> opt = wrap(model)
        >>> for _ in range(3):
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     opt.step()
        ...     opt.zero_grad()
        >>> resumed = copy.deepcopy(base)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     opt.save(directory)
        ...     wrap(resumed).load(directory)
        >>> bool(torch.equal(model(torch.ones(2, 4)), resumed(torch.ones(2, 4))))
        True
        """
        self._require_running("save()")
        self._require_in_one_piece("save()")
        self._require_weights()
        loss = None if self._loss is None else float(self._loss)
        ledger = self.chain.ledger()
        checkpoint.require_links(ledger)
        if ledger.base is None:
            ledger = replace(ledger, base=self._untouched())
        state, weights, buffers = self._base_state(), self._weights(), self._moved()
        checkpoint.save(Path(directory), ledger, self.live, self.base, state, loss, weights, buffers)

    @unaffected()
    def load(self, directory: str | os.PathLike[str], *, rng: bool = True) -> None:
        """Continue where `save` was called, bit for bit on the same device, library versions, kernels and threads.

        Call it on a ChainOptimizer made with the saved run's arguments over the UNTOUCHED base: the links are tied into
        its weights again. All its parameters and persistent buffers are compared with the saved run's base; only those
        that the checkpoint brings (a head that is trained whole) may differ, with a warning. Everything is read and
        checked before anything is changed. Hyperparameters in the param groups become the saved ones, as with any
        ``load_state_dict``.

        Args:
            directory: that `save` wrote.
            rng: set torch's global random states (CPU and CUDA) as they were, so that dropout goes on bit for bit.

        Raises:
            ValueError: a file is missing, truncated or edited; the base is another one; rank, layers, seed, rounding,
                policy or base optimizer differ. Nothing is changed then.
            RuntimeError: this optimizer has tied a knot already, or is finished.
        """
        self._require_running("load()")
        self._require_outside_a_knot("load()")
        self._require_in_one_piece("load()")
        self._require_untouched("load()")
        saved = checkpoint.read(Path(directory))
        counted = counters.read(saved.state, self._described(), self.live, finished=False)
        index = counted["live"]["index"]
        checkpoint.check(saved, index, self.live, self.base)
        checkpoint.rehearse(saved, self._new_base([dict(group) for group in self.param_groups]))
        copy.deepcopy(self.policy).load_state_dict(counted["policy"])
        self._resume_origin(self._moving(), saved.ledger.base, origin.take(self._moving()))
        with interrupts.deferred():
            checkpoint.rebuild(saved, index, self.live, self.base)
            checkpoint.load_exactly(self.base, saved.state)
            self._continue(counted)
            self._expected = None  # `rebuild` has compared
            self.chain.restore(saved.ledger)
            self._loss = None if saved.loss is None else torch.tensor(saved.loss, dtype=torch.float32, device="cpu")
        if rng:
            checkpoint.restore_rng(saved.rng)

    # the frameworks' way

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the chain in it.

        The counters and the policy ride in ``param_groups[0]["cola"]`` as JSON; the tied links, and the residuals of
        compensated rounding, under the top-level key ``"cola"``: tensors and JSON, which
        ``torch.load(weights_only=True)`` reads. Save it together with the model's own state dict.

        After `finish` it holds the complete chain, and only a ChainOptimizer that is finished takes it.

        Raises:
            KnotError: a layer with a link was changed under the chain (merged by PEFT, replaced, …); names it.
        """
        for before in list(self._optimizer_state_dict_pre_hooks.values()):
            before(self)
        state = self._base_state()
        state[carry.KEY] = carry.pack(self.chain.ledger(), {} if self.finished else self.live.residuals)
        for after in list(self._optimizer_state_dict_post_hooks.values()):
            replaced = after(self, state)
            state = state if replaced is None else replaced
        return state

    @unaffected()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. The model's own state dict brings the weights and the live link.

        A framework may have dropped the top-level key ``"cola"`` (distributed checkpointing does). Training then goes
        on exactly, and the chain knows that its first links are missing. Only compensated rounding cannot go on.

        The first step compares the model's weights with those that the state was saved with, and raises where the
        model's own state dict was not loaded: the state alone would go on from a wrong model in silence. A finished
        chain takes no step, so it compares them at once.

        Raises:
            ValueError: the state is not a chain's, or of another chain (seed, ranks, layers), a link is missing,
                residuals are needed and were dropped, or it is of a finished chain and this one is running, or the
                other way round; nothing is changed then.
            RuntimeError: in a listener of `on_knot`.
        """
        self._require_outside_a_knot("load_state_dict()")
        state_dict = dict(state_dict) if isinstance(state_dict, dict) else state_dict
        for before in list(self._optimizer_load_state_dict_pre_hooks.values()):
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        counted = counters.read(state_dict, self._described(), self.live, finished=self.finished)
        index = counted["live"]["index"] if self._ended is None else counted["finished"]
        carried = carry.read(state_dict.get(carry.KEY), index, self.live, finished=self.finished)
        if self.finished and counted["weights"] != self._final_digest():
            raise ValueError(
                "the model's weights are not those that the finished chain's state was saved with: load the model's "
                "own state dict first"
            )
        counters.require_same_groups(state_dict, counted, self.base)
        known = counters.origin_of(counted)
        copy.deepcopy(self.policy).load_state_dict(counted["policy"])
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != carry.KEY})
        if not self.finished:
            self.live.resume(index)
            self.live.take_residuals(carried.residuals)
            self.live.take_links(() if carried.ledger is None else carried.ledger.links)
        self._continue(counted)
        if not self.finished and (self.steps or index):
            self._resume_origin(self._moving(), carried.ledger.base if carried.ledger is not None else None, known)
        if carried.ledger is None:
            self.chain.resume(index)
        else:
            self.chain.restore(carried.ledger)
        for after in list(self._optimizer_load_state_dict_post_hooks.values()):
            after(self)

    # along the chain

    @unaffected()
    def follow(self, chain: Chain) -> None:
        """Tie an earlier chain's links into the untouched base, and go on as the link after them.

        Args:
            chain: e.g. of `Chain.from_peft` or `Chain.load`; complete.

        Raises:
            ValueError: it does not fit the model, or the model is not its base. Nothing is changed then.
            RuntimeError: this optimizer has taken a step already; or the chain lacks links.

        >>> from cola import ChainOptimizer, LinkConfig, NeverKnots
        >>> link = LinkConfig(r=1, target_modules="all-linear")
        >>> opt = ChainOptimizer(torch.optim.SGD, torch.nn.Sequential(torch.nn.Linear(2, 2)), NeverKnots(), link=link)
        >>> opt.follow(Chain())
        """
        self._require_running("follow()")
        self._require_outside_a_knot("follow()")
        self._require_untouched("follow()")
        if self.steps:
            raise RuntimeError(f"follow() after {self.steps} steps: call it before the first one")
        if not isinstance(chain, Chain):
            raise TypeError(f"follow(chain={chain!r:.80}) needs a Chain, e.g. Chain.load(directory)")
        links = chain.complete("follow()")
        replay.check(self.live.model, links, chain.base, live=True)
        base = self._untouched(chain.layers())
        self._settle_origin()
        with self._restarted(len(links)):
            self.live.replay(links)
        self.chain.restore(Ledger(links, base=base))

    @unaffected()
    def undo(self, base: replay.Base) -> Link:
        """Untie the last knot: the weights are rebuilt without its link, and that link begins again.

        The live link is dropped. The one before it starts from its own draw with fresh optimizer state. Values trained
        beside the links, and buffers that training moved, go back to what they were at the knot before. Counters and
        policy are not turned back.

        Args:
            base: the untouched model, or its state dict.

        Returns:
            The link that was taken off.

        Raises:
            ValueError: no knot has been tied, or ``base`` is not the chain's. Nothing is changed then.
            RuntimeError: links were not kept, or were lost.
        """
        self._require_running("undo()")
        self._require_outside_a_knot("undo()")
        links = self.chain.complete("undo()")
        if not links:
            raise ValueError("undo(): no knot has been tied yet")
        if not isinstance(base, (nn.Module, Mapping)):
            raise TypeError(f"undo(base={base!r:.80}) needs the untouched model, or its state dict")
        if base is self.live.model:
            raise ValueError("undo(base): base is the model itself; it must be the untouched one, or its state dict")
        self._require_weights()
        replaced = [name for link in links[:-1] for name in link.trained]
        replay.check(self.live.model, links, self.chain.base, base=base, live=True, replaced=replaced)
        with self._restarted(len(links) - 1):
            self.live.residuals.clear()
            replay.untie(self.live.model, links, base, also=self._moved())
            self.live.replay(links[:-1])
        self.chain.live = False
        return self.chain.undo()

    # inside

    @contextlib.contextmanager
    def _restarted(self, index: int) -> Iterator[None]:
        """Around a change of the weights: link ``index`` begins before it, with fresh base state after it."""
        modes = self._leave_training_mode()
        try:
            with interrupts.deferred():
                fresh = self._extend(index, self.live.snapshot())
                yield
                if fresh is not None:
                    self._adopt(fresh, self.live.adapters())
        finally:
            self._mode(modes)
        self._loss, self._held = None, {}

    def _described(self) -> dict[str, Any]:
        """The live link, as it is or as it was before `finish`."""
        return self._ended or counters.describe(self.live, reset_name(self.reset))

    def _base_state(self) -> dict[str, Any]:
        if self._ended is not None:
            weights, moving = self._final_digest(), None
        else:
            require_intact(self.live)
            require_same_weights(self.live, self._held)
            moving = None if self.live.index else self._origin.to_json()
            weights = self._weights().digest if self.live.index else None
            if self._expected is not None:
                weights = self._expected  # the model's own state dict may not have been loaded yet
        self.base.param_groups[0][counters.GROUP_KEY] = counters.write(
            self.steps,
            self._epoch,
            self._probed,
            self._groups.changed,
            self.policy,
            self._described(),
            weights,
            counters.knots_of(self.chain),
            moving,
            counters.class_name(self.base),
            None if self._ended is None else self.chain.missing + len(self.chain),
        )
        return self.base.state_dict()

    def _require_weights(self) -> None:
        """At the first step after `load_state_dict`: the model must have been given its own state dict as well."""
        if self._expected is None:
            return
        if self._weights().digest != self._expected:
            raise RuntimeError(
                f"the model's weights are not those that the optimizer's state was saved with, after {self.live.index} "
                "knots: load the model's own state dict too (the links are tied into it), or use opt.save and opt.load"
            )
        told, held = self._knots, counters.knots_of(self.chain)
        # links that one of them lacks were lost on one way, and are there again by another
        if told is not None and (self.chain.missing + len(self.chain) != self.live.index or not _agree(told, held)):
            raise RuntimeError(
                f"the chain's links are not those of the optimizer's state (index, step, rank, ‖ΔW‖: the chain has "
                f"{held}, the state tells of {told}): load the chain that was saved with it"
            )
        self._expected = self._knots = None

    def _continue(self, counted: dict[str, Any]) -> None:
        self.policy.load_state_dict(counted["policy"])
        self.steps, self._epoch = counted["steps"], counted["epoch"]
        self._probed, self._groups.changed = counted["probed"], set(counted["stepped"])
        self._expected = counted.get("weights")
        self._knots = counted.get("knots")
        self.chain.live = self.steps > max((step for _, step, *_ in self._knots or ()), default=0)
        self._ready, self._held = False, {}
        if self.finished:
            self._expected = self._knots = None
            self.chain.live = False

    def _require_in_one_piece(self, call: str) -> None:
        if any(is_sharded(layer.weight) for layer in self.live.layers.values()):
            raise RuntimeError(
                f"{call} is for models in one piece, and this one is sharded: save the model's and the optimizer's "
                "state dicts by torch.distributed.checkpoint"
            )

    def _require_untouched(self, call: str) -> None:
        if self.live.index or len(self.chain):
            raise RuntimeError(
                f"{call} ties links into the untouched base, and this run is at link {self.live.index} already: make a "
                "new ChainOptimizer over a freshly loaded model"
            )

    # of the optimizer that inherits

    if TYPE_CHECKING:
        finished: bool

        def _require_running(self, call: str) -> None: ...

        def _require_outside_a_knot(self, call: str) -> None: ...

        def _extend(self, index: int, snapshot: Any, reset: Reset = "state") -> Optimizer | None: ...


def _agree(told: list[Any], held: list[Any]) -> bool:
    """Whether two lists of knots say the same of the links that both have."""
    known = {knot[0]: knot for knot in told}
    return all(knot == known.get(knot[0], knot) for knot in held)
