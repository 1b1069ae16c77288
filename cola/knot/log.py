"""Shows knots as they are tied: in an experiment tracker, or as lines of text."""

import contextlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from cola.common.distributed import writes
from cola.lora.link import KnotReport

Send = Callable[[dict[str, float], int], Any]


def log_to(writer: Any) -> Callable[[KnotReport], None]:
    """A listener for `ChainOptimizer.on_knot` that logs every knot, in a distributed run on process 0 alone.

    It logs ``knot/index``, ``knot/rank``, ``knot/delta_norm``, ``knot/share`` (the largest ``‖ΔW‖/‖W‖`` of a layer),
    ``knot/lost``, ``knot/loss`` and ``knot/seconds`` at the knot's optimizer step; see `KnotReport`. A loss or share
    that is not known is left out.

    Args:
        writer: TensorBoard's ``SummaryWriter``; ``mlflow``, the module; a Weights & Biases run, or ``wandb`` after
            ``wandb.init``; a logger of Lightning; or a function of (a dict of numbers, the step). Anything with one of
            the methods ``add_scalar(name, value, step)``, ``log_metrics(numbers, step=…)`` or
            ``log(numbers, step=…)`` will do. Weights & Biases drops numbers of a step before its last one, so log
            everything else by the optimizer's steps too.

    Raises:
        TypeError: ``writer`` is none of these.
        RuntimeError: it is ``wandb``, and there is no run yet.

    >>> from torch import nn, optim, ones
    >>> from cola import ChainOptimizer, LinkConfig, StepKnots
    >>> model, link = nn.Sequential(nn.Linear(2, 2)), LinkConfig(r=1, target_modules="all-linear")
    >>> opt = ChainOptimizer(optim.SGD, model, policy=StepKnots(every=1), link=link, lr=0.1)
    >>> seen = []
    >>> listener = opt.on_knot(log_to(lambda numbers, step: seen.append((step, numbers["knot/rank"]))))
    >>> model(ones(1, 2)).sum().backward()
    >>> opt.step()
    >>> seen
    [(1, 1)]
    """
    send = _sender(writer)

    def logged(report: KnotReport) -> None:
        if writes():
            numbers = {f"knot/{name}": value for name, value in report.to_dict().items() if value is not None}
            step = numbers.pop("knot/step")
            send(numbers, step)

    return logged


def show(report: KnotReport) -> None:
    """Print a knot as one line, in a distributed run on process 0 alone."""
    if writes():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a terminal may lack ‖ and Δ
        with contextlib.suppress(OSError, ValueError):  # a closed stdout must not end a run
            print(str(report).encode(encoding, "replace").decode(encoding), flush=True)


def _sender(writer: Any) -> Send:
    # methods are looked up at each knot, because wandb.log is another function after wandb.init
    if not isinstance(writer, type):
        if callable(getattr(writer, "add_scalar", None)):
            return lambda numbers, step: [writer.add_scalar(name, value, step) for name, value in numbers.items()]
        if _takes(getattr(writer, "log_metrics", None), {}, step=0):
            return lambda numbers, step: writer.log_metrics(numbers, step=step)
        if _takes(getattr(writer, "log", None), {}, step=0):
            if getattr(writer, "__name__", None) == "wandb" and getattr(writer, "run", None) is None:
                raise RuntimeError("log_to(writer=wandb): there is no run yet: call wandb.init() first")
            return lambda numbers, step: writer.log(numbers, step=step)
        if _takes(writer, {}, 0) and not isinstance(writer, nn.Module):
            return writer
    raise TypeError(
        f"log_to(writer={writer!r:.80}) needs an object with add_scalar (TensorBoard's SummaryWriter), log_metrics "
        "(mlflow) or log (a Weights & Biases run), or a function of (numbers, step)"
    )


def _takes(method: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether ``method`` takes these arguments; `math.log` and the ``log`` of a `logging.Logger` do not."""
    try:
        inspect.signature(method).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


__all__ = ["log_to", "show"]
