"""A `torch.optim.Optimizer` around another one, without any knowledge of chains."""
