"""The configuration of a chain's links: adapted layers, ranks, scales and first values."""

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from cola.common.arguments import choice, integer, names
from cola.knot.tie import TIEABLE
from cola.lora import parts as fused
from cola.lora.init import INITS, PAIRS, Init, LinkStart, Pair, draw, generator
from cola.lora.parts import Part
from cola.lora.peft_options import carried, is_lora_config, require_known
from cola.lora.per_layer import require_valid

T = TypeVar("T")

SCALINGS = ("constant", "alpha/r", "rslora")
RANK_CHANGES = ("auto", "resize", "mask")


def _helpful(cls: type[T]) -> type[T]:
    """Refuse unknown options, PEFT's among them, with what to write instead."""
    init: Any = cls.__init__

    @functools.wraps(init)
    def checked(self: T, *args: Any, **options: Any) -> None:
        require_known(options, [f.name for f in fields(self)])  # type: ignore[arg-type]
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


@_helpful
@dataclass(frozen=True)
class LinkConfig:
    """Settings of the links of a chain.

    Args:
        r: rank: an int, a sequence (one per link; the last repeats) or a callable of the link index (from 0).
        lora_alpha: sets the first link's scale, ``s = lora_alpha / r``.
        target_modules: layers to adapt: module names (a whole path or its end), a regular expression for the whole
            path, ``"all-linear"`` (every linear layer but output embeddings and the heads of transformers'
            classifiers), ``"all"`` (these, and embeddings, convolutions, fused experts, the projections of
            nn.MultiheadAttention), or None for query and value projections; in a vision-language model only the
            language model's.
        lora_dropout: probability that training drops an input of the link; of embeddings, whose inputs are indices,
            nothing is dropped.
        bias: ``"none"``, or ``"lora_only"`` to train the adapted layers' own biases.
        modules_to_save: names of modules to train whole (heads, embeddings).
        init: draws the factor that does not start at zero: ``"kaiming"`` U(−1/√n, 1/√n) for input width n, as PEFT;
            ``"gaussian"`` N(0, 1/r²); ``"orthogonal"`` rows; ``"selector"``, r inputs, in order, shifted by r each
            link, so that M links reach at most M·r inputs of a layer, and all only if M ≥ in/r (with ``train="B"``
            and one rank indices are kept instead of A); or ``"two-sided"``, both factors orthonormal times a half. Or a
            function of a `LinkStart` that returns A (r×in) or a pair (A, B). If B A is not zero, ``s·B A`` is
            subtracted from the weight when the link begins, so that the model computes the same.
        train: ``"both"`` factors, or only ``"B"`` (A is drawn and frozen) or ``"A"`` (B is drawn and frozen).
        scaling: s of later links: ``"constant"`` keeps the first link's, ``"alpha/r"`` and ``"rslora"``
            (``alpha/√r``) recompute it from each link's rank.
        dtype: dtype of the factors; None for fp32, or float64 on a float64 weight.
        rank_change: how the rank changes: ``"resize"`` the factors, ``"mask"`` (zeros beyond the rank, for shapes that
            may not change), or ``"auto"``: mask in a distributed run, else resize.
        residual_device: device of compensated rounding's residuals and of re-quantised layers' original codes; None
            for the weight's device.
        exclude_modules: targets that carry no link after all: names, or a regular expression for the whole path.
        layers_to_transform: numbers of the layers (blocks) whose targets carry links; None for all.
        layers_pattern: name of the list in which these are counted, such as ``"layers"``; None for the innermost.
        rank_pattern: rank of single layers: a regular expression for the end of the path -> r of the first link. A
            schedule of ranks takes such a layer down in proportion.
        alpha_pattern: likewise -> lora_alpha.
        task_type: ``"SEQ_CLS"``, ``"TOKEN_CLS"`` or ``"QUESTION_ANS"`` train the model's head as well, as if
            ``modules_to_save`` named it; other types of PEFT's change nothing.
        target_parameters: names of parameters to adapt by themselves, whole or their ends: the stacked weights of fused
            experts (``"experts.gate_up_proj"``), or matrices that a module multiplies itself. The last dimension counts
            as the input, unless the module says ``is_transposed``.
        trainable_token_indices: rows to train whole while the rest of the weight stays frozen, as for new tokens: token
            ids of the model's input embedding, or a dict of names of embeddings or output heads -> ids. Layers that
            share the weight have the same rows.
        parts: links of their own for the parts of fused projections: a regular expression for the end of the path ->
            part -> rank of its first link, as in ``{"qkv_proj": {"q": 8, "k": 4, "v": 8}}``. A part that is left out
            carries no link. The rows of q, k, v, gate and up are known for the fused layers of many models of
            transformers; elsewhere give (rank, rows), with the output rows as a range or a list of ranges:
            ``{"q": (8, range(0, 64))}``. Each part starts as a layer of its rows would. All share the layer's scale,
            and a schedule of ranks takes each down in proportion. B is stored with its zeros, out×Σr.

    Names and meanings are PEFT's, but for ``parts``, which PEFT does not have.

    Raises:
        ValueError, TypeError: an argument is out of range.

    >>> LinkConfig(r=(8, 4)).scaling_of(1)
    2.0
    """

    r: int | Sequence[int] | Callable[[int], int] = 8
    lora_alpha: float = 16
    target_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    modules_to_save: Sequence[str] = field(default=())
    init: str | Init = "kaiming"
    train: str = "both"
    scaling: str = "constant"
    dtype: torch.dtype | None = None
    rank_change: str = "auto"
    residual_device: str | None = "cpu"
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    task_type: str | None = None
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = field(default=None, hash=False)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        choice("bias", self.bias, ("none", "lora_only"))
        if isinstance(self.init, str):
            choice("init", self.init, tuple(INITS))
        elif not callable(self.init):
            raise TypeError(f"init={self.init!r:.80} must be one of {', '.join(map(repr, INITS))}, or a function")
        choice("train", self.train, ("both", "A", "B"))
        choice("scaling", self.scaling, SCALINGS)
        choice("rank_change", self.rank_change, RANK_CHANGES)
        if not callable(self.r):
            ranks = self.r if isinstance(self.r, Sequence) else (self.r,)
            if isinstance(ranks, str) or not len(ranks):
                raise ValueError(
                    f"r={self.r!r} must be a positive integer, a non-empty sequence of them, or a callable"
                )
            for rank in ranks:
                _rank(rank)
        if not _number(self.lora_alpha) or not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} must be a positive number")
        if not _number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must be a probability in [0, 1)")
        if self.dtype is not None and self.dtype not in TIEABLE:
            raise ValueError(f"dtype={self.dtype} must be one of {', '.join(map(str, TIEABLE))}")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            names("target_modules", self.target_modules)
        names("modules_to_save", self.modules_to_save)
        if self.residual_device is not None:
            try:
                torch.device(self.residual_device)
            except RuntimeError as error:
                raise ValueError(f"residual_device={self.residual_device!r} is no device: {error}") from None
        if self.target_parameters is not None:
            names("target_parameters", self.target_parameters)
        require_valid(self)
        fused.require_valid(self.parts)

    def rank_of(self, link: int) -> int:
        """Rank of link ``link`` (from 0)."""
        if callable(self.r):
            return _rank(self.r(link))
        return _rank(self.r[min(link, len(self.r) - 1)] if isinstance(self.r, Sequence) else self.r)

    def scaling_of(self, link: int) -> float:
        """Scale s of link ``link``."""
        if self.scaling == "rslora":
            return self.lora_alpha / math.sqrt(self.rank_of(link))
        return self.lora_alpha / self.rank_of(link if self.scaling == "alpha/r" else 0)

    @property
    def _draws_pairs(self) -> bool:
        """Whether a link may start at a product B A that is not zero."""
        return callable(self.init) or self.init in PAIRS

    @property
    def _selects(self) -> bool:
        """Whether a link trains some of the inputs alone: its frozen A selects them."""
        return self.train == "B" and self.init == "selector"

    @property
    def _keeps_indices(self) -> bool:
        """Whether links keep indices instead of A: A selects inputs, and all links have one rank."""
        ranks = self.known_ranks()
        return self._selects and ranks is not None and len(set(ranks)) == 1

    def known_ranks(self) -> tuple[int, ...] | None:
        """All ranks that links may have; None if a callable decides."""
        if callable(self.r):
            return None
        return tuple(map(_rank, self.r)) if isinstance(self.r, Sequence) else (_rank(self.r),)

    def _describe(self) -> dict[str, Any]:
        """The arguments as JSON values, for a checkpoint to compare; functions are all described as ``"callable"``."""
        known, targets, rows = self.known_ranks(), self.target_modules, self.trainable_token_indices
        return {
            "r": "callable" if known is None else list(known),
            "lora_alpha": float(self.lora_alpha),
            "target_modules": targets if targets is None or isinstance(targets, str) else list(targets),
            "lora_dropout": float(self.lora_dropout),
            "bias": self.bias,
            "modules_to_save": list(self.modules_to_save),
            "init": self.init if isinstance(self.init, str) else "callable",
            "train": self.train,
            "scaling": self.scaling,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            **({} if rows is None else {"trainable_token_indices": _plain(rows)}),
        }

    def _dtype_for(self, weight: Tensor) -> torch.dtype:
        """dtype of the factors on ``weight``."""
        return self.dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)


def link_config_of(link: Any) -> LinkConfig:
    """``link`` itself, or what PEFT's LoraConfig says as a `LinkConfig`.

    Raises:
        TypeError: it is neither.
        ValueError: an option of the LoraConfig has no place in a LinkConfig.
    """
    if isinstance(link, LinkConfig):
        return link
    if is_lora_config(link):
        return LinkConfig(**carried(link))
    raise TypeError(f"link={link!r:.200} must be a LinkConfig, or PEFT's LoraConfig")


@dataclass(frozen=True)
class LayerPlan:
    """Ranks and scales of one layer's links, which may start from values different from the configuration's.

    Args:
        config: the configuration of all layers.
        rank, scaling: the first link's, where this layer differs (PEFT's ``rank_pattern``, ``alpha_pattern``).
        parts: those that have links of their own; the layer's link has the sum of their ranks.

    A schedule of ranks ``r_0, r_1, …`` takes a layer that starts with R to ``R·r_k/r_0``, rounded half up and at least
    1; likewise a part. The layer's scale is constant under ``"constant"`` and follows its rank (with parts, the rank
    that it would have without) under ``"alpha/r"`` and ``"rslora"``.

    >>> plan = LayerPlan(LinkConfig(r=(8, 4), scaling="alpha/r"), rank=3, scaling=2.0)
    >>> plan.rank_of(1), plan.scaling_of(1)
    (2, 3.0)
    """

    config: LinkConfig
    rank: int | None = None
    scaling: float | None = None
    parts: tuple[Part, ...] = ()

    def rank_of(self, link: int) -> int:
        """Rank of link ``link`` (from 0)."""
        if self.parts:
            return sum(self.part_ranks(link))
        return self.config.rank_of(link) if self.rank is None else self._stepped(self.rank, link)

    def part_ranks(self, link: int) -> list[int]:
        """Ranks of the parts of link ``link``; empty without parts."""
        return [self._stepped(part.rank, link) for part in self.parts]

    def blocks(self, link: int, following: int) -> list[tuple[Tensor, slice, slice]]:
        """The rows of each part, and its directions in two links."""
        old, new = (fused.slices(self.part_ranks(index)) for index in (link, following))
        return [(part.rows, before, after) for part, before, after in zip(self.parts, old, new)]

    def _stepped(self, rank: int, link: int) -> int:
        usual, first = self.config.rank_of(link), self.config.rank_of(0)
        return max(1, (2 * rank * usual + first) // (2 * first))

    def scaling_of(self, link: int) -> float:
        """Scale s of link ``link``."""
        if self.rank is None or self.scaling is None:
            return self.config.scaling_of(link)
        share = self.rank / self._stepped(self.rank, link)
        return self.scaling * {"constant": 1.0, "alpha/r": share, "rslora": math.sqrt(share)}[self.config.scaling]

    def draw(
        self,
        path: str,
        shape: tuple[int, ...],
        *,
        seed: int,
        link: int,
        dtype: torch.dtype = torch.float32,
        opt: Any = None,
        looks_up: bool = False,
    ) -> Pair:
        """Draw A and B of link ``link`` for the layer at ``path``, on the CPU; see `cola.lora.init.draw`."""
        if not self.parts:
            start = self._start(path, shape, self.rank_of(link), seed, link, opt)
            return draw(self.config.init, self.config.train, start, dtype, looks_up=looks_up)
        pairs = []
        for part, rank in zip(self.parts, self.part_ranks(link)):
            start = self._start(path, (len(part.rows), shape[1]), rank, seed, link, opt, part.name)
            pairs.append(draw(self.config.init, self.config.train, start, dtype))
        return fused.joined(pairs, self.parts, shape[0])

    def _start(
        self, path: str, shape: tuple[int, ...], rank: int, seed: int, link: int, opt: Any, part: str | None = None
    ) -> LinkStart:
        own = path if part is None else f"{path}:{part}"
        if rank > min(shape[-2:]):
            raise ValueError(f"r={rank} of link {link} is above the rank of layer {own!r}, {shape[-2]}x{shape[-1]}")
        return LinkStart(path, shape, rank, self.scaling_of(link), link, generator(seed, link, own), opt, part=part)

    def describe(self) -> list[Any]:
        """Where the layer differs from the configuration, as JSON values, for a checkpoint to compare."""
        own = [] if self.rank is None or self.scaling is None else [self.rank, self.scaling]
        return [*own, *(part.describe() for part in self.parts)]

    def known_ranks(self) -> tuple[int, ...] | None:
        """All ranks that the layer's links may have; None if a callable decides."""
        usual = self.config.known_ranks()
        return None if usual is None else tuple(self.rank_of(link) for link in range(len(usual)))


def _rank(rank: Any) -> int:
    number = integer(rank)
    if number is None or number <= 0:
        raise ValueError(f"r={rank!r} must be a positive integer")
    return number


def _plain(rows: Sequence[int] | Mapping[str, Sequence[int]]) -> Any:
    """Token ids in order, as JSON values."""
    return {name: _plain(own) for name, own in rows.items()} if isinstance(rows, Mapping) else sorted(map(int, rows))


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
