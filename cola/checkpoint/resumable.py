"""Saves and resumes a `ChainOptimizer`; this is the part of it that does not train."""

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
    """The base class of `ChainOptimizer` that saves and loads."""

    chain: Chain
    policy: KnotPolicy
    reset: Reset
    steps: int
    finished: bool
    _base_model: BaseModel
    _extras: dict[str, Any]  # from `register_for_checkpointing`
    _epoch: float | None
    _loss: torch.Tensor | None
    _probed: list[int]
    _ready: bool = False  # whether the checks before a step have passed
    _given_back: str | None = None  # digest of the weights that gave back the first link's start, until a step
    _loaded: Counters | None = None  # those of a loaded state, until a step compares the model's weights with them

    # in a directory

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a checkpoint: chain, live link, base optimizer, policy, counters and torch's random states.

        It is adapter-sized, because `load` rebuilds the weights from the untouched base. Call it between steps:
        gradients that are being accumulated are not saved, and of the buffers only persistent ones that training has
        moved (running statistics). The previous checkpoint in ``directory`` is replaced as a whole or, if anything
        fails, left intact, and the run can continue either way. In a distributed run process 0 writes, with its own
        random states. The first save reads the whole model once, for its fingerprint. FORMAT.md has the format.

        Args:
            directory: created if it does not exist. `Chain.load` reads the chain from it as well.

        Raises:
            RuntimeError: the chain is finished or lacks links (``keep_links=False``), or the model is sharded.
            TypeError: the base optimizer's state holds something that only pickling could keep.
            ValueError: the directory holds another program's files under our names.
            OSError: the disk is full, the directory is read-only, another process is saving there, …

        >>> import tempfile
        >>> from cola import ChainOptimizer, LinkConfig, StepKnots
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 1))
        >>> def wrap(model):
        ...     link = LinkConfig(r=1, target_modules="all-linear")
        ...     return ChainOptimizer(torch.optim.AdamW, model, policy=StepKnots(every=2), link=link)
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
        restore.require_links(self.chain._ledger())
        write_run(Path(directory), self._whole_state())

    @unaffected()
    def load(self, directory: str | os.PathLike[str], *, rng: bool = True) -> None:
        """Continue where `save` was called, bit for bit on the same device, library versions, kernels and threads.

        Call it on a ChainOptimizer made with the saved run's arguments over the UNTOUCHED base, into whose weights it
        ties the links again. All parameters and persistent buffers are compared with the saved run's base; only those
        that the checkpoint brings (a trained head) may differ, with a warning. Everything is read and checked before
        anything changes. Hyperparameters in the param groups become the saved ones, as with any ``load_state_dict``.

        Args:
            directory: that `save` wrote.
            rng: restore torch's global random states (CPU and CUDA), so that dropout continues bit for bit.

        Raises:
            ValueError: a file is missing, truncated or edited; the base is another one; or rank, layers, seed,
                rounding, policy or base optimizer differ. Nothing is changed then.
            RuntimeError: this optimizer has tied a knot already, or is finished.
        """
        self._require_running("load()")
        self._require_outside_a_knot("load()")
        self._require_in_one_piece("load()")
        self._require_untouched("load()")
        saved = read_run(Path(directory))
        self._require_same_run(saved)
        with self.live.starts.untouched():
            restore.check(saved, self.live, self.base)
            restore.rehearse(saved, self._new_base([dict(group) for group in self.param_groups]))
            assert saved.chain is not None
            self._base_model.resume(saved.chain.base)
        with interrupts.deferred():
            restore.rebuild(saved, self.live, self.base)
            self._continue(saved)
            self._loaded = None  # nothing to compare, the weights are rebuilt
            self._loss = None if saved.loss is None else torch.tensor(saved.loss, dtype=torch.float32, device="cpu")
        if saved.counters.weights not in (None, self._base_model.weights().digest):
            logger.warning(
                "the rebuilt weights agree with the saved run's within rounding, not bit for bit: another device, "
                "library version, kernel or number of threads sums in another order"
            )
        if rng:
            restore.restore_rng(saved.rng)

    # in state dicts

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the chain in it. Save it together with the model's own state dict.

        Counters and policy are a JSON text in ``param_groups[0]["cola"]``. The tied links and the residuals of
        compensated rounding are tensors and JSON under the top-level key ``"cola"``, which
        ``torch.load(weights_only=True)`` reads. After `finish` it holds the complete chain, and only a finished
        ChainOptimizer loads it.

        Raises:
            KnotError: a layer with a link was changed from outside (merged by PEFT, replaced, …); names it.
        """
        self._require_unmerged("state_dict()")
        for before in list(self._optimizer_state_dict_pre_hooks.values()):
            before(self)
        state = to_state_dict(self._state())
        for after in list(self._optimizer_state_dict_post_hooks.values()):
            replaced = after(self, state)
            state = state if replaced is None else replaced
        return state

    @unaffected()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was called. The model's own state dict brings the weights and the live link.

        A framework may have dropped the top-level key ``"cola"``, as distributed checkpointing does. Training then
        continues exactly, with the chain's first links missing; it is refused if it depends on the key, as compensated
        rounding does.

        The first step compares the model's weights with those that the state was saved with. It raises if the model's
        own state dict was not loaded, because training would silently continue from a wrong model. A finished chain
        takes no step and compares them at once.

        Raises:
            ValueError: the state is not a chain's, or another chain's (seed, ranks, layers); a link or a dropped entry
                is needed; or only one of the two chains is finished. Nothing is changed then.
            RuntimeError: in a listener of `on_knot`.
        """
        self._require_outside_a_knot("load_state_dict()")
        self._require_unmerged("load_state_dict()")
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
            self.live.starts.resume(saved.start_A, saved.start_B, saved.start_lost)
            self.live.take_residuals(saved.residuals)
        self._continue(saved)
        if not self.finished and (self.steps or counters.index):
            self._base_model.resume(None if saved.chain is None else saved.chain.base, counters.origin_prints())
        for after in list(self._optimizer_load_state_dict_post_hooks.values()):
            after(self)

    def register_for_checkpointing(self, name: str, thing: Any) -> None:
        """Save an object of the caller's with every checkpoint of the run, and restore it when one is loaded.

        To resume a run, register the object under the same name before the state is loaded.

        Args:
            name: of the entry.
            thing: has ``load_state_dict(state)``, and ``state_dict()`` that returns a dict of numbers, strings,
                tensors, lists and dicts.

        Raises:
            TypeError: ``thing`` lacks one of the two methods, or ``name`` is not a string.
            ValueError: the name is taken.

        >>> from cola import ChainOptimizer, LinkConfig, NeverKnots
        >>> link = LinkConfig(r=1, target_modules="all-linear")
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> opt = ChainOptimizer(torch.optim.SGD, model, policy=NeverKnots(), link=link)
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
        """Tie an earlier chain's links into the untouched base, and continue with the link after them.

        Args:
            chain: complete, e.g. from `Chain.from_peft` or `Chain.load`.

        Raises:
            ValueError: it does not fit the model, or the model is not its base. Nothing is changed then.
            RuntimeError: this optimizer has taken a step already, or the chain lacks links.

        >>> from cola import ChainOptimizer, LinkConfig, NeverKnots
        >>> link = LinkConfig(r=1, target_modules="all-linear")
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> opt = ChainOptimizer(torch.optim.SGD, model, policy=NeverKnots(), link=link)
        >>> opt.follow(Chain())
        """
        self._require_running("follow()")
        self._require_outside_a_knot("follow()")
        self._require_untouched("follow()")
        if self.steps:
            raise RuntimeError(f"follow() after {self.steps} steps: call it before the first one")
        if not isinstance(chain, Chain):
            raise TypeError(f"follow(chain={chain!r:.80}) needs a Chain, e.g. Chain.load(directory)")
        links = chain._complete("follow()")
        with self.live.starts.untouched():
            replay.check(self.live.model, links, chain.base, live=True)
            base = self._base_model.fingerprint(chain.layers())
            self._base_model.settle()
            with self._restarted(len(links)):
                restore.replay_links(self.live, links)
        self.chain._restore(Ledger(links, base=base))

    @unaffected()
    def undo(self, base: replay.Base) -> Link:
        """Untie the last knot: rebuild the weights without its link, and begin that link again.

        The live link is dropped. The one before it starts from its own draw, with fresh optimizer state. Everything
        else that training moved (biases, heads, buffers) returns to its value at the knot before. Counters and policy
        stay.

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
        links = self.chain._complete("undo()")
        if not links:
            raise ValueError("undo(): no knot has been tied yet")
        if not isinstance(base, (nn.Module, Mapping)):
            raise TypeError(f"undo(base={base!r:.80}) needs the untouched model, or its state dict")
        if base is self.live.model:
            raise ValueError("undo(base): base is the model itself; give the untouched one, or its state dict")
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
        """Begin link ``index``, with fresh base state, after the block has changed the weights."""
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
        """The run, except for the parts that the model's own state dict has."""
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
            started=sorted(live.starts.of),
            finished=self.finished,
        )
        self.base.param_groups[0][GROUP_KEY] = counters.to_text()
        starts = live.starts.of
        return RunState(
            counters,
            self.base.state_dict(),
            chain._ledger(),
            extras={name: thing.state_dict() for name, thing in self._extras.items()},
            start_A={path: start.A for path, start in starts.items()},
            start_B={path: start.B for path, start in starts.items()},
            start_lost={path: torch.tensor(start.lost, dtype=torch.float64) for path, start in starts.items()},
            residuals={} if self.finished else live.residuals,
        )

    def _whole_state(self) -> RunState:
        """The run, with everything that a new process needs in addition to the untouched base model."""
        state, ledger, link = self._state(), self.chain._ledger(), self.live.snapshot()
        rows = self.live.row_names()
        return replace(
            state,
            chain=ledger if ledger.base is not None else replace(ledger, base=self._base_model.fingerprint()),
            loss=None if self._loss is None else float(self._loss),
            A={path: factor.A for path, factor in link.items()},
            B={path: factor.B for path, factor in link.items()},
            layers={path: (factor.scaling, factor.rounding, factor.form) for path, factor in link.items()},
            shared=self.live.trainable.aliases(),
            rows={n: (f"{p}.{l.entries[0]}".lstrip("."), l.row_indices.tolist()) for n, (p, l) in rows.items()},
            trained=self.live.trained(),
            buffers=self._base_model.moved(),
            others={str(i): p for i, p in enumerate(restore.others(self.base, self.live))},
            residuals={},  # replaying the links rebuilds them
            rng=restore.rng_states(),
        )

    def _arguments(self) -> dict[str, Any]:
        """As `arguments_of` described them when the chain was made, because `finish` removes the layers."""
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
        """At the first step after `load_state_dict`, require that the model's own state dict was loaded as well."""
        loaded = self._loaded
        if loaded is None:
            return
        if loaded.weights is not None and self._base_model.weights().digest != loaded.weights:
            raise RuntimeError(
                f"the model's weights are not those that the optimizer's state was saved with, after {self.live.index} "
                "knots: load the model's own state dict too (the links are tied into it), or use opt.save and opt.load"
            )
        told, held = loaded.knots, knots_of(self.chain)
        # one of them may lack links that a framework dropped: compare those that both have
        known = {knot[0]: knot for knot in told}
        agree = all(knot == known.get(knot[0], knot) for knot in held)
        if self.chain.missing + len(self.chain) != self.live.index or not agree:
            raise RuntimeError(
                f"the chain's links are not those of the optimizer's state (index, step, rank, ‖ΔW‖: the chain has "
                f"{held}, the state has {told}): load the chain that was saved with it"
            )
        self._loaded = None

    def _continue(self, saved: RunState) -> None:
        """Take over a saved run's chain, counters, policy and extra entries."""
        counters, given, settings = saved.counters, repr(self.policy), self.policy._settings()
        self.policy.load_state_dict(counters.policy)
        if self.policy._settings() != settings:
            logger.warning("the run goes on with its own policy, %r, in place of %s", self.policy, given)
        self.steps, self._epoch = counters.steps, counters.epoch
        self._probed, self._groups.changed = list(counters.probed), set(counters.stepped)
        self._ready, self._held, self._given_back = False, {}, None
        if saved.chain is None:
            self.chain._resume(counters.index)
        else:
            self.chain._restore(saved.chain)
        last_knot = max((step for _, step, *_ in counters.knots), default=0)
        self.chain.live = not self.finished and self.steps > last_knot
        self._loaded = None if self.finished else counters
        for name, state in saved.extras.items():  # last: what the caller's own code raises leaves a whole run
            self._extras[name].load_state_dict(state)

    def _require_in_one_piece(self, call: str) -> None:
        if any(is_sharded(layer.plain_weight) for layer in self.live.layers.values()):
            raise RuntimeError(
                f"{call} is for models in one piece, and this one is sharded: save the model's and the optimizer's "
                "state dicts by torch.distributed.checkpoint"
            )

    def _require_untouched(self, call: str) -> None:
        begun = self.live.index or len(self.chain)
        if begun or self.live.starts.lack_copies():
            why = (
                f"is at link {self.live.index} already" if begun else "trains a link whose start the weights gave back"
            )
            raise RuntimeError(
                f"{call} ties links into the untouched base, and this run {why}: make a new ChainOptimizer over a "
                "freshly loaded model"
            )

    # defined by `ChainOptimizer`

    if TYPE_CHECKING:
        _made_with: dict[str, Any]

        def _require_running(self, call: str) -> None: ...

        def _require_outside_a_knot(self, call: str) -> None: ...

        def _require_unmerged(self, call: str) -> None: ...
