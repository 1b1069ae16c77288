"""The named instances of `theory.fw_gap`: each with its builder, its standard horizons and a line of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from theory.oracles import (
    Box,
    CappedTraceBall,
    FrobeniusBall,
    L1Ball,
    Oracle,
    Product,
    RankBall,
    Simplex,
    SpectralBall,
    TraceBall,
)
from theory.problems.learning import Regression, TwoLayer
from theory.problems.problem import Problem, quadratic
from theory.problems.recovery import DenseCompletion, Sensing, low_rank_data, observed_completion
from theory.problems.tight import cosine, cosine_ray, simplex_quadratic, simplex_well, trace_quadratic, zero_chain
from theory.seeds import generator


@dataclass(frozen=True)
class Instance:
    """A named problem: ``build(T, seed)``, the horizons of its standard runs, and a line for ``--list``."""

    build: Callable[[int, int], Problem]
    horizons: tuple[int, ...]
    about: str


def _completion(T: int, seed: int) -> Problem:
    data = low_rank_data(200, 200, seed)
    return DenseCompletion(data.Y, data.delta, TraceBall(data.delta, (200, 200), method="lanczos", certify_steps=60))


def _quadratic(make: Callable[[], Oracle], reach: float, T: int, seed: int) -> Problem:
    """``|W - C|^2 / 2`` with C at the given Frobenius distance from the centre of the set."""
    oracle = make()
    centre = np.full(oracle.shape, 1 / oracle.shape[0]) if isinstance(oracle, Simplex) else oracle.start()
    d = generator(seed).standard_normal(oracle.shape)
    if isinstance(oracle, Simplex):
        d -= d.mean()  # in the affine hull, where a short offset gives an interior optimum
    where = "interior" if reach < 1 else "boundary"
    return quadratic(f"quadratic, {where}, {type(oracle).__name__}", oracle, centre + reach * d / np.linalg.norm(d))


SETS: dict[str, Callable[[], Oracle]] = {
    "l1": lambda: L1Ball(1.0, 10),
    "simplex": lambda: Simplex(10),
    "box": lambda: Box(-1.0, 1.0, 10),
    "l2": lambda: FrobeniusBall(1.0, (10,)),
    "trace": lambda: TraceBall(1.0, (5, 4)),
    "spectral": lambda: SpectralBall(1.0, (5, 4)),
    "rank2": lambda: RankBall(1.0, 2, (5, 4)),
    "capped2": lambda: CappedTraceBall(1.0, 2, (5, 4)),
    "product": lambda: Product([TraceBall(1.0, (4, 3)), TraceBall(0.5, (3, 4))]),
    # Scion's norms: rows of an embedding, a hidden layer, the entries of a head
    "scion": lambda: Product(
        [Product([FrobeniusBall(2.0, (4,))] * 5), SpectralBall(1.0, (4, 4)), Box(-0.25, 0.25, 20)]
    ),
}

# the average gap is of order 1/sqrt(T); on G, the last, in units of s alone and far below the bound
TIGHT = ("A", "A-ray", "B", "B2", "F", "G")
DECADES = (100, 316, 1000, 3162, 10_000)

INSTANCES: dict[str, Instance] = {
    "A": Instance(lambda T, s: cosine(), DECADES, "cosine on an interval, non-convex; nearly attains 1.125 s"),
    "A-ray": Instance(lambda T, s: cosine_ray(seed=s), (100, 316, 1000, 3162), "a cosine along a trace-ball ray"),
    "B": Instance(lambda T, s: simplex_quadratic(), DECADES, "quadratic on the simplex; nearly attains 1.25 s"),
    "B2": Instance(lambda T, s: simplex_well(), DECADES[1:], "Gaussian well on the simplex, non-convex"),
    "F": Instance(lambda T, s: trace_quadratic(), DECADES[:-1], "boundary optimum on the trace ball, 1.126 s"),
    "G": Instance(
        lambda T, s: zero_chain(T),
        (25, 50, 100, 200, 400, 800),
        "zero-chain of length T; resists the short step too",
    ),
    "completion": Instance(_completion, (500,), "robust completion 200x200 on the trace ball, every entry observed"),
    "observed": Instance(
        lambda T, s: observed_completion(300, 200, 6000, s),
        (200,),
        "robust completion over 6000 entries, factored",
    ),
    "sensing": Instance(lambda T, s: Sensing(12, 10, 400, s), (1000,), "robust matrix sensing on the trace ball"),
    "tanh": Instance(lambda T, s: Regression("tanh", seed=s), (1000,), "tanh regression on the l1 ball"),
    "tanh-matrix": Instance(
        lambda T, s: Regression("tanh", outputs=5, seed=s), (1000,), "tanh regression, 5 outputs, trace ball"
    ),
    "sigmoid": Instance(lambda T, s: Regression("sigmoid", seed=s), (1000,), "logistic squared loss on the l1 ball"),
    "network": Instance(lambda T, s: TwoLayer(seed=s), (1000,), "two-layer network on a product of trace balls"),
}
for _name, _set in SETS.items():
    for _reach, _where in ((0.1, "interior"), (4.0, "boundary")):
        INSTANCES[f"quadratic-{_name}-{_where}"] = Instance(
            partial(_quadratic, _set, _reach),
            (200,),
            f"quadratic with an {_where} optimum" if _where == "interior" else "quadratic with a boundary optimum",
        )
