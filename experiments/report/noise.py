"""Messages of libraries that say nothing to a user."""

from __future__ import annotations

import logging

_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit",  # an optional kernel that nothing here calls
    "DeepSpeed": "Setting accelerator to CPU",  # Accelerate imports it where it is installed
    "transformers.trainer_utils": "mtime may not be reliable",
    "transformers.trainer": "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",  # tied
}
"""Logger -> the start of a message that says nothing to a user, and would break the bar in every process."""


def without_noise() -> None:
    """Leave these messages out, in this process; other warnings are shown."""
    for name in _NOISE:
        logger = logging.getLogger(name)
        if _says_something not in logger.filters:
            logger.addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE[record.name])
