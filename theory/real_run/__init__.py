"""The Frank-Wolfe gap of a real fine-tuning run: the only part of this package that uses `cola`."""
