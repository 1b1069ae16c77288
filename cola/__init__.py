"""Chain of LoRA (COLA): a high-rank update at one adapter's training memory, around any torch optimizer."""

from cola.chain.chain import Chain, Factor, KnotReport, LayerReport, Link
from cola.chain.files import StoreError
from cola.common.version import __version__
from cola.knot.learning_rate import restart, rewarm
from cola.knot.log import log_to
from cola.knot.tie import KnotError
from cola.lora.config import LinkConfig
from cola.lora.init import LinkStart
from cola.lora.kinds import register_kind
from cola.lora.layer import AdaptedLayer
from cola.optimizer import ChainOptimizer
from cola.policies import EpochKnots, EvenKnots, GapKnots, KnotPolicy, NeverKnots, PlateauKnots, Signal, StepKnots

__all__ = [
    "AdaptedLayer",
    "Chain",
    "ChainOptimizer",
    "EpochKnots",
    "EvenKnots",
    "Factor",
    "GapKnots",
    "KnotError",
    "KnotPolicy",
    "KnotReport",
    "LayerReport",
    "Link",
    "LinkConfig",
    "LinkStart",
    "NeverKnots",
    "PlateauKnots",
    "Signal",
    "StepKnots",
    "StoreError",
    "__version__",
    "log_to",
    "register_kind",
    "restart",
    "rewarm",
]
