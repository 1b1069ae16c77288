"""How a run is saved and goes on: the part of `ChainOptimizer` that is not training."""

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cola.chain import replay
from cola.chain.chain import Chain
from cola.chain.on_disk import Ledger
from cola.checkpoint import restore
from cola.checkpoint.base_model import BaseModel
from cola.checkpoint.directory import read_run, write_run
from cola.checkpoint.state import Counters, RunState, class_name, knots_of
from cola.checkpoint.state_dict import from_state_dict, to_state_dict
from cola.common import interrupts
from cola.common.contexts import unaffected
from cola.common.distributed import is_sharded
from cola.knot.reset import Reset, reset_name
from cola.knot.transaction import NextLink
from cola.lora.integrity import require_intact, require_same_weights
from cola.lora.link import Link
from cola.lora.names import listed
from cola.policies import KnotPolicy
from cola.wrapper.link_groups import GROUP_KEY, LinkGroups

logger = logging.getLogger("cola")


class Resumable(LinkGroups):
    """Saving and loading, for `ChainOptimizer` to inherit."""

    chain: Chain
    policy: KnotPolicy
    reset: Reset
    steps: int
    finished: bool
    _base_model: BaseModel
    _extras: dict[str, Any]  # of `register_for_checkpointing`
    _epoch: float | None
    _loss: torch.Tensor | None
    _probed: list[int]
    _ready: bool = False  # whether the checks before a step have been made
    _given_back: str | None = None  # digest of the weights that gave back the first link's start, until a step
    _loaded: Counters | None = None  # of a loaded state, until a step has compared the model's weights with it

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
            directory: made if it does not exist. `Chain.load` reads the chain from it as well.

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
        restore.require_links(self.chain.ledger())
        write_run(Path(directory), self._whole_state())

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
        saved = read_run(Path(directory))
        self._require_same_run(saved)
        with self.live.untouched():
            restore.check(saved, self.live, self.base)
            restore.rehearse(saved, self._new_base([dict(group) for group in self.param_groups]))
            assert saved.chain is not None
            self._base_model.resume(saved.chain.base)
        with interrupts.deferred():
            restore.rebuild(saved, self.live, self.base)
            self._continue(saved)
            self._loaded = None  # nothing to compare: the weights have been rebuilt
            self._loss = None if saved.loss is None else torch.tensor(saved.loss, dtype=torch.float32, device="cpu")
        if saved.counters.weights not in (None, self._base_model.weights().digest):
            logger.warning(
                "the rebuilt weights agree with the saved run's within rounding, not bit for bit: another device, "
                "library version, kernel or number of threads sums in another order"
            )
        if rng:
            restore.restore_rng(saved.rng)

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
        state = to_state_dict(self._state())
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
        saved = from_state_dict(state_dict)
        self._require_same_run(saved)
        restore.require_carried(saved, self.live)
        counters = saved.counters
        if self.finished and counters.weights != self._base_model.final_digest():
            raise ValueError(
                "the model's weights are not those that the finished chain's state was saved with: load the model's "
                "own state dict first"
            )
        restore.require_same_groups(saved, self.base)
        self.base.load_state_dict(saved.optimizer)
        if not self.finished:
            self.live.resume(counters.index)
            self.live.take_links(() if saved.chain is None else saved.chain.links)
            self.live.take_starts(saved.start_A, saved.start_B, saved.start_lost)
            self.live.take_residuals(saved.residuals)
        self._continue(saved)
        if not self.finished and (self.steps or counters.index):
            self._base_model.resume(None if saved.chain is None else saved.chain.base, counters.origin_prints())
        for after in list(self._optimizer_load_state_dict_post_hooks.values()):
            after(self)

    def register_for_checkpointing(self, name: str, thing: Any) -> None:
        """Save something of the caller's with every checkpoint of the run, and give it back when one is loaded.

        Call it again, under the same name, before a resumed run's state is loaded.

        Args:
            name: of the entry.
            thing: with ``state_dict()``, which returns a dict of numbers, texts, tensors, lists and dicts, and
                ``load_state_dict(state)``.

        Raises:
            TypeError: ``thing`` lacks one of the two methods, or ``name`` is no text.
            ValueError: the name is taken.

        >>> from cola import ChainOptimizer, LinkConfig, NeverKnots
        >>> link = LinkConfig(r=1, target_modules="all-linear")
        >>> opt = ChainOptimizer(torch.optim.SGD, torch.nn.Sequential(torch.nn.Linear(2, 2)), NeverKnots(), link=link)
        >>> opt.register_for_checkpointing("average", torch.nn.Linear(1, 1))
        """
        if not isinstance(name, str):
            raise TypeError(f"name={name!r:.80} must be a string")
        if not callable(getattr(thing, "state_dict", None)) or not callable(getattr(thing, "load_state_dict", None)):
            raise TypeError(f"thing={thing!r:.80} must have state_dict() and load_state_dict(state)")
        if name in self._extras:
            raise ValueError(f"name={name!r} is registered already: choose another one")
        self._extras[name] = thing

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
        with self.live.untouched():
            replay.check(self.live.model, links, chain.base, live=True)
            base = self._base_model.fingerprint(chain.layers())
            self._base_model.settle()
            with self._restarted(len(links)):
                restore.replay_links(self.live, links)
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
            replay.untie(self.live.model, links, base, also=self._base_model.moved())
            restore.replay_links(self.live, links[:-1])
        self.chain.live = False
        return self.chain.undo()

    # inside

    @contextlib.contextmanager
    def _restarted(self, index: int) -> Iterator[None]:
        """Around a change of the weights: afterwards link ``index`` begins, with fresh base state."""
        modes = self._leave_training_mode()
        try:
            with interrupts.deferred():
                following = NextLink(self, index, self.live.snapshot(), "state")
                yield
                following.begin()
                following.reset()
        finally:
            self._mode(modes)
        self._loss, self._held, self._given_back = None, {}, None

    def _state(self) -> RunState:
        """The run, without what the model's own state dict brings."""
        live, chain = self.live, self.chain
        if self.finished:
            index, weights = chain.missing + len(chain), self._base_model.final_digest()
        else:
            require_intact(live)
            require_same_weights(live, self._held)
            tied = live.index or live.starts
            index, weights = live.index, self._base_model.weights().digest if tied else None
            if self._loaded is not None:
                weights = self._loaded.weights  # the model's own state dict may not have been loaded yet
        counters = Counters(
            arguments=self._arguments(),
            base_class=class_name(self.base),
            index=index,
            rank=live.rank_of(live.index),
            scaling=live.scaling_of(live.index),
            steps=self.steps,
            epoch=self._epoch,
            probed=self._probed,
            stepped=sorted(self._groups.changed),
            policy=self.policy.state_dict(),
            weights=weights,
            knots=knots_of(chain),
            origin=None if live.index or self.finished else self._base_model.to_json(),
            started=[] if self.finished else sorted(live.starts),
            finished=self.finished,
        )
        self.base.param_groups[0][GROUP_KEY] = counters.to_text()
        residuals = {} if self.finished else live.residuals
        extras = {name: thing.state_dict() for name, thing in self._extras.items()}
        starts = {} if self.finished else live.starts
        return RunState(
            counters,
            self.base.state_dict(),
            chain.ledger(),
            extras=extras,
            start_A={path: start.A for path, start in starts.items()},
            start_B={path: start.B for path, start in starts.items()},
            start_lost={path: torch.tensor(start.lost, dtype=torch.float64) for path, start in starts.items()},
            residuals=residuals,
        )

    def _whole_state(self) -> RunState:
        """The run, with everything that a new process needs besides the untouched base model."""
        state, ledger, link = self._state(), self.chain.ledger(), self.live.snapshot()
        return replace(
            state,
            chain=ledger if ledger.base is not None else replace(ledger, base=self._base_model.fingerprint()),
            loss=None if self._loss is None else float(self._loss),
            A={path: factor.A for path, factor in link.items()},
            B={path: factor.B for path, factor in link.items()},
            trained=self.live.trained(),
            buffers=self._base_model.moved(),
            others={str(i): p for i, p in enumerate(restore.others(self.base, self.live))},
            residuals={},  # replaying the links gives them
            rng=restore.rng_states(),
        )

    def _arguments(self) -> dict[str, Any]:
        """What `arguments_of` said when the chain was made: `finish` takes the layers off."""
        return {**self._made_with, "reset": reset_name(self.reset)}

    def _require_same_run(self, saved: RunState) -> None:
        saved.counters.require_same_run(self._arguments(), self.live, finished=self.finished)
        # on a copy, but not of what the policy may hold
        policy = copy.deepcopy(self.policy, {id(self): self, id(self.live.model): self.live.model})
        policy.load_state_dict(saved.counters.policy)
        if saved.chain is None:  # a framework has dropped the extra entries with the links
            if self._extras:
                logger.warning("the saved state has no entries for %s, which stay as they are", listed([*self._extras]))
        elif saved.extras.keys() != self._extras.keys():
            raise ValueError(
                f"the saved run has the extra entries {sorted(saved.extras)}, and here {sorted(self._extras)} are "
                "registered: call opt.register_for_checkpointing for the same names before the state is loaded"
            )

    def _require_weights(self) -> None:
        """At the first step after `load_state_dict`: the model must have been given its own state dict as well."""
        loaded = self._loaded
        if loaded is None:
            return
        if loaded.weights is not None and self._base_model.weights().digest != loaded.weights:
            raise RuntimeError(
                f"the model's weights are not those that the optimizer's state was saved with, after {self.live.index} "
                "knots: load the model's own state dict too (the links are tied into it), or use opt.save and opt.load"
            )
        told, held = loaded.knots, knots_of(self.chain)
        # links that one of them lacks were lost on one way, and are there again by another
        if self.chain.missing + len(self.chain) != self.live.index or not _agree(told, held):
            raise RuntimeError(
                f"the chain's links are not those of the optimizer's state (index, step, rank, ‖ΔW‖: the chain has "
                f"{held}, the state tells of {told}): load the chain that was saved with it"
            )
        self._loaded = None

    def _continue(self, saved: RunState) -> None:
        """Count on from a saved run, with its chain."""
        counters = saved.counters
        self.policy.load_state_dict(counters.policy)
        self.steps, self._epoch = counters.steps, counters.epoch
        self._probed, self._groups.changed = list(counters.probed), set(counters.stepped)
        self._ready, self._held, self._given_back = False, {}, None
        if saved.chain is None:
            self.chain.resume(counters.index)
        else:
            self.chain.restore(saved.chain)
        last_knot = max((step for _, step, *_ in counters.knots), default=0)
        self.chain.live = not self.finished and self.steps > last_knot
        self._loaded = None if self.finished else counters
        for name, state in saved.extras.items():  # last: what the caller's own code raises leaves a whole run
            self._extras[name].load_state_dict(state)

    def _require_in_one_piece(self, call: str) -> None:
        if any(is_sharded(layer.weight) for layer in self.live.layers.values()):
            raise RuntimeError(
                f"{call} is for models in one piece, and this one is sharded: save the model's and the optimizer's "
                "state dicts by torch.distributed.checkpoint"
            )

    def _require_untouched(self, call: str) -> None:
        begun = self.live.index or len(self.chain)
        if begun or self.live.has_lost_the_base():
            why = (
                f"is at link {self.live.index} already" if begun else "trains a link whose start the weights gave back"
            )
            raise RuntimeError(
                f"{call} ties links into the untouched base, and this run {why}: make a new ChainOptimizer over a "
                "freshly loaded model"
            )

    # of the optimizer that inherits

    if TYPE_CHECKING:
        _made_with: dict[str, Any]

        def _require_running(self, call: str) -> None: ...

        def _require_outside_a_knot(self, call: str) -> None: ...


def _agree(told: list[Any], held: list[Any]) -> bool:
    """Whether two lists of knots say the same of the links that both have."""
    known = {knot[0]: knot for knot in told}
    return all(knot == known.get(knot[0], knot) for knot in held)
