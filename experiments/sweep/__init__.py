"""Run many cells, each once: over processes or a cluster, resumable, with learning rates searched."""

from experiments.sweep.cluster import Cluster, requested
from experiments.sweep.engines import SCRATCH, SweepError
from experiments.sweep.rate_search import Outcome, RateSearch, gather
from experiments.sweep.sweep import OUTCOME, Sweep

__all__ = ["OUTCOME", "SCRATCH", "Cluster", "Outcome", "RateSearch", "Sweep", "SweepError", "gather", "requested"]
