"""Recognises a framework's training loop that trains a chain without this library's integration for it."""

import logging
import sys

logger = logging.getLogger("cola")

#: by the first part of a loop's module: the framework, and its integration
_LOOPS = {
    "transformers.trainer": (
        "a transformers Trainer",
        "cola.integrations.transformers.attach(trainer, base, policy=policy)",
    ),
    "lightning.pytorch": ("Lightning", "the callback cola.integrations.lightning.ChainKnots()"),
    "pytorch_lightning": ("Lightning", "the callback cola.integrations.lightning.ChainKnots()"),
}


def warn_of_bare_framework() -> None:
    """Warn if a framework's loop is among the callers: it would end without `ChainOptimizer.finish`, in silence."""
    found = _loop()
    if found is not None:
        framework, integration = found
        logger.warning(
            "%s trains this chain without %s. So the policy is told no epochs, the framework's checkpoints have no "
            "chain of their own, and nothing ties the last link at the end: call opt.finish() after training and "
            "before the model is saved, or use the integration",
            framework,
            integration,
        )


def _loop() -> tuple[str, str] | None:
    frame = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        for prefix, found in _LOOPS.items():
            if module == prefix or module.startswith(f"{prefix}."):
                return found
        frame = frame.f_back  # type: ignore[assignment]
    return None
