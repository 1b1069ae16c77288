"""Random generators and seeds of runs: a different one for every seed and stream."""

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


def run_seeds(seed: int, count: int, *names: str) -> list[int]:
    """Seeds of independent runs: others for every seed and every name, so that no two rungs share a draw.

    Args:
        seed: of the command, any whole number. count: how many runs. names: such as the ladder and its setting.

    Returns:
        Numbers below 2**53, which every reader of JSON keeps.

    >>> first, second, third = (set(run_seeds(*of)) for of in ((0, 8, "b 1"), (1, 8, "b 1"), (0, 8, "b 16")))
    >>> len(first | second | third)
    24
    """
    stream = [int.from_bytes(name.encode()) for name in names]
    return [int(generator(seed, *stream, i).integers(1 << 53)) for i in range(count)]
