"""Describes a run between two steps as plain data. Every form of checkpoint holds a `RunState`, encoded here.

The counters are one JSON text in ``param_groups[0]["cola"]``. Scalars there survive `torch.save` with ``weights_only``,
distributed checkpointing (flattened too), Accelerate and Lightning, which drop top-level keys that they do not know.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola.chain.fingerprint import TensorPrint, prints_from_json
from cola.chain.on_disk import Ledger
from cola.chain.packing import pack, unpack
from cola.common.arguments import is_finite
from cola.common.version import FORMAT
from cola.knot.tie import RECORDED
from cola.lora.link import Link, are_rows
from cola.lora.live import LiveLink
from cola.wrapper.link_groups import GROUP_KEY

#: fields of a `RunState` that map names to tensors; `encode` stores each under ``field:name``
_TENSORS = ("A", "B", "start_A", "start_B", "start_lost", "trained", "buffers", "others", "residuals", "rng")


@dataclass(frozen=True)
class Counters:
    """The part of a run that is JSON.

    Attributes:
        arguments: the `ChainOptimizer`'s, from `arguments_of`; a run continues only under the same ones.
        base_class: name of the base optimizer's class, from `class_name`.
        index: of the live link; after `finish` the number of links.
        rank: of the live link; the largest if layers differ.
        scaling: of the live link in the first layer.
        steps: real steps taken.
        epoch: epochs completed, as last observed.
        probed: param groups whose state a probe step made.
        stepped: entries of param groups that the base changes as its own state.
        policy: the policy's state.
        weights: digest of the tied weights that the state belongs to; None before the first knot.
        knots: the tied links that the chain holds, from `knots_of`.
        origin: before the first knot, prints of the base model's tensors that training has moved; None later.
        started: layers whose weight gave back a product when the live link began.
        finished: whether the chain is finished.
    """

    arguments: dict[str, Any]
    base_class: str
    index: int
    rank: int
    scaling: float
    steps: int
    epoch: float | None
    probed: list[int]
    stepped: list[str]
    policy: dict[str, Any]
    weights: str | None
    knots: list[list[Any]]
    origin: dict[str, Any] | None
    started: list[str]
    finished: bool

    def to_text(self) -> str:
        """The JSON text."""
        return json.dumps({"version": FORMAT, **asdict(self)})

    @classmethod
    def of(cls, state_dict: Any) -> "Counters":
        """Read the counters in an optimizer's state dict.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: there are none, they are damaged, or they have another format.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict={state_dict!r:.80} must be a dict, as state_dict() returns it")
        groups = state_dict.get("param_groups")
        first = groups[0] if isinstance(groups, (list, tuple)) and groups else None
        text = first.get(GROUP_KEY) if isinstance(first, dict) else None
        if not text:
            raise ValueError(
                f"this state was not saved by a ChainOptimizer: param_groups[0] has no {GROUP_KEY!r} entry"
            )
        try:
            values = json.loads(text)
            require_format(values.pop("version"), "the state")
            found = cls(**values)
            found._require_well_formed()
        except _OtherFormat:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"param_groups[0][{GROUP_KEY!r}] is damaged ({error!s:.80}): {text!r:.80}") from None
        return found

    def require_same_run(self, arguments: Mapping[str, Any], live: LiveLink, *, finished: bool) -> None:
        """Check that a chain made with these arguments may continue the run.

        Raises:
            ValueError: an argument or the rank differs, or only one of the two chains is finished.
        """
        if self.finished and not finished:
            raise ValueError(
                "the state was saved after finish(), when its chain was complete, and this one is running: load a "
                "state that was saved before the end; or, to train on, load the finished model and make a "
                "ChainOptimizer over it"
            )
        if finished and not self.finished:
            raise ValueError(
                "the state is of a running chain, and this one is finished: make a new ChainOptimizer over the "
                "untouched model, and load the state there"
            )
        for name, mine in arguments.items():
            if self.arguments[name] != mine:
                raise ValueError(
                    f"the saved state is of another chain: {name} differs ({_difference(self.arguments[name], mine)}). "
                    "Make the ChainOptimizer with the saved run's arguments"
                )
        if finished:
            return
        rank, scaling = live.rank_of(self.index), live.scaling_of(self.index)
        if self.rank != rank or not math.isclose(self.scaling, scaling):
            raise ValueError(
                f"the saved link {self.index} has rank {self.rank} and scale {self.scaling}, here it would have rank "
                f"{rank} and scale {scaling}: make the ChainOptimizer with the saved run's r"
            )

    def origin_prints(self) -> dict[str, TensorPrint]:
        """Prints of the base model's tensors that training had moved before the first knot."""
        return prints_from_json(self.origin or {})

    def _require_well_formed(self) -> None:
        counts = (self.index, self.rank, self.steps)
        fits = (
            all(type(count) is int and count >= 0 for count in counts)
            and isinstance(self.arguments, dict)
            and self.arguments.keys() == set(_ARGUMENTS)
            and isinstance(self.base_class, str)
            and is_finite(self.scaling)
            and (self.epoch is None or is_finite(self.epoch))
            and _is_list(self.probed, int)
            and _is_list(self.stepped, str)
            and isinstance(self.policy, dict)
            and isinstance(self.weights, (str, type(None)))
            and _is_list(self.knots, list)
            and all([type(value) for value in knot] == [int, int, int, str] for knot in self.knots)
            and isinstance(self.origin, (dict, type(None)))
            and _is_list(self.started, str)
            and type(self.finished) is bool
        )
        if not fits:
            raise ValueError("an entry has an unexpected value")
        self.origin_prints()


@dataclass(frozen=True)
class RunState:
    """A whole run. Fields that the model's own state dict covers may be empty.

    Attributes:
        counters: the part that is JSON.
        optimizer: the base optimizer's state dict, which has the counters too.
        chain: the tied links; None if a framework has dropped them.
        loss: of the last step.
        extras: state dicts of the objects in `ChainOptimizer.register_for_checkpointing`, by name.
        A, B: factors of the live link, by layer.
        layers: scale of the live link, rounding of its tie and form, by layer; empty without A and B.
        shared: further paths of the parameters in ``trained``, with the path that they have there.
        rows: names of weights with trained rows, with the path that these have in ``trained``, and their indices.
        start_A, start_B: the factors that the live link began with, for layers whose weight gave their product back.
        start_lost: the norm that rounding lost then.
        trained: parameters that are trained alongside the factors, by path.
        buffers: persistent buffers that differ from the base model's, by path.
        others: parameters of groups that the caller added, numbered in order.
        residuals: of compensated rounding, by layer.
        rng: torch's random states, by device.
    """

    counters: Counters
    optimizer: dict[str, Any]
    chain: Ledger | None = None
    loss: float | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    A: Mapping[str, Tensor] = field(default_factory=dict)
    B: Mapping[str, Tensor] = field(default_factory=dict)
    layers: Mapping[str, tuple[float, str, str]] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[str, list[int]]] = field(default_factory=dict)
    start_A: Mapping[str, Tensor] = field(default_factory=dict)
    start_B: Mapping[str, Tensor] = field(default_factory=dict)
    start_lost: Mapping[str, Tensor] = field(default_factory=dict)
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    residuals: Mapping[str, Tensor] = field(default_factory=dict)
    rng: Mapping[str, Tensor] = field(default_factory=dict)


_PLAIN = "let state_dict() return numbers, texts, tensors, lists and dicts"


def encode(state: RunState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON values and named tensors for all but the optimizer and the chain, which each form stores in its own way."""
    tensors = {f"{kind}:{name}": t for kind in _TENSORS for name, t in getattr(state, kind).items()}
    live = {"layers": dict(state.layers), "shared": dict(state.shared)}
    live.update({"rows": dict(state.rows)} if state.rows else {})
    return {
        "loss": pack(state.loss, "loss", {}),
        "live": pack(live, "live", {}),
        "extras": pack(dict(state.extras), "extra", tensors, _PLAIN),
    }, tensors


def decode(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: dict[str, Any], chain: Ledger | None
) -> RunState:
    """Reverse `encode`, given the optimizer's state dict and the chain. Tensors with other names are ignored.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the values do not describe a run.
    """
    counters = Counters.of(optimizer)
    groups = optimizer["param_groups"]
    if not isinstance(optimizer["state"], dict) or not all(isinstance(group["params"], list) for group in groups):
        raise ValueError(f"its optimizer is {optimizer!r:.80}")
    loss, extras = unpack(content["loss"], {}), unpack(content["extras"], dict(tensors))
    if not isinstance(loss, (float, type(None))) or not isinstance(extras, dict):
        raise ValueError(f"its loss is {loss!r:.40} and its extra entries are {extras!r:.40}")
    named: dict[str, dict[str, Tensor]] = {kind: {} for kind in _TENSORS}
    for full_name, tensor in tensors.items():
        kind, _, name = full_name.partition(":")
        if kind in named:
            named[kind][name] = tensor
    starts = [named[kind] for kind in ("start_A", "start_B", "start_lost")]
    if named["A"].keys() != named["B"].keys() or any(part.keys() != starts[0].keys() for part in starts):
        raise ValueError("a layer's live link lacks one of its factors")
    if any(lost.dim() for lost in starts[2].values()):
        raise ValueError("what rounding lost when a link began is no number")
    live = unpack(content["live"], {})
    layers, shared = live["layers"], live["shared"]
    layers = {path: (*layer, "linear")[:3] for path, layer in layers.items()}  # older states have no forms
    if layers.keys() != named["A"].keys() or not all(
        len(layer) == 3 and is_finite(layer[0]) and layer[1] in RECORDED and isinstance(layer[2], str)
        for layer in layers.values()
    ):
        raise ValueError(f"the scales, roundings and forms of its live link are {layers!r:.80}")
    if not all(isinstance(path, str) and first in named["trained"] for path, first in shared.items()):
        raise ValueError(f"its shared parameters are {shared!r:.80}")
    rows = live.get("rows", {})
    for name, (path, indices) in rows.items():
        if not isinstance(name, str) or not are_rows(torch.tensor(indices), named["trained"][path]):
            raise ValueError(f"its trained rows are {rows!r:.80}")
    return RunState(counters, optimizer, chain, loss, extras, layers=layers, shared=shared, rows=rows, **named)


_ARGUMENTS = ("layers", "seed", "rounding", "quantized", "reset", "link")


def arguments_of(live: LiveLink, reset: str) -> dict[str, Any]:
    """The arguments of a `ChainOptimizer` that a resumed run must share, as JSON values."""
    layers = {path: [*shape, *live.plans[path].describe()] for path, shape in live.shapes().items()}
    values = (layers, live.seed, live.rounding, live.quantized, reset, live.config._describe())
    return dict(zip(_ARGUMENTS, values, strict=True))


def knots_of(links: Iterable[Link]) -> list[list[Any]]:
    """Index, step, rank and ‖ΔW‖ of each link, which tell one run's links from another's.

    The norm has four digits, because processes may differ in its last bits.
    """
    return [[link.index, link.step, link.rank, f"{link.report.delta_norm:.4g}"] for link in links]


def class_name(base: Optimizer) -> str:
    """The name of a base optimizer's class in checkpoints."""
    return f"{type(base).__module__.partition('.')[0]}.{type(base).__qualname__}"


class _OtherFormat(ValueError):
    """The state has another format version; it must not be called damaged."""


def require_format(version: Any, what: str) -> None:
    """Raise ValueError unless ``version`` is `FORMAT`; the message begins with ``what``."""
    if version != FORMAT or type(version) is not int:
        raise _OtherFormat(f"{what} has format {version!r:.40}, and this version of cola reads format {FORMAT}")


def _is_list(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _difference(saved: Any, mine: Any) -> str:
    if not isinstance(saved, dict) or not isinstance(mine, dict):
        return f"saved {saved!r}, here {mine!r}"
    differ = [name for name in {**saved, **mine} if saved.get(name) != mine.get(name)]
    return "; ".join(f"{name}: saved {saved.get(name)!r}, here {mine.get(name)!r}" for name in differ[:3])
