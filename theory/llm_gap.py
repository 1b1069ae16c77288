"""The Frank-Wolfe gap of a real fine-tuning run, link by link: the command ``python -m theory.llm_gap``.

`GapProbe` (real_run/probe.py) measures a chain, `Decomposition` (real_run/decomposition.py) splits its average gap
into three terms, real_run/dense.py measures it again by other means, and real_run/chains.py trains the chains.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from theory.command_line import Help, drawn, make_folder, require

if __name__ == "__main__":
    require("numpy", "scipy", "torch")  # before the modules that import them

import numpy as np

from theory.arguments import count, positive
from theory.checks import FAIL, PASS, VACUOUS, failures
from theory.real_run import chains, plots
from theory.real_run.balls import NAMES
from theory.real_run.decomposition import Decomposition, LayerGap, Probe
from theory.real_run.dense import recheck
from theory.real_run.probe import GapProbe
from theory.real_run.snapshots import Snapshots

__all__ = ["Decomposition", "GapProbe", "LayerGap", "Probe", "Snapshots", "main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m theory.llm_gap",
        description="Train a chain, and split the Frank-Wolfe gap of every link into its terms.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    out.add_argument(
        "--model", choices=("demo", "random"), default="demo", help="tiny OPT on prose, or a random network"
    )
    out.add_argument("--arm", help="arm of the study's control: its policy, rank and learning rate (default: cola-3)")
    out.add_argument("--epochs", type=int, default=3, metavar="N", help="passes over the training text")
    out.add_argument("--lr", type=float, metavar="RATE", help="peak learning rate (default: the arm's recorded one)")
    out.add_argument("--eta", type=float, metavar="STEP", help="step that scales a link to a vertex (default: 1/T)")
    out.add_argument(
        "--delta", type=float, metavar="D", help="radius of K per layer (default: the smallest that holds the run)"
    )
    out.add_argument("--rank", type=int, default=1, metavar="R", help="rank of the atoms of K; 1 is the trace ball")
    out.add_argument(
        "--ball", choices=NAMES, default="rank", help="K: by atoms of a rank, capped, or Muon's spectral ball"
    )
    out.add_argument("--probe-batches", type=int, default=4, metavar="N", help="microbatches of the fixed loss")
    out.add_argument("--sketch", type=int, default=32, metavar="K", help="columns of the gradient sketch")
    out.add_argument("--fresh", action="store_true", help="score on other batches: unbiased, but no interval")
    out.add_argument("--seed", type=int, default=0, metavar="N", help="of training, data and sketches")
    out.add_argument("--out", type=Path, default=Path("runs/llm_gap"), metavar="DIR", help="results and pictures")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if every check holds up to rounding, 1 if not, 2 for a bad argument."""
    options = parser().parse_args(arguments)
    try:
        count("--epochs", options.epochs, "passes over the training text")
        count("--probe-batches", options.probe_batches, "microbatches of the fixed loss")
        count("--rank", options.rank, "the rank of the atoms of K")
        count("--sketch", options.sketch, "columns of the gradient sketch")
        count("--seed", options.seed, "the seed of training, data and sketches", least=0)
        for name in ("lr", "eta", "delta"):
            if getattr(options, name) is not None:
                positive(f"--{name}", getattr(options, name), "a positive number, or leave it out")
        if options.model == "random" and options.arm is not None:
            raise ValueError("--arm names an arm of the demo: leave it out with --model random")
        make_folder(options.out)
        options.arm = "cola-3" if options.arm is None else options.arm
        run = chains.train(options)
        result = run.probe.decompose(eta=options.eta, delta=options.delta)
        checks = recheck(run.probe, result)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result.table())
    lines = [
        json.dumps({"kind": "link", "link": t, "loss": probe.loss, "layers": _layers_as_dict(probe)})
        for t, probe in sorted(run.probe.probes.items())
    ]
    chain = {"kind": "chain", "model": options.model, "seed": options.seed, **result.as_dict()}
    lines.append(json.dumps({**chain, "checks": [check.as_dict() for check in checks]}))
    (options.out / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"results: {options.out / 'results.jsonl'}")
    print(drawn(lambda: [plots.chain_gap(result, options.out / "chain_gap.png")]))
    # the identity is float64 arithmetic: a few units in the last place
    tolerance = 1e-12 * max(1.0, float(np.abs(result.loss).max()) / (result.eta * len(result.low)))
    if result.identity_error() > tolerance:
        print(f"FAIL the decomposition is off by {result.identity_error():.3g}, above rounding ({tolerance:.3g})")
        return 1
    for check in failures(checks):
        print(f"FAIL {check.name}: off by {check.measured:.3g}; {check.detail}")
    verdicts = ", ".join(f"{sum(c.verdict == v for c in checks)} {v}" for v in (PASS, FAIL, VACUOUS))
    print(f"measured again without hooks, by dense gradients and differences of the loss: {verdicts}")
    return 1 if failures(checks) else 0


def _layers_as_dict(probe: Probe) -> dict[str, dict[str, Any]]:
    """The layers for JSON, which has no infinity."""
    finite = {path: layer.residual if math.isfinite(layer.residual) else None for path, layer in probe.layers.items()}
    return {path: {**asdict(layer), "residual": finite[path]} for path, layer in probe.layers.items()}


if __name__ == "__main__":
    sys.exit(main())
