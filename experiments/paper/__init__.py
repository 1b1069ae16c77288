"""The paper's tables and figures: one cell through transformers' `Trainer`, sweeps of them, the published numbers."""
