"""A chain that fails at the rate 1/L, and its projected variant that does not, after RAC-LoRA (arXiv 2410.08305).

Let ``L(W) = (beta/2) |W - C|^2`` and ``G = W - C``. A link of rank one draws ``a``, starts at ``b = 0``, takes one
gradient step of rate ``1/beta`` on its factors, and is tied. The step leaves ``a`` as it is, because ``b = 0``, so

    G_{k+1} = G_k (I - a'a)        and        |G_{k+1}|^2 = |G_k|^2 + |G_k a'|^2 (|a|^2 - 2).

The rate is right for W, not for the factors: the loss is smooth in b with the constant ``beta |a|^2``. Entries N(0, 1),
as PEFT and the paper draw them for r = 1, give ``|a|^2`` about n, and every link with ``|a|^2 > 2`` raises the loss.

If a has length one, ``I - a'a`` is a projection: no link raises the loss, and ``E|G_{k+1}|^2 = (1 - 1/n) |G_k|^2``. In
the library this is ``LinkConfig(train="B", init="orthogonal")``. A rate of ``1/(beta |a|^2)`` mends the chain too.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from theory.arguments import count
from theory.checks.check import Check, at_most
from theory.checks.significance import LEVEL, bernstein
from theory.seeds import generator

INPUTS, LINKS, RUNS = 48, 48, 1024
ROUNDING = 16 * INPUTS * float(np.finfo(float).eps)


def losses(projected: bool, seed: int = 0, inputs: int = INPUTS, links: int = LINKS, runs: int = RUNS) -> np.ndarray:
    """The losses of independent chains of rank one on a layer with one output, in units of the first.

    Args:
        projected: whether ``a`` is drawn with length one. seed: of the draws.
        inputs: n. links: of a chain. runs: the number of chains.

    Returns:
        ``(runs, links + 1)``, the loss before each link and after the last.
    """
    for name, value in (("inputs", inputs), ("links", links), ("runs", runs)):
        count(name, value, "the size of the instance")
    rng = generator(seed, 3, int(projected))
    G = np.zeros((runs, inputs))
    G[:, 0] = 1.0
    out = [np.ones(runs)]
    for _ in range(links):
        a = rng.standard_normal((runs, inputs))
        if projected:
            a /= np.linalg.norm(a, axis=1, keepdims=True)
        G -= np.sum(G * a, axis=1, keepdims=True) * a
        out.append(np.sum(G * G, axis=1))
    return np.array(out).T


def fails(values: np.ndarray, inputs: int = INPUTS) -> list[Check]:
    """No Gaussian link of any chain lowers the loss, and every chain ends above its start.

    A link lowers it only if ``|a|^2 < 2``, which for n Gaussian entries has a known probability.
    """
    smallest, last = float((values[:, 1:] / values[:, :-1]).min()), float((values[:, -1] / values[:, 0]).min())
    level = max(values[:, 1:].size * float(stats.chi2.cdf(2.0, inputs)), float(np.finfo(float).tiny))
    detail = f"the median loss is {np.median(values[:, -1]):.2g} times the first"
    return [
        at_most("a chain at 1/L: no link lowers the loss", 1.0, smallest, ROUNDING, detail=detail, level=level),
        at_most("a chain at 1/L: the loss doubles at least", 2.0, last, detail=detail, level=level),
    ]


def falls(values: np.ndarray) -> Check:
    """No projected link of any chain raises the loss, up to rounding."""
    largest = float((values[:, 1:] / values[:, :-1]).max())
    detail = f"the median loss is {np.median(values[:, -1]):.2g} times the first"
    return at_most("projected: no link raises the loss", largest, 1.0, ROUNDING, detail=detail)


def projected_rate(values: np.ndarray, inputs: int = INPUTS, level: float = LEVEL) -> Check:
    """The mean loss after K projected links is ``(1 - 1/n)^K``, from both sides.

    The factors ``1 - z^2`` of a chain are independent, and ``z^2`` has the Beta distribution with 1/2 and (n-1)/2. So
    the second moment of a factor is ``(n-1)(n+1) / (n (n+2))``. Losses lie in [0, 1].
    """
    n, links = inputs, values.shape[1] - 1
    mean = (1 - 1 / n) ** links
    variance = ((n - 1) * (n + 1) / (n * (n + 2))) ** links - mean**2
    allowed = float(bernstein(variance, max(mean, 1 - mean), len(values), level))
    seen = float(values[:, -1].mean())
    detail = f"mean {seen:.4f}, expected {mean:.4f}, over {len(values)} chains"
    return at_most("projected: the loss falls by 1 - 1/n a link", abs(seen - mean), allowed, detail=detail, level=level)


def expected_growth(inputs: int, rank: int = 1, deviation: float | None = None) -> float:
    """``E|G_{k+1}|^2 / |G_k|^2`` of a chain of rank r at the rate 1/L, whose links draw entries N(0, deviation^2).

    It is ``1 - 2 r s^2 + s^4 r (r + n + 1)``, above 1 where ``s^2 (r + n + 1) > 2``.

    Args:
        inputs: n. rank: r. deviation: s, by default 1/r as in PEFT.

    >>> expected_growth(64), round(expected_growth(768, 8), 2)
    (65.0, 2.27)
    """
    s2 = (1 / rank if deviation is None else deviation) ** 2
    return 1 - 2 * rank * s2 + s2**2 * rank * (rank + inputs + 1)


def restart_checks(seed: int) -> tuple[list[Check], list[Check], float, float]:
    """The checks of the chain and of its projected variant, with the geometric mean of a chain's growth per link.

    Args:
        seed: of the draws.
    """
    plain, projected = losses(False, seed), losses(True, seed)
    growth = [math.exp(float(np.log(v[:, -1]).mean()) / LINKS) for v in (plain, projected)]
    return fails(plain), [falls(projected), projected_rate(projected)], growth[0], growth[1]
