"""Choices layer by layer, in PEFT's words: which of the targets carry links, their ranks and scales, and the head."""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from cola.common.arguments import choice, integer, is_finite, names

#: the options of a LinkConfig that this module reads
PER_LAYER = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
    "target_parameters",
)
#: another one, which is not about layers with links
TOKENS = "trainable_token_indices"

#: PEFT's task types -> names of the heads that it trains
TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}


def require_valid(link: Any) -> None:
    """Check the options of a LinkConfig that this module reads.

    Raises:
        ValueError, TypeError: one is out of range.
    """
    if isinstance(link.exclude_modules, str):
        expression("exclude_modules", link.exclude_modules)
    elif link.exclude_modules is not None:
        names("exclude_modules", link.exclude_modules)
    indices = _indices(link)
    if indices is not None and (not indices or not all(integer(i) is not None and i >= 0 for i in indices)):
        raise ValueError(f"layers_to_transform={link.layers_to_transform!r} must be the numbers of layers, from 0")
    if link.layers_pattern is not None and indices is None:
        raise ValueError(
            f"layers_pattern={link.layers_pattern!r} names the list that layers_to_transform counts in: give both"
        )
    if not isinstance(link.layers_pattern, str | None):
        names("layers_pattern", link.layers_pattern)
    for pattern in _patterns(link):
        expression("layers_pattern", pattern)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(link, name)
        if not isinstance(patterns, Mapping):
            raise TypeError(f"{name}={patterns!r} must be a dict of regular expressions; leave it out for none")
        for pattern, value in patterns.items():
            expression(name, pattern)
            whole = name == "alpha_pattern" or integer(value) is not None
            if not (whole and is_finite(value) and value > 0):
                kind = "a positive integer" if name == "rank_pattern" else "a positive number"
                raise ValueError(f"{name}={{{pattern!r}: {value!r}}} must give {kind}")
    if link.task_type is not None:
        choice("task_type", link.task_type, tuple(TASK_HEADS))
    _require_tokens(link.trainable_token_indices)


def _require_tokens(chosen: Any) -> None:
    if chosen is None:
        return
    named = isinstance(chosen, Mapping)
    for name, indices in chosen.items() if named else ((None, chosen),):
        if not isinstance(indices, Sequence) or isinstance(indices, str) or not isinstance(name, str | None):
            raise TypeError(
                f"{TOKENS}={chosen!r:.80} must be a list of token ids, or a dict of embeddings' names and such lists"
            )
        if not indices or not all(integer(i) is not None and i >= 0 for i in indices):
            raise ValueError(f"{TOKENS}={chosen!r:.80} must hold token ids, from 0")
        if len(set(indices)) < len(indices):
            raise ValueError(f"{TOKENS}={chosen!r:.80} names a token twice")
    if named and not chosen:
        raise ValueError(f"{TOKENS}={{}} is empty: leave it out for none")


def narrowed(link: Any, paths: Collection[str]) -> list[str]:
    """The targets that ``exclude_modules`` and ``layers_to_transform`` leave.

    Args:
        link: a LinkConfig.
        paths: of the layers that target_modules matches.

    Raises:
        ValueError: an option matches none of them, or leaves none.
    """
    excluded = _excluded(link, paths)
    for name, matched in excluded.items():
        if not matched:
            single = isinstance(link.exclude_modules, str)
            hint = " (a string is a regular expression for the whole path; for names give a list)" if single else ""
            raise ValueError(f"exclude_modules={name!r} matches none of the targets, {_called(paths, name)}{hint}")
    kept = [path for path in paths if not any(path in matched for matched in excluded.values())]
    if excluded and not kept:
        raise ValueError(f"exclude_modules={link.exclude_modules!r} leaves none of the targets, {_called(paths)}")
    indices = _indices(link)
    if indices is None:
        return kept
    numbers = {path: _number(path, _patterns(link)) for path in kept}
    there = {number for number in numbers.values() if number is not None}
    absent = sorted(set(indices) - there)
    if absent:
        lie = f"are in layers {min(there)} to {max(there)}" if there else "are in no numbered layer"
        raise ValueError(
            f"layers_to_transform={link.layers_to_transform!r}: no target is in layer {absent[0]}; the targets {lie}"
            + (f" of {link.layers_pattern!r}" if link.layers_pattern is not None else "")
        )
    return [path for path, number in numbers.items() if number in indices]


def first_values(link: Any, paths: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Rank and scale of the first link of the layers that ``rank_pattern`` or ``alpha_pattern`` matches.

    Args:
        link: a LinkConfig.
        paths: of the adapted layers.

    Raises:
        ValueError: a pattern matches none of them.
    """
    found: dict[str, tuple[int, float]] = {}
    used: set[tuple[str, str]] = set()
    paths = list(paths)
    for path in paths:
        values = {}
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = next((p for p in getattr(link, name) if re.match(rf"(.*\.)?({p})$", path)), None)
            if pattern is not None:
                values[name] = getattr(link, name)[pattern]
                used.add((name, pattern))
        if values:
            rank = int(values.get("rank_pattern", link.rank_of(0)))
            alpha = values.get("alpha_pattern", link.lora_alpha)
            found[path] = rank, alpha / (math.sqrt(rank) if link.scaling == "rslora" else rank)
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(link, name):
            if (name, pattern) not in used:
                raise unmatched(name, pattern, paths)
    return found


def unmatched(option: str, pattern: str, paths: Collection[str]) -> ValueError:
    """The error of a pattern for the end of the path that decides for none of the layers ``paths``."""
    # a later pattern may match only layers that an earlier one has taken
    if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
        why = "is never reached: an earlier pattern matches all of its layers"
    else:
        why = f"matches none of the adapted layers, {_called(paths, pattern)}"
    return ValueError(f"{option}={{{pattern!r}: …}} {why}")


def heads_to_train(link: Any, paths: Collection[str]) -> list[str]:
    """The heads that ``task_type`` trains and ``modules_to_save`` does not name.

    Args:
        link: a LinkConfig.
        paths: of the model's modules.

    Raises:
        ValueError: the model has no such head.
    """
    wanted = TASK_HEADS.get(link.task_type or "", ())
    there = [name for name in wanted if any(_ends_in(path, name) for path in paths)]
    if wanted and not there and not link.modules_to_save:
        raise ValueError(
            f"task_type={link.task_type!r} trains the head, called {' or '.join(wanted)}, and the model has none: name "
            "the head in modules_to_save, or leave task_type out"
        )
    return [name for name in there if name not in link.modules_to_save]


def expression(option: str, pattern: Any) -> None:
    """Raise ValueError unless ``pattern`` is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from None


def _excluded(link: Any, paths: Collection[str]) -> dict[str, set[str]]:
    """Each name of ``exclude_modules``, or its expression -> the paths that it matches."""
    names_or_expression = link.exclude_modules
    if isinstance(names_or_expression, str):
        return {names_or_expression: {path for path in paths if re.fullmatch(names_or_expression, path)}}
    return {name: {path for path in paths if _ends_in(path, name)} for name in names_or_expression or ()}


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _indices(link: Any) -> list[int] | None:
    chosen = link.layers_to_transform
    if chosen is None:
        return None
    return list(chosen) if isinstance(chosen, (Sequence, set, frozenset)) and not isinstance(chosen, str) else [chosen]


def _patterns(link: Any) -> list[str]:
    given = link.layers_pattern or []
    return [given] if isinstance(given, str) else list(given)


def _number(path: str, patterns: Sequence[str]) -> int | None:
    """The number of the layer that ``path`` lies in: in the innermost numbered list, or in a list of these names."""
    for pattern in patterns or [r"[^.]*"]:
        found = re.match(rf"(?:.*\.)?(?:{pattern})\.(\d+)\.", path)
        if found:
            return int(found[1])
    return None


def _called(paths: Collection[str], name: str = "") -> str:
    last = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    near = difflib.get_close_matches(name, last, n=3) if isinstance(name, str) else []
    return f"called {', '.join(near or last[:8])}"
