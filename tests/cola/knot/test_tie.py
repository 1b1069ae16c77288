"""W ← W + sBA: exact, in place, rounded once, and honest about what rounding lost."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cola.knot.tie import _selected, _tie_all, delta_norm, key, obstacle, residual_like, tie_, tolerance
from tests.reference import stochastic_neighbours

pytestmark = pytest.mark.numerics

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDINGS = ["nearest", "stochastic", "compensated"]


def case(m, n, r, seed, dtype=torch.float32, size=1.0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=g).to(dtype)
    return W, torch.randn(m, r, generator=g) * size, torch.randn(r, n, generator=g)


def tied(W, L, R, s, rounding, seed=0, residual=None):
    if rounding == "compensated" and residual is None:
        residual = residual_like(W)
    W = W.clone()
    return W, tie_(W, L, R, s, rounding=rounding, seed=seed, residual=residual), residual


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    m=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 6), s=st.floats(-3, 3), seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-4, 1e-2, 1.0]),
)  # fmt: skip
def test_the_stored_weight_is_the_float64_sum_within_one_rounding(dtype, rounding, m, n, r, s, seed, size):
    W, L, R = case(m, n, r, seed, dtype, size)
    new, tie, _ = tied(W, L, R, s, rounding, seed)
    exact = W.double() + s * L.double() @ R.double()
    info = torch.finfo(dtype)
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    # one rounding of the sum: half a unit to nearest, a whole one at random; the r products and their sum in the
    # compute dtype, of which (r + 2) roundings are relative to s|L||R|, and two of the sum's own (fp32 → half)
    unit = info.eps * (1.0 if rounding == "stochastic" else 0.5)
    products = abs(s) * L.double().abs() @ R.double().abs()
    bound = unit * exact.abs() * (1 + 2 * info.eps) + info.smallest_normal * info.eps
    bound = bound + compute.eps * ((r + 2) * products + 2 * (W.double().abs() + products))
    assert ((new.double() - exact).abs() <= bound).all()
    assert tie.deviation <= tolerance(W, tie, r)
    assert tie.delta == pytest.approx((s * L.double() @ R.double()).norm().item(), rel=1e-6, abs=1e-12)
    assert tie.weight == pytest.approx(new.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_reported_is_the_loss_that_happened(dtype, rounding):
    W, L, _ = case(40, 30, 1, seed=1, dtype=dtype, size=1e-3)
    new, tie, _ = tied(W, L, torch.ones(1, 30), 2.0, rounding)  # the update 2·L·1 is exact in every dtype
    update = (2.0 * L.double()).expand(-1, 30)
    # fsum adds three float64 numbers without rounding
    errors = [math.fsum(t) for t in zip(W.double().flatten(), update.flatten(), -new.double().flatten())]
    # half precision is summed in fp32 first, an error of 2⁻²⁴ of a weight beside one of 2⁻⁹ or 2⁻¹²
    assert tie.lost == pytest.approx(math.hypot(*errors), rel=1e-2 if dtype == torch.float16 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_lands_on_a_neighbour_with_the_right_frequency(dtype):
    """4000 draws of each of 400 sums: frequencies within 5 standard deviations of the slow twin's probabilities."""
    g = torch.Generator().manual_seed(3)
    W = torch.cat([torch.randn(200, generator=g), torch.randn(100, generator=g) * 1e-5, torch.zeros(100)])
    W = W.to(dtype)[:, None]
    L = torch.cat([torch.randn(200, generator=g) * 1e-3, torch.randn(200, generator=g) * 1e-6])[:, None]
    exact = (W.float() + L).double()  # the fp32 sum is what is rounded
    lower, upper, chance = stochastic_neighbours(exact, dtype)
    copies, R = 4000, torch.ones(1, 4000)
    wide = W.expand(-1, copies).contiguous()
    tie_(wide, L, R, 1.0, rounding="stochastic", seed=5)
    value = wide.double()
    assert ((value == lower) | (value == upper)).all()
    ups = (value == upper).double().mean(1, keepdim=True)
    # the draws have 13 or 16 bits: probabilities are met to 2⁻¹³
    deviation = torch.sqrt(chance * (1 - chance) / copies)
    decided = (upper == lower) | ((ups - chance).abs() <= 5 * deviation + 2.0**-13)
    assert decided.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_many_stochastic_ties_converges_to_the_exact_sum(dtype):
    W, L, R = case(6, 5, 2, seed=7, dtype=dtype, size=1e-3)
    update, runs = L.double() @ R.double(), 600
    exact = W.double() + update
    # the change of a stored weight is a multiple of its last place, so these differences are exact
    changes = [tied(W, L, R, 1.0, "stochastic", seed=i)[0].double() - W.double() for i in range(runs)]
    mean = torch.stack(changes).mean(0)
    # a stored value is within one unit of its target, so its standard deviation is at most half a unit
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    unit = torch.finfo(dtype).eps * exact.abs()
    # what the compute dtype does to the products, and to the sum where it is wider than the weight, is no noise
    bias = compute * 4 * (L.double().abs() @ R.double().abs())
    bias = bias + (0 if dtype in (torch.float32, torch.float64) else compute * exact.abs())
    assert ((mean - update).abs() <= 5 * 0.5 * unit / math.sqrt(runs) + bias).all()


def test_stochastic_roundings_of_one_tie_are_uncorrelated():
    """The variance of the number of values rounded up is the binomial one, though all rows draw on one table."""
    rows, columns, chance, runs = 8, 1 << 16, 0.25, 200
    L, R = torch.full((rows, 1), chance * 2.0**-7), torch.ones(1, columns)  # the neighbours of 1 are 2⁻⁷ apart in bf16
    counts = []
    for seed in range(runs):
        W = torch.ones(rows, columns, dtype=torch.bfloat16)
        tie_(W, L, R, 1.0, rounding="stochastic", seed=seed)
        counts.append((W > 1).sum().item())
    n = rows * columns
    variance = sum((count - n * chance) ** 2 for count in counts) / runs
    # χ² with 200 degrees of freedom has a relative deviation of √(2/200); equal rows would give 8 times n·p·q
    assert variance == pytest.approx(n * chance * (1 - chance), rel=5 * math.sqrt(2 / runs))
    assert abs(sum(counts) / runs - n * chance) <= 5 * math.sqrt(n * chance * (1 - chance) / runs)


def exact_case(m, n, r, dtype):
    """A weight and an update below its last place whose sums are exact in every order, and leave much to chance."""
    g = torch.Generator().manual_seed(4)
    W = torch.randint(-128, 128, (m, n), generator=g).to(dtype) / 64
    # the update is up to 128 units of 2⁻²⁰ for half precision, which fp32 adds exactly, 2⁻³⁰ for fp32, 2⁻⁶⁰ for fp64
    unit = {torch.float32: 2.0**-30, torch.float64: 2.0**-60}.get(dtype, 2.0**-20)
    L = torch.randint(-8, 9, (m, r), generator=g) * unit
    return W, L, torch.randint(-8, 9, (r, n), generator=g).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_threads_do_not_change_what_a_stochastic_tie_draws(dtype, monkeypatch):
    """The draws depend on the seed and the position alone; whatever kernel sums a block, these sums are exact."""
    W, L, R = exact_case(90, 1000, 2, dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for block in (1000, 7000, 1 << 16, 1 << 20):
            monkeypatch.setattr("cola.knot.tie._CPU_BLOCK", block)
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(tied(W, L, R, 1.0, "stochastic", seed=2)[0])
    finally:
        torch.set_num_threads(threads)
    assert (results[0] != W).any()
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_draws_what_it_would_draw_within_the_whole(dtype):
    W, L, R = exact_case(90, 1000, 2, dtype)
    whole = tied(W, L, R, 1.0, "stochastic", seed=2)[0]
    every = slice(0, 1000)
    for rows, columns in ((slice(0, 1), every), (slice(31, 90), every), (slice(7, 60), slice(3, 500))):
        part = W[rows, columns].clone()
        offset = (rows.start, columns.start)
        tie_(part, L[rows], R[:, columns], 1.0, rounding="stochastic", seed=2, part_of=(90, 1000), offset=offset)
        assert torch.equal(part, whole[rows, columns])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_blocks_and_threads_change_sums_by_rounding_at_most(dtype, monkeypatch):
    """A block of another height may take another kernel, which sums the r products in another order."""
    r = 5
    W, L, R = case(90, 1000, r, seed=4, dtype=dtype, size=1e-3)
    monkeypatch.setattr("cola.knot.tie._CPU_BLOCK", 1 << 20)
    one = tied(W, L, R, 1.0, "nearest")[0].double()
    monkeypatch.setattr("cola.knot.tie._CPU_BLOCK", 1000)
    two = tied(W, L, R, 1.0, "nearest")[0].double()
    # each of two sums of r products and a weight errs by (r + 1) roundings of fp32; the result by half a unit each
    fp32 = torch.finfo(torch.float32).eps
    products = L.double().abs() @ R.double().abs()
    bound = (r + 1) * fp32 * (products + W.double().abs())
    assert ((one - two).abs() <= bound + torch.finfo(dtype).eps * torch.maximum(one.abs(), two.abs())).all()


def test_the_stream_of_the_noise_is_that_of_the_format():
    """Spelt out anew from FORMAT.md; on the CPU, chains saved today must replay in every later version."""
    m, n, seed = 140, 1000, 11
    W, L, R = case(m, n, 1, seed=6, dtype=torch.bfloat16, size=1e-3)
    new, _, _ = tied(W, L, R, 1.0, "stochastic", seed=seed)
    g, h = torch.Generator().manual_seed(seed), (1 << 16) // n
    T = torch.randint(0, 1 << 16, (h, n), generator=g, dtype=torch.int32)
    c = torch.randint(0, 1 << 16, (m, 1), generator=g, dtype=torch.int32)
    u = T[torch.arange(m) % h] ^ c
    bits = (W.float() + L @ R).view(torch.int32)
    assert torch.equal(new.float().view(torch.int32), (bits + u) >> 16 << 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_norms_beyond_the_range_of_fp32_squares(dtype, size):
    W, L, R = case(30, 20, 2, seed=0, dtype=dtype)
    W *= size
    new, tie, _ = tied(W, L * 1e-2, R, size, "nearest")
    exact = W.double() + size * (L * 1e-2).double() @ R.double()
    assert tie.weight == pytest.approx(new.double().norm().item(), rel=1e-6)
    if dtype == torch.bfloat16:
        assert tie.lost == pytest.approx((new.double() - exact).norm().item(), rel=1e-3)
    assert 0 < tie.lost <= tolerance(W, tie, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compensated_ties_lose_nothing_over_a_hundred_links(dtype):
    W, _, _ = case(24, 20, 1, seed=0, dtype=dtype)
    start, residual, exact = W.clone(), residual_like(W), W.double().clone()
    for i in range(100):
        _, L, R = case(24, 20, 2, seed=i + 1, size=1e-4)
        tie_(W, L, R, 1.0, rounding="compensated", residual=residual)
        exact = exact + L.double() @ R.double()
    total = (exact - start.double()).norm()
    kept = (W.double() + residual.double() - exact).norm()
    assert kept <= 0.02 * total  # a residual is itself kept to 2⁻⁹ of a rounding of at most 2⁻⁹ W, a hundred times
    assert (W.double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm() + kept


def test_nearest_rounding_loses_small_updates_and_says_so():
    W, L, R = case(256, 256, 8, seed=0, dtype=torch.bfloat16)
    size = 1e-4 * W.float().norm() / (L @ R).norm()
    _, tie, _ = tied(W, L, R, size.item(), "nearest")
    assert tie.delta == pytest.approx(1e-4 * W.float().norm().item(), rel=1e-3)
    assert 0.9 < tie.lost / tie.delta < 1.0  # the reference measures a relative error of 0.98


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not():
    W, L, R = case(300, 300, 4, seed=0, dtype=torch.bfloat16, size=1e-3)
    one, two, other = (tied(W, L, R, 1.0, "stochastic", seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_transposed_weight_is_tied_through_its_view():
    W, L, R = case(10, 7, 3, seed=0)
    plain, stored = W.clone(), W.t().contiguous()
    tie_(plain, L, R, 1.5)
    tie_(stored, R.t(), L.t(), 1.5)
    assert torch.allclose(plain, stored.t(), rtol=0, atol=4 * 5 * torch.finfo(torch.float32).eps * 10)


class LargestResult(TorchDispatchMode):
    """Notes the largest tensor that any operation returns anew."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_temporary_of_the_weights_size(dtype, rounding):
    W, L, R = case(1024, 512, 4, seed=0, dtype=dtype)
    residual = residual_like(W) if rounding == "compensated" else None
    with LargestResult() as seen:
        tie_(W, L, R, 1.0, rounding=rounding, residual=residual)
        obstacle(W, L, R, 1.0)
    assert seen.largest <= (1 << 16) * torch.get_num_threads()  # one block; the weight is eight of them, or is one


def test_the_norm_of_an_update_needs_no_full_matrix():
    _, L, R = case(200, 100, 5, seed=2)
    assert delta_norm(L, R, -0.7) == pytest.approx((0.7 * L.double() @ R.double()).norm().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("weight", "size", "dtype", "expected"),
    [
        (60000.0, 1e4, torch.float16, "beyond 65504, the largest number of torch.float16"),
        (65504.0, 10.0, torch.float16, "beyond 65504"),  # nearest would round it down, but a draw could round it up
        (60000.0, 1e3, torch.float16, None),
        (60000.0, -1e4, torch.float16, None),
        (1.0, 1.0, torch.float16, None),
        (1.0, 1e38, torch.float32, None),
        (3e38, 1e38, torch.float32, "beyond 3.40282e"),
        (3e38, 1e38, torch.bfloat16, "the largest number of torch.bfloat16"),
        (1.0, 1e30, torch.bfloat16, None),
        (math.inf, 1.0, torch.float16, "has a weight with non-finite values"),
        (math.nan, 1.0, torch.float32, "has a weight with non-finite values"),
    ],
)
def test_overflow_is_seen_before_anything_is_written(weight, size, dtype, expected):
    W = torch.full((3, 4), weight).to(dtype)
    before = W.clone()
    L = torch.tensor([[size], [0.0], [0.0]])
    reason = obstacle(W, L, torch.ones(1, 4), 1.0)
    assert (reason is None) if expected is None else (expected in reason)
    assert torch.equal(W.nan_to_num(), before.nan_to_num())


def test_keys_are_stable_and_distinct():
    assert key(0, 1, "a") == key(0, 1, "a")
    assert key(0, 1, "a") == 0x449B38E55AAD6F31  # chains saved today must replay in every later version
    assert len({key(s, i, n) for s in range(5) for i in range(5) for n in "abc"}) == 75


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rounding": "up"}, r"rounding='up' is unknown: choose one of nearest, stochastic, compensated"),
        ({"rounding": "compensated"}, r"compensated ties need one"),
        ({"rounding": "nearest", "residual": torch.zeros(2, 2)}, r"residual=True"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tie_(torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(1, 2), 1.0, **kwargs)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_without_rows_is_tied_to_nothing(dtype, rounding):
    """Three rows over four processes: the last has none."""
    weight, residual = torch.zeros(0, 4, dtype=dtype), torch.zeros(0, 4, dtype=torch.bfloat16)
    tie = tie_(
        weight, torch.ones(0, 2), torch.ones(2, 4), 1.0,
        rounding=rounding, residual=residual if rounding == "compensated" else None, part_of=(3, 4), offset=(3, 0),
    )  # fmt: skip
    assert (tie.lost, tie.deviation, tie.weight) == (0, 0, 0)


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_tie_of_selected_columns_gives_the_bits_and_norms_of_a_tie_of_all(dtype, side):
    draw = torch.Generator().manual_seed(3)
    weight, left = torch.randn(60, 40, generator=draw).to(dtype), torch.randn(60, 5, generator=draw) / 50
    weight[:, :4] *= -0.0
    right = torch.eye(40)[[7, 39, 0, 8, 20]]
    if side == "rows":
        weight, left, right = weight.t().contiguous(), right.t(), left.t()
    one, other = weight.clone(), weight.clone()
    quick = tie_(one, left, right, 0.7)
    slow = _tie_all(other, left, right, 0.7, "nearest", 0, None, None, (0, 0))
    assert torch.equal(one, other)
    others = [i for i in range(40) if i not in (7, 39, 0, 8, 20)]
    kept, before = (one[others], weight[others]) if side == "rows" else (one[:, others], weight[:, others])
    assert torch.equal(kept.signbit(), before.signbit())  # of zeros too, where a sum's kernel may change it
    for name in ("delta", "lost", "deviation", "weight"):  # fp32 sums of at most 2400 squares
        assert getattr(quick, name) == pytest.approx(getattr(slow, name), rel=2400 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_norms_of_selected_columns_beyond_the_range_of_fp32_squares(size):
    weight = torch.full((8, 6), size)
    done = tie_(weight, torch.full((8, 2), size), torch.eye(6)[:2], 1.0)
    assert done.weight == pytest.approx(size * (16 * 4 + 32) ** 0.5, rel=1e-6)


def test_the_norm_of_a_large_weight_is_summed_in_the_blocks_of_a_tie_of_all():
    weight, left, right = torch.full((1500, 1500), 0.1), torch.zeros(1500, 2), torch.eye(1500)[:2]
    slow = _tie_all(weight.clone(), left, right, 1.0, "nearest", 0, None, None, (0, 0))
    assert tie_(weight, left, right, 1.0).weight == pytest.approx(slow.weight, rel=1e-12)


def test_only_different_unit_vectors_count_as_a_selection():
    selection = torch.eye(6)[[2, 0]]
    assert _selected(selection).tolist() == [2, 0]
    twice, longer, signed, empty = torch.eye(6)[[2, 2]], 2 * selection, -selection, torch.zeros(2, 6)
    assert [_selected(x) for x in (twice, longer, signed, empty, torch.eye(6), torch.zeros(0, 6))] == [None] * 6
