"""What becomes of a chain on one architecture: it holds, or is refused with a reason, or something is wrong."""

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cola import ChainOptimizer, LinkConfig, StepKnots
from cola.lora.parameter import LinkedParameter
from cola.lora.reading import LinkedConvolution, LinkedEmbedding, LinkedReadLinear
from tests.breadth.inputs import inputs_for, output_of
from tests.breadth.tiny import tiny_config

MODES: dict[str, Any] = {"default": None, "all-linear": "all-linear", "all": "all"}
#: learning rates; small where links are on every convolution, because fifty of them would amplify each rounding
RATES = {"default": 1e-2, "all-linear": 1e-2, "all": 1e-3}
#: modes whose chains are exported as well
EXPORTED = ("default", "all-linear")
#: kinds of layers that have code of their own, in words, and how they are known
KINDS: dict[str, Callable[[Any], bool]] = {
    "fused experts": lambda x: isinstance(x, LinkedParameter) and not isinstance(x.place[0], nn.MultiheadAttention),
    "embeddings": lambda x: isinstance(x, LinkedEmbedding),
    "convolutions": lambda x: isinstance(x, LinkedConvolution),
    "nn.MultiheadAttention": lambda x: isinstance(x, LinkedParameter) and isinstance(x.place[0], nn.MultiheadAttention),
    "linear layers with a forward of their own": lambda x: (
        isinstance(x, LinkedReadLinear) and x.form(x) == "linear with own forward"
    ),
}
#: above this a model is not tiny, and its architecture is passed over
LARGEST = 6_000_000
HOLDS = "holds"


class Untried(Exception):
    """The architecture cannot be made tiny, or none of the known inputs is taken."""


def build(name: str) -> nn.Module:
    """A tiny model of the architecture; its weights follow from a fixed seed.

    Raises:
        Untried: it cannot be made tiny; the message says why.
    """
    kind = getattr(transformers, name)
    try:
        config = tiny_config(kind.config_class)
        if name.endswith("MaskedLM") and getattr(config, "is_decoder", False):
            config.is_decoder = False
        for one in (config, *(getattr(config, sub, None) for sub in getattr(config, "sub_configs", None) or {})):
            if hasattr(one, "use_cache"):
                one.use_cache = False
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(config).parameters())
    except Exception as error:
        raise Untried(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
    if size > LARGEST:
        raise Untried(f"{size:,} parameters are not tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return kind(config).float().eval()
        except Exception as error:
            raise Untried(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None


def outcomes(name: str) -> dict[str, str]:
    """Per mode, and per mode's export, what became of it: see `HOLDS`; a refusal begins with "refused: ".

    "kinds" has the names in `KINDS` of the layers that ``target_modules="all"`` reached.

    Raises:
        Untried: the architecture cannot be made tiny or fed.
    """
    base = build(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            inputs = inputs_for(base)
        except RuntimeError as error:
            raise Untried(str(error)) from None
    found = {}
    for mode, targets in MODES.items():
        found[mode], export, kinds = _chain(base, inputs, targets, RATES[mode], mode in EXPORTED)
        if mode in EXPORTED:
            found[f"{mode} export"] = export
        else:
            found["kinds"] = ", ".join(kinds)
    return found


def _chain(
    base: nn.Module, inputs: dict[str, Any], targets: Any, rate: float, exported: bool
) -> tuple[str, str, list[str]]:
    model, said = copy.deepcopy(base), _Said()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    logging.getLogger("cola").addHandler(said)
    try:
        try:
            opt = ChainOptimizer(
                torch.optim.AdamW, model, StepKnots(at=[2]), link=LinkConfig(r=2, target_modules=targets), lr=rate
            )
        except ValueError as error:
            return f"refused: {error}", "-", []
        kinds = [name for name, known in KINDS.items() if any(map(known, opt.live.layers.values()))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            _train(opt, model, inputs, 4)
        live = _evaluate(model, inputs)
        opt.finish()
        tied = _evaluate(model, inputs)
    finally:
        logging.getLogger("cola").removeHandler(said)
    assert live.shape == tied.shape
    assert _distance(live, tied) <= _limit(live), f"a knot moved the output by {_distance(live, tied):.2g}"
    assert list(model.state_dict()) == keys, "state-dict keys differ"
    assert [type(m) for m in model.modules()] == classes, "classes differ"
    moved = _distance(_evaluate(base, inputs), tied)
    if not moved > 4 * _limit(tied):
        assert said.warned, f"links changed the output by {moved:.2g}, and nothing was said"
    _require_saved(base, model)
    fresh = copy.deepcopy(base)
    opt.chain.apply(fresh)
    for (path, p), q in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(p, q), f"Chain.apply differs at {path}"
    return HOLDS, _export(base, inputs, opt, tied) if exported else "-", kinds


def _export(base: nn.Module, inputs: dict[str, Any], opt: ChainOptimizer, tied: Tensor) -> str:
    import peft

    with tempfile.TemporaryDirectory() as folder:
        try:
            opt.chain.to_peft(folder)
        except ValueError as error:
            return f"refused: {error}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
            except Exception as error:
                return f"wrong: PEFT cannot load it: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        off = _distance(_evaluate(loaded, inputs), tied)
        return HOLDS if off <= 1e-4 * max(1.0, tied.abs().max().item()) else f"wrong: off by {off:.2g}"


def _train(opt: ChainOptimizer, model: nn.Module, inputs: dict[str, Any], steps: int) -> None:
    model.train()
    if not output_of(model, inputs).requires_grad:  # as with gradient checkpointing: the inputs must ask for it
        model.enable_input_require_grads()
    for _ in range(steps):
        out = output_of(model, inputs)
        if not out.requires_grad:
            raise Untried("no gradient: the inputs do not reach the adapted layers")
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out.float() - target).square().mean().backward()
        opt.step()
        opt.zero_grad()
    model.eval()


def _evaluate(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return output_of(model, inputs).float().clone()


def _distance(a: Tensor, b: Tensor) -> float:
    finite = torch.isfinite(a) & torch.isfinite(b)
    return (a - b)[finite].abs().max().item() if finite.any() else 0.0


def _limit(out: Tensor) -> float:
    """fp32 rounds each of some thousand sums in a layer, which random signs leave at about their root."""
    finite = out[torch.isfinite(out)]
    return 2**10 * torch.finfo(torch.float32).eps * max(1.0, finite.abs().max().item() if finite.numel() else 1.0)


def _require_saved(base: nn.Module, model: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(base)
    again.load_state_dict(torch.load(file, weights_only=True))
    for (path, p), q in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), f"the saved state dict differs at {path}"


class _Said(logging.Handler):
    """Counts the library's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warned = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.warned += 1
