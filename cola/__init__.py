"""Chain of LoRA (COLA): a high-rank update at one adapter's training memory, around any torch optimizer."""

from cola.chain import Chain, Factor, KnotReport, LayerReport, Link
from cola.extend import LinkConfig
from cola.files import StoreError
from cola.knots import EpochKnots, EvenKnots, KnotPolicy, NeverKnots, PlateauKnots, Signal, StepKnots
from cola.optimizer import ChainOptimizer
from cola.schedule import restart, rewarm
from cola.tie import KnotError
from cola.version import __version__

__all__ = [
    "Chain",
    "ChainOptimizer",
    "EpochKnots",
    "EvenKnots",
    "Factor",
    "KnotError",
    "KnotPolicy",
    "KnotReport",
    "LayerReport",
    "Link",
    "LinkConfig",
    "NeverKnots",
    "PlateauKnots",
    "Signal",
    "StepKnots",
    "StoreError",
    "__version__",
    "restart",
    "rewarm",
]
