"""A `torch.optim.Optimizer` around another one: the parts of `ChainOptimizer` that need no chain."""
