"""Random generators: a different one for every seed and stream."""

from __future__ import annotations

from numbers import Integral

import numpy as np

# the spawn key of negative seeds, which NumPy's SeedSequence refuses
_NEGATIVE = 1 << 31


def generator(seed: int, *stream: int) -> np.random.Generator:
    """The generator of a seed, or of one of its streams.

    Args:
        seed: any whole number, negative or of any size. stream: numbers of at least 0 that name the stream.

    Returns:
        A different generator for every argument. For seeds of at least 0 it is NumPy's
        ``default_rng(seed)`` or ``default_rng([seed, *stream])``.

    Raises:
        ValueError: the seed is not a whole number.

    >>> generator(-3).random() == generator(3).random()
    False
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise ValueError(f"seed must be a whole number, got {seed!r}: give an int")
    size = abs(int(seed))
    entropy = [size, *stream] if stream else size
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(_NEGATIVE,) if seed < 0 else ()))
