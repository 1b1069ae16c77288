"""Low-rank links on a model's layers: how they start, which layers carry them, and how they are tied and removed."""
