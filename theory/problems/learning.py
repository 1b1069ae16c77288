"""Learning problems with certified smoothness: squared loss through tanh or the logistic function, and a network.

For one output ``z`` and a target ``y`` in the range of the link ``h``, the second derivative of
``(h(z) - y)^2 / 2`` is ``h'^2 + (h - y) h''``. This is a polynomial in ``h``, and the code below has its exact
bound kappa. A linear map ``z = X w`` then gives ``beta = kappa sigma_1(X)^2 / N``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from theory.arguments import count, positive
from theory.oracles import L1Ball, Oracle, Product, TraceBall
from theory.problems.problem import FiniteSum
from theory.seeds import generator

# sup |h'^2 + (h - y) h''|: with t = tanh z and y = 1 it is (1 - t)^2 (1 + t)(1 + 3t), whose derivative vanishes
# where 6 t^2 + 3 t = 1; other y in [-1, 1] give less. The logistic function is (1 + tanh(z/2))/2 and gives a
# sixteenth of that.
_T = (math.sqrt(33) - 3) / 12
_KAPPA_TANH = (1 - _T) ** 2 * (1 + _T) * (1 + 3 * _T)
KAPPA = {"tanh": _KAPPA_TANH, "sigmoid": _KAPPA_TANH / 16}
SUP_TANH2 = 4 / (3 * math.sqrt(3))  # sup |tanh''|


class Regression(FiniteSum):
    """``L(W) = sum_k mean_i (h(x_i w_k) - y_ik)^2 / 2`` with ``h`` tanh or the logistic function; non-convex.

    Args:
        link: ``"tanh"`` (targets in [-1, 1]) or ``"sigmoid"`` (targets in [0, 1]).
        samples, inputs, outputs: sizes N, d, k. One output gives a vector problem on the l1 ball, several
            give a matrix problem on the trace ball.
        delta: radius of the set. seed: of the data; targets are signs of a noisy linear map.
        oracle: another set of the same shape.
    """

    def __init__(
        self,
        link: str = "tanh",
        samples: int = 400,
        inputs: int = 30,
        outputs: int = 1,
        delta: float = 3.0,
        seed: int = 0,
        oracle: Oracle | None = None,
    ):
        if link not in KAPPA:
            raise ValueError(f'link must be "tanh" or "sigmoid", got {link!r}: pick one of them')
        positive("delta", delta, "the radius of K")
        self.link, self.samples = link, count("samples", samples, "the number of samples")
        rng = generator(seed)
        self.X = rng.standard_normal((samples, inputs)) / math.sqrt(inputs)
        truth = rng.standard_normal((inputs, outputs)) * (rng.random((inputs, outputs)) < 0.3)
        signs = np.sign(self.X @ truth + 0.1 * rng.standard_normal((samples, outputs)))
        self.Y = signs if link == "tanh" else (signs + 1) / 2
        shape = (inputs,) if outputs == 1 else (inputs, outputs)
        default = L1Ball(delta, inputs) if outputs == 1 else TraceBall(delta, (inputs, outputs))
        self.oracle = default if oracle is None else oracle
        self.name = f"{link} regression {'x'.join(map(str, shape))}, {samples} samples"
        self._start = np.zeros(shape)
        self.beta = KAPPA[link] * float(np.linalg.norm(self.X, 2)) ** 2 / samples
        self.M = self.part(self._start, slice(None))[0]
        # per sample |grad|_F <= |x| |(h - y) h'|_2, and |(h - y) h'| <= 2 (tanh) or 1/4 (logistic) per output
        slope = (2.0 if link == "tanh" else 0.25) * math.sqrt(outputs)
        self.sigma = slope * math.sqrt(float(np.mean(np.sum(self.X**2, axis=1))))

    def part(self, W: np.ndarray, index: np.ndarray | slice) -> tuple[float, np.ndarray]:
        """Mean loss and gradient over the indexed samples."""
        X, Y = self.X[index], self.Y[index]
        z = X @ W.reshape(X.shape[1], -1)
        if self.link == "tanh":
            h = np.tanh(z)
            slope = 1 - h * h
        else:
            h = 0.5 * (1 + np.tanh(z / 2))
            slope = h * (1 - h)
        e = h - Y
        return float(np.sum(e * e)) / (2 * len(X)), (X.T @ (e * slope) / len(X)).reshape(W.shape)


class TwoLayer(FiniteSum):
    """A network ``W_2 tanh(W_1 x)`` with squared loss, each layer in a trace ball, like the product set of a chain.

    Inputs have norm at most 1. Let ``E = delta_1 delta_2 + max|y|`` bound the residual and ``k = sup|tanh''|``. The
    second derivative along a unit direction is at most ``delta_1^2 + delta_2^2 + E (1 + k delta_2) = beta``. Its
    first terms bound the square of the output's first derivative, the last one the residual times the second.

    Args:
        samples, inputs, hidden, outputs: sizes. delta: the two trace-norm radii. seed: of data and start.
    """

    def __init__(
        self,
        samples: int = 200,
        inputs: int = 8,
        hidden: int = 6,
        outputs: int = 3,
        delta: tuple[float, float] = (2.0, 2.0),
        seed: int = 0,
    ):
        self.samples = count("samples", samples, "the number of samples")
        first = TraceBall(delta[0], (hidden, inputs), method="svd")
        second = TraceBall(delta[1], (outputs, hidden), method="svd")
        self.sets = Product([first, second])
        self.oracle: Oracle = self.sets
        rng = generator(seed)
        X = rng.standard_normal((samples, inputs))
        self.X = X / np.linalg.norm(X, axis=1, keepdims=True)
        teacher = (
            rng.standard_normal((hidden, inputs)),
            rng.standard_normal((outputs, hidden)) / math.sqrt(hidden),
        )
        self.Y = np.tanh(self.X @ teacher[0].T) @ teacher[1].T
        self.name = f"two-layer network {inputs}-{hidden}-{outputs}, {samples} samples"
        begin = [0.3 * radius * self._unit(rng, part.shape) for radius, part in zip(delta, self.sets.parts)]
        self._start = np.concatenate([block.ravel() for block in begin])
        largest = delta[0] * delta[1] + float(np.linalg.norm(self.Y, axis=1).max())
        self.beta = delta[0] ** 2 + delta[1] ** 2 + largest * (1 + SUP_TANH2 * delta[1])
        self.M = self.part(self._start, slice(None))[0]
        # |grad_1| <= E delta_2, |grad_2| <= E delta_1 per sample
        self.sigma = largest * math.hypot(*delta)

    @staticmethod
    def _unit(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        W = rng.standard_normal(shape)
        return W / np.linalg.norm(W, "nuc")

    def part(self, W: np.ndarray, index: np.ndarray | slice) -> tuple[float, np.ndarray]:
        """Mean loss and gradient over the indexed samples, layers concatenated."""
        X, Y = self.X[index], self.Y[index]
        first, second = self.sets.split(W)
        h = np.tanh(X @ first.T)
        e = h @ second.T - Y
        back = (e @ second) * (1 - h * h)
        G = np.concatenate([(back.T @ X).ravel(), (e.T @ h).ravel()]) / len(X)
        return float(np.sum(e * e)) / (2 * len(X)), G
