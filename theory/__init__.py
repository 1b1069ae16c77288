"""The theory test-bed: Theorem 4.1 of Chain of LoRA, checked so hard that it could fail.

Start at `theory.frank_wolfe` (Algorithm 2), `theory.checks` (what must hold of a run) and
``python -m theory.fw_gap``.
"""
