"""A tie as a multiple of ``W.add_``, and its memory, compared with PEFT's and loralib's merges.

Only this benchmark and `compiled` use more than the public interface, which ties only together with a knot's checks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from cola.knot.tie import residual_like, tie_
from experiments.bench.measure import Row, Settings, Spread, Work, medians, peak_bytes, race, ratio

RANK = 8
SHAPES = ("4096x4096", "11008x4096")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {
    ("fp32", "nearest"): 3.0,
    ("bf16", "nearest"): 2.9,
    ("bf16", "stochastic"): 3.5,
    ("bf16", "compensated"): 3.5,
}
BETWEEN = {
    ("fp32", "nearest"): "7 passes over blocks in cache: product, sum, two for the remainder, two norms, store",
    ("bf16", "nearest"): "7 passes over fp32 blocks in cache: widen, product, round, widen, difference, two norms",
    ("bf16", "stochastic"): "9 passes over fp32 blocks in cache: as nearest, with noise, its sum and a mask",
    ("bf16", "compensated"): "13 passes over fp32 blocks in cache, and a residual that is read and written as well",
}
ON_A_GPU = "64 blocks, with 7 to 13 kernels each, one after another"


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    for dtype in DTYPES:
        for shape in SHAPES:
            name = f"tie/{dtype}/{shape}"
            yield name, partial(rows, name, dtype, shape)


def rows(name: str, dtype: str, shape: str, settings: Settings) -> Iterator[Row]:
    """Time and memory per rounding."""
    m, n = (96, 64) if settings.smoke else map(int, shape.split("x"))
    g = settings.generator()
    place = partial(torch.Tensor.to, device=settings.device)
    weight = place(torch.randn(m, n, generator=g).to(DTYPES[dtype]))
    other = place((torch.randn(m, n, generator=g) * 1e-6).to(DTYPES[dtype]))
    left, right = place(torch.randn(m, RANK, generator=g) * 1e-3), place(torch.randn(RANK, n, generator=g))
    residual = residual_like(weight, weight.device)
    work: dict[str, Work] = {"add_": lambda: weight.add_(other)}
    if settings.gpu:  # W read and written once, the bound of bandwidth
        work["copy"] = lambda: weight.copy_(other)
        if dtype == "bf16":  # where residuals are kept by default
            far = residual_like(weight)
            work["compensated_on_cpu"] = partial(tie_, weight, left, right, 1e-3, rounding="compensated", residual=far)
    roundings = [rounding for kind, rounding in TARGETS if kind == dtype]
    for rounding in roundings:
        kept = residual if rounding == "compensated" else None
        work[rounding] = partial(tie_, weight, left, right, 1e-3, rounding=rounding, seed=settings.seed, residual=kept)
    exact = {rounding: is_right(weight, left, right, rounding, settings.seed) for rounding in roundings}
    merges = peers(m, n, DTYPES[dtype], left, right)
    times = race({**work, **merges}, settings)
    memory = {key: peak_bytes(work[key], settings.device) / weight.nbytes for key in roundings}
    details = medians(times) | {f"{key}_to_add": ratio(times, key, "add_").median for key in merges}
    if "peft_merge" in merges:
        details["peft_merge_extra"] = peak_bytes(merges["peft_merge"], settings.device) / weight.nbytes
    for rounding in roundings:
        if settings.gpu:
            yield Row(
                f"{name}/{rounding}/copy", f"tie, {dtype} {m}×{n}, {rounding}: time to a copy of W",
                ratio(times, rounding, "copy"), limit=2.0 if rounding == "compensated" else 1.0,
                limited_by="bandwidth: W (and a residual) read and written once", right=exact[rounding],
            )  # fmt: skip
        yield Row(
            f"{name}/{rounding}", f"tie, {dtype} {m}×{n}, {rounding}: time to W.add_", ratio(times, rounding, "add_"),
            None if settings.gpu else TARGETS[dtype, rounding], limit=4 / 3 if rounding == "compensated" else 2 / 3,
            limited_by="bandwidth: W (and a residual) read and written once, where add_ moves three arrays",
            between=ON_A_GPU if settings.gpu else BETWEEN[dtype, rounding], right=exact[rounding], details=details,
        )  # fmt: skip
        yield Row(
            f"{name}/{rounding}/memory", f"tie, {dtype} {m}×{n}, {rounding}: extra memory, in W's own bytes",
            Spread.of([memory[rounding]]), 0.05, limit=0.0, limited_by="nothing needs to be kept",
            between="three fp32 buffers of a block" + ("; the table of noise" if rounding == "stochastic" else ""),
        )  # fmt: skip


def is_right(weight: Tensor, left: Tensor, right: Tensor, rounding: str, seed: int) -> bool:
    """Whether a tie of some rows is the float64 sum within one rounding, and reports its error."""
    part, left = weight[:64].clone(), left[:64]
    kept = residual_like(part, part.device) if rounding == "compensated" else None
    exact = part.double() + 1e-3 * left.double() @ right.double()
    tie = tie_(part, left, right, 1e-3, rounding=rounding, seed=seed, residual=kept)
    error = part.double() - exact
    # half a unit in the last place (a whole one if stochastic), and the rounding of the products and of the sum
    products = 1e-3 * left.double().abs() @ right.double().abs()
    slack = torch.finfo(torch.float32).eps * ((RANK + 2) * products + exact.abs())
    unit = torch.finfo(weight.dtype).eps * (1.0 if rounding == "stochastic" else 0.5)
    near = bool((error.abs() <= unit * exact.abs() + slack).all())
    return near and abs(tie.deviation - error.norm().item()) <= slack.norm().item()


def peers(m: int, n: int, dtype: torch.dtype, left: Tensor, right: Tensor) -> dict[str, Work]:
    """PEFT's and loralib's merge, each reset so that it can be repeated."""
    import peft

    model = nn.Sequential(OrderedDict(proj=nn.Linear(n, m, bias=False, dtype=dtype, device=left.device)))
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["proj"])
    layer = peft.inject_adapter_in_model(config, model).proj
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(right)
        layer.lora_B["default"].weight.copy_(left * 1e-3)

    def merge() -> None:
        layer.merge()
        layer.merged_adapters.clear()  # so that the next call merges again: the weights drift, the time does not

    found: dict[str, Work] = {"peft_merge": merge}
    try:
        import loralib
    except ImportError:
        return found
    theirs = loralib.Linear(n, m, r=RANK, lora_alpha=16, bias=False).to(left.device, dtype)

    def merge_loralib() -> None:
        theirs.merged = False
        theirs.train(False)

    found["loralib_merge"] = merge_loralib
    return found
