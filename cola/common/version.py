"""The library's version, where every module can read it."""

__version__ = "0.1.0"

#: the format of chains, checkpoints and state dicts; readers refuse any other
FORMAT = 5
