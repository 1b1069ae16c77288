"""The product of several sets: one for each layer of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from theory.iterates import Gradient, Point, as_array
from theory.oracles.oracle import Answer, Oracle


class Product(Oracle):
    """``K_1 x ... x K_L``, one set per layer of a network; a point is one vector of all layers' weights.

    The oracle calls each layer's oracle. ``D^2``, ``R^2`` and the gap are sums over the layers.

    Args:
        parts: the sets of the layers, in the order of their weights in the vector.
    """

    def __init__(self, parts: Sequence[Oracle]):
        self.parts = tuple(parts)
        if not self.parts:
            raise ValueError("parts must hold at least one set, got none: give one per layer")
        sizes = [math.prod(part.shape) for part in self.parts]
        self.shape = (sum(sizes),)
        ends = np.cumsum(sizes)
        self.slices = [slice(int(end) - size, int(end)) for size, end in zip(sizes, ends)]
        self.diameter = math.sqrt(sum(part.diameter**2 for part in self.parts))
        self.circumradius = math.sqrt(sum(part.circumradius**2 for part in self.parts))
        self.exact = all(part.exact for part in self.parts)
        centres = [np.zeros(part.shape) if part.centre is None else part.centre for part in self.parts]
        self.centre = np.concatenate([centre.ravel() for centre in centres])

    def split(self, W: np.ndarray) -> list[np.ndarray]:
        """Views of the layers in a vector of all weights, each in its shape."""
        return [W[cut].reshape(part.shape) for cut, part in zip(self.slices, self.parts)]

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """One answer per layer; supports add up."""
        answers = [part(block, at=at, rng=rng) for part, block in zip(self.parts, self.split(as_array(G)))]
        V = np.concatenate([np.ravel(as_array(a.vertex)) for a in answers])
        return Answer(V, sum(a.attained for a in answers), sum(a.certified for a in answers))

    def support(self, G: np.ndarray) -> float:
        """The sum of the layers' supports."""
        return sum(part.support(block) for part, block in zip(self.parts, self.split(G)))

    def gauge(self, W: np.ndarray) -> float:
        """The largest of the layers' gauges."""
        return max(part.gauge(block) for part, block in zip(self.parts, self.split(W)))

    def start(self) -> np.ndarray:
        """The layers' starts."""
        return np.concatenate([part.start().ravel() for part in self.parts])
