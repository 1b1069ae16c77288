"""The library's version, where every module can read it."""

__version__ = "0.1.0"

#: of everything that is written: chains, checkpoints and state dicts. Another version is refused.
FORMAT = 4
