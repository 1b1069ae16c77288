"""Measure every architecture and write docs/models.md: ``python -m tests.breadth [name …]``."""

import logging
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.breadth import page


def measure(name: str) -> dict[str, str]:
    """The outcomes of one architecture, as they are stored."""
    import torch
    import transformers

    from tests.breadth.outcomes import Untried, outcomes

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    logging.getLogger("cola").propagate = False
    try:
        return {mode: page.short(outcome) for mode, outcome in outcomes(name).items()}
    except Untried as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        return dict.fromkeys(page.COLUMNS.values(), f"wrong: {type(error).__name__}: {str(error)[:200]}")


def main(names: list[str]) -> None:
    """Measure the named architectures, or all."""
    import peft
    import transformers

    from tests.breadth.tiny import architectures

    kinds = architectures()
    wanted = names or list(kinds)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        new = dict(zip(wanted, pool.map(measure, wanted), strict=True))
    old = page.load()["models"] if names else {}
    models = {n: {"kind": kind, **new[n]} if n in new else old[n] for n, kind in kinds.items() if n in new or n in old}
    found = {"transformers": transformers.__version__, "peft": peft.__version__, "models": models}
    page.save(found)
    page.PAGE.parent.mkdir(exist_ok=True)
    page.PAGE.write_text(page.render(found))
    for name, one in new.items():
        if any(value.startswith("wrong") for value in one.values()):
            print(name, one)


if __name__ == "__main__":
    main(sys.argv[1:])
