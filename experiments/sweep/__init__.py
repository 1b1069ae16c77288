"""Run many cells, each once: over processes and machines, resumable, with learning rates searched."""

from experiments.sweep.rate_search import Outcome, RateSearch, gather
from experiments.sweep.sweep import OUTCOME, SCRATCH, Shard, Sweep, SweepError

__all__ = ["OUTCOME", "SCRATCH", "Outcome", "RateSearch", "Shard", "Sweep", "SweepError", "gather"]
