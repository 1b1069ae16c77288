"""Theorem 4.1 of Chain of LoRA, tested on problems whose constants are known.

Start with `theory.frank_wolfe`, which is Algorithm 2; its parts are `theory.iterates`, `theory.step_sizes`,
`theory.gradient_estimators`, `theory.oracles` and `theory.problems`. `theory.theorem` has the bounds,
`theory.checks` audits a run, and ``python -m theory.fw_gap`` runs the whole suite. `theory.real_run` measures the
same gap on a real chain.
"""
