"""The chain's own counters, as one JSON text that every way of saving an optimizer carries along.

It rides in ``param_groups[0]["cola"]``: scalars there survive `torch.save` with ``weights_only``, distributed
checkpointing (flattened too), Accelerate and Lightning, all of which drop top-level keys that they do not know.
"""

import json
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from cola.extend import LayerPlan
from cola.fingerprint import TensorPrint, prints_from_json
from cola.knots import KnotPolicy
from cola.link import Link
from cola.live import LiveLink
from cola.version import FORMAT

#: the param-group entry
GROUP_KEY = "cola"


def write(
    steps: int,
    epoch: float | None,
    probed: list[int],
    stepped: Iterable[str],
    policy: KnotPolicy,
    live: dict[str, Any],
    weights: str | None,
    knots: list[list[Any]],
    origin: dict[str, Any] | None,
    base_class: str,
    finished: int | None = None,
) -> str:
    """The counters of a chain.

    Args:
        steps, epoch: taken so far.
        probed: groups whose state a probe step made.
        stepped: group entries that are the base's state.
        policy: described in full, as is the live link, so that `read` can tell another chain's state.
        live: as `describe` gives it.
        weights: digest of the tied weights that the state belongs to; None before the first knot.
        knots: of the tied links that the chain holds, as `knots_of` gives them.
        origin: before it, prints of those of the base's tensors that training has moved; None later, when the chain has
            them.
        base_class: of the base optimizer, as `class_name` gives it.
        finished: the number of links, after `finish`; None while the chain runs.
    """
    return json.dumps(
        {
            "version": FORMAT,
            "steps": steps,
            "epoch": epoch,
            "probed": probed,
            "stepped": sorted(stepped),
            "policy": policy.state_dict(),
            "live": live,
            "weights": weights,
            "knots": knots,
            "origin": origin,
            "base_class": base_class,
            "finished": finished,
        }
    )


def knots_of(links: Iterable[Link]) -> list[list[Any]]:
    """What tells one run's links from another's: index, step, rank and ‖ΔW‖ of each.

    The norm is given to four digits: processes may differ in its last bits.
    """
    return [[link.index, link.step, link.rank, f"{link.report.delta_norm:.4g}"] for link in links]


def describe(live: LiveLink, reset: str) -> dict[str, Any]:
    """What identifies a live link, as JSON values.

    Args:
        live: the link.
        reset: what becomes of the base's state at a knot, in a word.
    """
    return {
        "index": live.index,
        "rank": live.rank_of(live.index),
        "seed": live.seed,
        "rounding": live.rounding,
        "quantized": live.quantized,
        "reset": reset,
        "link": live.config.describe(),
        "layers": {path: [*shape, *_own(live.plans[path])] for path, shape in live.shapes().items()},
    }


def _own(plan: LayerPlan) -> list[float]:
    """Rank and scale of a layer that has its own."""
    return [] if plan.rank is None or plan.scaling is None else [plan.rank, plan.scaling]


def read(state_dict: dict[str, Any], described: dict[str, Any], live: LiveLink, *, finished: bool) -> dict[str, Any]:
    """The counters in an optimizer's state dict, checked against the chain that is to take them.

    Args:
        state_dict: of a `ChainOptimizer`.
        described: what `describe` says of the chain's link, or said before `finish`.
        live: the link.
        finished: whether the chain is.

    Raises:
        ValueError: none there, unreadable, of another chain, or of one that is finished where this one is not, or the
            other way round; the message names the first difference.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict={state_dict!r:.80} must be a dict, as state_dict() returns it")
    groups = state_dict.get("param_groups")
    first = groups[0] if isinstance(groups, (list, tuple)) and groups else None
    text = first.get(GROUP_KEY) if isinstance(first, dict) else None
    if not text:
        raise ValueError(f"this state was not saved by a ChainOptimizer: param_groups[0] has no {GROUP_KEY!r} entry")
    try:
        saved = json.loads(text)
        version, theirs = saved["version"], saved["live"]
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"param_groups[0][{GROUP_KEY!r}] is damaged ({error}): {text!r:.80}") from None
    if not _well_formed(saved):
        raise ValueError(f"param_groups[0][{GROUP_KEY!r}] is damaged: {text!r:.80}")
    if version != FORMAT:
        raise ValueError(f"the state has format {version!r:.40}, and this version of cola reads format {FORMAT}")
    if saved.get("finished") is not None and not finished:
        raise ValueError(
            "the state was saved after finish(), when its chain was complete, and this one is running: load a state "
            "that was saved before the end; or, to train on, load the finished model and make a ChainOptimizer over it"
        )
    if saved.get("finished") is None and finished:
        raise ValueError(
            "the state is of a running chain, and this one is finished: make a new ChainOptimizer over the untouched "
            "model, and load the state there"
        )
    for name in ("layers", "seed", "rounding", "quantized", "reset", "link"):
        if theirs[name] != described[name]:
            raise ValueError(
                f"the saved state is of another chain: {name} differs ({_difference(theirs[name], described[name])}). "
                "Make the ChainOptimizer with the saved run's arguments"
            )
    wanted = live.rank_of(theirs["index"])
    if theirs["rank"] != wanted:
        raise ValueError(
            f"the saved link {theirs['index']} has rank {theirs['rank']}, here it would have {wanted}: "
            "make the ChainOptimizer with the saved run's r"
        )
    return saved


def class_name(base: Optimizer) -> str:
    """A base optimizer's class, as states and checkpoints name it."""
    return f"{type(base).__module__.partition('.')[0]}.{type(base).__qualname__}"


def require_same_groups(state_dict: dict[str, Any], saved: dict[str, Any], base: Optimizer) -> None:
    """Refuse a state that torch would load, or refuse in words of its own, and that does not fit the base.

    Args:
        state_dict: of a `ChainOptimizer`.
        saved: what `read` made of it.
        base: that is to load it.

    Raises:
        ValueError: it is of another class of optimizer, or its groups hold other numbers of parameters.
    """
    if saved.get("base_class", class_name(base)) != class_name(base):
        raise ValueError(f"the saved run's base optimizer is {saved['base_class']}, here it is {class_name(base)}")
    ours = [len(group["params"]) for group in base.param_groups]
    theirs = [len(group["params"]) for group in state_dict["param_groups"] if "params" in group]
    if ours != theirs:
        raise ValueError(
            f"the saved run's groups hold {theirs} parameters, here they hold {ours}: make the ChainOptimizer with the "
            "saved run's arguments, and add what it had added by add_param_group"
        )


def origin_of(saved: dict[str, Any]) -> dict[str, TensorPrint]:
    """Prints of what training had moved before the first knot, from `read`'s counters.

    Raises:
        ValueError: they are damaged.
    """
    try:
        return prints_from_json(saved.get("origin") or {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"param_groups[0][{GROUP_KEY!r}] is damaged: its origin has no {error!s:.80}") from None


#: what `knots_of` gives for one link
_KNOT = [int, int, int, str]


def _well_formed(saved: dict[str, Any]) -> bool:
    """Whether the entries are of the kinds that `write` gives."""
    live = saved["live"]
    integers = [saved.get("steps"), *([live.get("index"), live.get("rank")] if isinstance(live, dict) else [None])]
    lists = [(saved.get("probed"), int), (saved.get("stepped"), str)]
    return (
        all(type(value) is int and value >= 0 for value in integers)
        and all(isinstance(values, list) and all(type(v) is kind for v in values) for values, kind in lists)
        and isinstance(saved.get("epoch"), (int, float, type(None)))
        and isinstance(saved.get("policy"), dict)
        and isinstance(saved.get("weights"), (str, type(None)))
        and isinstance(saved.get("knots", []), list)
        and all(isinstance(knot, list) and [type(x) for x in knot] == _KNOT for knot in saved.get("knots", []))
        and isinstance(saved.get("origin"), (dict, type(None)))
        and isinstance(saved.get("base_class", ""), str)
        and (saved.get("finished") is None or (type(saved["finished"]) is int and saved["finished"] >= 0))
        and live.keys() >= {"layers", "seed", "rounding", "quantized", "reset", "link"}
    )


def _difference(saved: Any, mine: Any) -> str:
    if not isinstance(saved, dict) or not isinstance(mine, dict):
        return f"saved {saved!r}, here {mine!r}"
    differ = [name for name in {**saved, **mine} if saved.get(name) != mine.get(name)]
    return "; ".join(f"{name}: saved {saved.get(name)!r}, here {mine.get(name)!r}" for name in differ[:3])
