"""What bitsandbytes' codes are, and what re-quantising keeps of a link."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cola import StepKnots
from cola.lora import quantized
from cola.lora.quantized_codes import codes_of
from tests.integrations.quantized_nets import (
    BODY,
    EACH,
    KINDS,
    LINK,
    chained,
    decoded,
    net,
    quiet,  # noqa: F401 (a fixture)
    same,
    train,
)

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional


@EACH
def test_decoding_is_bitsandbytes_own(kind):
    for name in BODY:
        module = getattr(net(kind), name)
        # int8's scale may be divided by 127 before or after it multiplies the code: one rounding of fp32 each
        tolerance = 2 * torch.finfo(torch.float32).eps if kind == "int8" else 0
        assert torch.allclose(codes_of(module).values(), decoded(module), rtol=tolerance, atol=0)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    blocksize=st.sampled_from([32, 64, 128]),
    block=st.sampled_from([1, 200, 1 << 18]),
    seed=st.integers(0, 5),
)
def test_encoding_in_blocks_is_bitsandbytes_own_in_one_piece(shape, quant_type, double, blocksize, block, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    module = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=quant_type, compress_statistics=double)
    module.weight.data, module.weight.blocksize = torch.zeros(shape), blocksize
    module, whole = module.to("cpu"), None
    codes = codes_of(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cola.lora.quantized_codes._BLOCK", block)
        found = codes.join([codes.encode(weight[rows]) for rows in codes.blocks()])
    whole, state = F.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type=quant_type)
    theirs = state.as_dict(packed=True)
    assert torch.equal(found["weight"].view(-1), whole.view(-1))
    assert all(torch.equal(found[f"weight.{name}"], value) for name, value in theirs.items())


@EACH
def test_requantised_codes_are_those_of_the_original_weight_and_all_links(kind):
    """In full and by bitsandbytes' own functions: the same codes, and the reported loss is what they miss."""
    model, reports = net(kind), []
    opt = chained(model, quantized="requantize")
    opt.on_knot(reports.append)
    train(opt, model, 9)
    base = net(kind)
    for name in BODY:
        module, original = getattr(model, name), getattr(base, name)
        # ΣΔ as the links are stacked, in fp32
        stacked = opt.live.originals[name]
        weight = torch.addmm(codes_of(original).values(), stacked.B, stacked.A)
        assert torch.allclose(stacked.B @ stacked.A, opt.chain.delta(name).float(), atol=1e-5)
        if kind == "int8":
            codes, scales, _ = F.int8_vectorwise_quant(weight.half())
            assert torch.equal(module.weight.data, codes)
            assert torch.equal(codes_of(module).stored()["SCB"], scales)
        else:
            state = original.weight.quant_state
            codes, new = F.quantize_4bit(
                weight, blocksize=64, compress_statistics=state.nested, quant_type=state.quant_type
            )
            assert torch.equal(module.weight.data.view(torch.uint8).view(-1), codes.view(-1))
            assert torch.equal(module.weight.quant_state.absmax, new.absmax)
        missed = (codes_of(module).values() - weight).norm().item()
        assert reports[-1].layers[name].lost_norm == pytest.approx(missed, rel=1e-5)
    assert reports[-1].lost_norm == pytest.approx(math.hypot(*(x.lost_norm for x in reports[-1].layers.values())))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_groups_error_is_at_most_half_a_step_of_its_codes(kind):
    """And so what a re-quantised chain has lost does not grow with the number of knots."""
    model, reports = net(kind), []
    # first links so large that they change the codes everywhere
    opt = chained(model, StepKnots(every=1), link=replace(LINK, init="gaussian"), quantized="requantize")
    opt.on_knot(reports.append)
    train(opt, model, 12)
    for report in reports:
        assert report.lost_norm < 2 * reports[0].lost_norm
    for name in BODY:
        state = getattr(model, name).weight.quant_state
        step = state.code.sort().values.diff().max().item() / 2
        limit = step * (state.absmax.square().sum() * 64).sqrt().item()
        assert reports[-1].layers[name].lost_norm <= limit


def test_a_link_that_adds_nothing_gives_the_same_codes():
    model, base = net("nf4"), net("nf4")
    opt = chained(model, quantized="requantize")
    opt.tie()
    opt.finish()
    assert same(model, base)


@pytest.mark.parametrize(
    ("kind", "share", "kept", "error"),
    [
        ("nf4", 1e-2, 0, 1.4),
        ("nf4", 0.3, 1, 0.3),
        ("fp4", 1e-2, 0, 1.4),
        ("int8", 1e-3, 0, 1.2),
        ("int8", 1e-2, 1, 0.4),
    ],
)
def test_codes_keep_all_of_a_large_update_and_nothing_of_a_small_one(kind, share, kept, error):
    """The table in docs/how-to/quantised.md; a mean over 256² weights, of which a tenth is slack."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = KINDS[kind](256, 256).to("cpu")
    before = codes_of(module).values()
    A, B = torch.randn(8, 256, generator=generator), torch.randn(256, 8, generator=generator)
    s = (share * before.norm() / (B @ A).norm()).item()
    (tie,) = quantized.tie(module, [(A, B, s)], quantized.OriginalWeight.of(module))
    moved, update = codes_of(module).values() - before, s * B @ A
    assert (moved * update).sum() / update.norm() ** 2 == pytest.approx(kept, abs=0.1)
    assert tie.lost / tie.delta == pytest.approx(error, abs=0.1)


def test_small_links_that_add_up_come_through_because_the_original_weight_is_where_it_starts():
    """Thirty links of 1 % of ‖W‖ in one direction: none is seen at first, and their sum is there in the end."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = KINDS["nf4"](256, 256).to("cpu")
    before, origin, kept = codes_of(module).values(), quantized.OriginalWeight.of(module), []
    A, B = torch.randn(8, 256, generator=generator), torch.randn(256, 8, generator=generator)
    s = (0.01 * before.norm() / (B @ A).norm()).item()
    for links in range(1, 31):
        quantized.tie(module, [(A, B, s)], origin)
        total = links * s * B @ A
        kept.append(((codes_of(module).values() - before) * total).sum() / total.norm() ** 2)
    assert kept[0] < 0.1
    assert kept[-1] == pytest.approx(1, abs=0.1)


class Largest(TorchDispatchMode):
    """The most elements of any floating-point tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_requantising_makes_no_matrix_of_the_weights_size(kind, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = KINDS[kind](256, 512).to("cpu")
    monkeypatch.setattr("cola.lora.quantized_codes._BLOCK", 1 << 12)
    pair = torch.randn(2, 256), torch.randn(512, 2), 0.1
    with Largest() as made:
        quantized.tie(module, [pair], quantized.OriginalWeight.of(module))
        assert quantized.obstacle(module, [pair], quantized.OriginalWeight.of(module)) is None
    # blocks of 16 rows; and the scales, one per 64 codes or per row
    assert 0 < made.elements <= 1 << 12
