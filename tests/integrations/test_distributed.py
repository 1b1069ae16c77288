"""DDP and FSDP2 under torchrun, on gloo: every run equals one process, and checkpoints move between sizes."""

import itertools
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cola import ChainOptimizer, GapKnots, KnotError, LinkConfig, NeverKnots, PlateauKnots, StepKnots
from cola.chain.fingerprint import Fingerprint
from cola.knot.tie import tie_
from tests.integrations.torchrun_chain import SELECTED, deltas, trained_parameters
from tests.kinds import KINDS
from tests.launch import launch, several
from tests.models import BODY, Net, loss_of, train

# fp32 sums in another order (per shard, then over the processes), carried through 8 steps; asked for by the design
CLOSE = 1e-6
PLATEAU = {"patience": 0, "window": 2, "threshold": 0.2}


def chained(model, policy, r=(4,), reset="state", **own):
    link = LinkConfig(r=r, lora_alpha=4, target_modules=BODY, **own)
    return ChainOptimizer(torch.optim.AdamW, model, policy, link=link, reset=reset, lr=0.02)


def one_process(policy, r=(4,), steps=8, **options):
    """What the group's processes must see."""
    model = Net()
    opt = chained(model, policy, r, **options)
    parameters = trained_parameters(opt)
    losses = train(opt, model, steps)
    drawn = {path: [factor.A.tolist(), factor.B.tolist()] for path, factor in opt.live.snapshot().items()}
    opt.finish()
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    return {
        "losses": losses, "weights": weights, "drawn": drawn, "steps": [link.step for link in opt.chain],
        "links": [link.rank for link in opt.chain], "deltas": deltas(opt.chain),
        "base": opt.chain.base.to_json(), "parameters": parameters, "shares": [report.share for report in opt.reports],
    }  # fmt: skip


def torchrun(n, *runs, check=True):
    launch("tests.integrations.torchrun_chain", *several(runs), processes=n, check=check)


def require_equal(directory, n, wanted, start=0):
    for rank in range(n):
        seen = json.loads((directory / f"{rank}.json").read_text())
        assert seen["links"][-1] == wanted["links"][-1]
        assert seen["steps"] == wanted["steps"][-len(seen["steps"]) :]
        if not start:  # every process knows the whole base, of which it holds a part
            assert seen["shares"] == pytest.approx(wanted["shares"], rel=1e-4)  # of weights and links as CLOSE as below
            assert seen["parameters"] == wanted["parameters"]
            assert seen["told"] == (len(wanted["steps"]) if rank == 0 else 0)  # by log_to, on process 0 alone
            assert Fingerprint.from_json(seen["base"]) == Fingerprint.from_json(wanted["base"])
        assert seen["losses"] == pytest.approx(wanted["losses"][start:], abs=CLOSE)
        assert seen["weights"].keys() == wanted["weights"].keys()
        for name, value in wanted["weights"].items():
            assert torch.allclose(torch.tensor(seen["weights"][name]), torch.tensor(value), atol=CLOSE, rtol=0)
        for path, pair in wanted["drawn"].items():
            for ours, theirs in zip(pair, seen["drawn"][path]):
                assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=CLOSE, rtol=0)


@pytest.mark.long
def test_whole_runs_equal_one_process(tmp_path):
    """Three knots; a plateau that the processes see in different losses; masked ranks; B alone, tied by gain.

    Two processes; the tests below go on in four.
    """
    runs = [
        (kind, tmp_path / f"{kind}-{name}", *options)
        for kind in ("ddp", "fsdp2")
        for name, options in {
            "plain": (), "plateau": ("--plateau",), "ranks": ("--ranks", "4,2,1"), "selected": ("--selected",)
        }.items()
    ]  # fmt: skip
    torchrun(2, *runs)
    at = StepKnots(at=[2, 4, 6])
    wanted = {
        "plain": one_process(at), "plateau": one_process(PlateauKnots(**PLATEAU)), "ranks": one_process(at, (4, 2, 1)),
        "selected": one_process(GapKnots(share=0.9, window=2), reset="transport", **SELECTED),
    }  # fmt: skip
    assert len(wanted["plateau"]["steps"]) > 1
    assert len(wanted["selected"]["steps"]) > 1
    for kind in ("ddp", "fsdp2"):
        for name, expected in wanted.items():
            require_equal(tmp_path / f"{kind}-{name}", 2, expected)


@pytest.mark.long
def test_checkpoints_of_two_processes_go_on_in_one_and_in_four(tmp_path):
    """Taken in the middle of a link and right after a knot, where there is no optimizer state."""
    plans = {"ddp": (), "fsdp2": (), "masked": ("--ranks", "4,2,1")}
    kinds = {"ddp": "ddp", "fsdp2": "fsdp2", "masked": "ddp"}
    saved = {name: tmp_path / f"{name}-saved" for name in plans}
    torchrun(
        2, *((kinds[name], tmp_path / name, "--save", saved[name], "--steps", 4, *plan) for name, plan in plans.items())
    )
    at = StepKnots(at=[2, 4, 6])
    wanted = {"ddp": one_process(at), "fsdp2": one_process(at), "masked": one_process(at, (4, 2, 1))}
    for n in (1, 4):
        resumed = {(name, step): tmp_path / f"{name}-{n}-{step}" for name in plans for step in (3, 4)}
        torchrun(
            n,
            *(
                (kinds[name], out, "--resume", saved[name] / str(step), *plans[name])
                for (name, step), out in resumed.items()
            ),
        )
        for (name, step), out in resumed.items():
            require_equal(out, n, wanted[name], start=step)


@pytest.mark.long
def test_links_go_with_a_sharded_checkpoint_from_two_processes_to_one_and_to_four(tmp_path):
    """The optimizer's state drops them there, nested or flattened: the chain is saved as an entry of its own."""

    def run(n, step=None, source=None):
        runs = []
        for form in ("nested", "flat"):
            saved = () if source is None else ("--resume", tmp_path / f"{form}-{source}" / str(step))
            directory = tmp_path / f"{form}-{n}"
            runs.append(("fsdp2", directory / "out", "--dcp", form, "--save", directory, "--ranks", "4,2,1", *saved))
        torchrun(n, *runs)

    run(2)
    run(1, step=3, source=2)  # in the middle of a link
    run(4, step=4, source=1)  # right after a knot
    wanted = one_process(StepKnots(at=[2, 4, 6]), (4, 2, 1))
    for n, start in ((2, 0), (1, 3), (4, 4)):
        for form in ("nested", "flat"):
            out = tmp_path / f"{form}-{n}" / "out"
            require_equal(out, n, wanted, start)
            for rank in range(n):
                seen = json.loads((out / f"{rank}.json").read_text())
                assert seen["missing"] == 0
                for layer, delta in wanted["deltas"].items():
                    assert torch.allclose(torch.tensor(seen["deltas"][layer]), torch.tensor(delta), atol=CLOSE, rtol=0)


@pytest.mark.long
def test_a_process_that_dies_leaves_a_checkpoint_that_goes_on(tmp_path):
    torchrun(2, ("fsdp2", tmp_path / "dead", "--save", tmp_path / "saved", "--die-at", 5), check=False)
    assert not (tmp_path / "dead").exists()
    torchrun(2, ("fsdp2", tmp_path / "alive", "--resume", tmp_path / "saved" / "4"))
    require_equal(tmp_path / "alive", 2, one_process(StepKnots(at=[2, 4, 6])), start=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cuts", [(0, 7, 512), (0, 200, 201, 512)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_is_rounded_as_within_the_whole(dtype, cuts, dim):
    """512 rows of 400: two blocks with noise of their own, cut by the shards."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(512, 400, generator=generator).to(dtype)
    L, R = torch.randn(512, 2, generator=generator) * 1e-3, torch.randn(2, 400, generator=generator)
    whole = W.clone()
    tie_(whole, L, R, 1.0, rounding="stochastic", seed=3)
    cuts = [min(cut, W.shape[dim]) for cut in cuts]
    for start, stop in itertools.pairwise(cuts):
        part = W.narrow(dim, start, stop - start).clone()
        rows, columns = (slice(start, stop), slice(None)) if dim == 0 else (slice(None), slice(start, stop))
        offset = (start, 0) if dim == 0 else (0, start)
        tie_(part, L[rows], R[:, columns], 1.0, rounding="stochastic", seed=3, part_of=(512, 400), offset=offset)
        # the products of length 2 may be summed in another order: that moves a value by its rounding at most
        assert (part != whole[rows, columns]).float().mean() < 1e-3


@pytest.fixture
def group():
    """A group of one process: sharded tensors without torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Adagrad])
def test_fsdp2_over_a_chain_follows_the_new_parameters(group, base):
    model, plain = Net(), Net()
    link = LinkConfig(r=(4, 2), lora_alpha=4, target_modules=BODY)
    opt, other = (ChainOptimizer(base, m, StepKnots(every=2), link=link, lr=0.02) for m in (model, plain))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    sharded(model)
    assert trained_parameters(opt) == trained_parameters(other)
    # the second link is masked on one side and resized on the other: fp32 sums in another order
    assert train(opt, model, 5) == pytest.approx(train(other, plain, 5), abs=CLOSE)
    assert scheduler.get_last_lr() == [0.02]
    opt.finish(), other.finish()
    assert [report.share for report in opt.reports] == pytest.approx([r.share for r in other.reports], rel=1e-4)
    weights = [p.full_tensor().clone() for p in model.parameters()]
    assert all(torch.allclose(p, q, atol=CLOSE) for p, q in zip(weights, plain.parameters()))
    loss_of(model, 0).backward()  # a pass after the links are gone
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_fsdp2_after_a_pass_in_evaluation(group):
    """The outermost module keeps its whole parameters then."""
    model = Net()
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=2, target_modules=BODY), lr=0.02)
    sharded(model)
    train(opt, model, 3)
    with torch.no_grad():
        before = loss_of(model, 0)
        with pytest.raises(RuntimeError, match="this one is sharded"):
            opt.merged().__enter__()
        loss_of(model, 0)
        opt.finish()
        assert torch.isclose(loss_of(model, 0), before, atol=CLOSE)


@pytest.mark.parametrize("kind", ["experts one by one", "experts grouped", "embedding", "shared embedding", "conv2d"])
def test_fsdp2_over_links_on_weights_that_are_read(group, kind):
    runs = []
    for shard in (sharded, lambda model: model):
        model = KINDS[kind].model()
        link = LinkConfig(r=2, target_modules="all")
        opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=2), link=link, lr=0.02)
        shard(model)
        for step in range(3):
            (model(KINDS[kind].inputs(step)) - 1).square().mean().backward()
            opt.step()
            opt.zero_grad()
        opt.finish()
        runs.append([getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()])
    assert all(torch.allclose(p, q, atol=CLOSE) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("cast", [False, True])
def test_fp32_factors_on_half_precision_weights_may_share_a_group(group, cast):
    """Older versions of torch want one dtype in a group that FSDP2 gathers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, plain = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    link = LinkConfig(r=4, lora_alpha=4, target_modules=BODY)
    opt, other = (ChainOptimizer(torch.optim.SGD, m, StepKnots(every=2), link=link, lr=0.02) for m in (model, plain))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if cast else MixedPrecisionPolicy()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    losses = train(opt, model, 5, dtype=torch.bfloat16)
    # cast, the factors are rounded to bf16 (eps 2⁻⁸) in the pass; three layers
    assert losses == pytest.approx(train(other, plain, 5, dtype=torch.bfloat16), rel=6 * 2**-8 if cast else CLOSE)
    opt.finish()
    assert [link.step for link in opt.chain] == [2, 4, 5]
    assert {factor.A.dtype for entry in opt.chain for factor in entry.factors.values()} == {torch.float32}
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_what_would_miss_or_undo_a_knot_is_refused(group):
    with pytest.raises(ValueError, match=r"make the ChainOptimizer, then DDP\(model\)"):
        chained(nn.parallel.DistributedDataParallel(Net()), NeverKnots())
    with pytest.raises(ValueError, match=r"sharded already.* then fully_shard\(model\)"):
        chained(sharded(Net()), NeverKnots())
    model = Net()
    model.first.weight.ds_id = 0  # what ZeRO-3 leaves on every parameter
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO keeps its own flat copy .* use DDP, or FSDP2"):
        chained(model, NeverKnots())


def test_fsdp1_is_refused(group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.raises(ValueError, match=r"FSDP1 flattens its parameters: use FSDP2"):
        chained(FullyShardedDataParallel(Net(), device_id=torch.device("cpu")), NeverKnots())


def test_zero_1_and_2_are_noticed_by_their_flat_partition():
    """They put one flat fp32 tensor into the groups and copy it over the model's parameters after each step."""
    model = Net()
    opt = chained(model, NeverKnots())
    train(opt, model, 1)
    flat = torch.cat([p.detach().flatten() for p in opt.param_groups[0]["params"]])
    opt.param_groups[0]["params"] = [nn.Parameter(flat)]
    with pytest.raises(KnotError, match=r"DeepSpeed ZeRO does: use DDP or FSDP2"):
        opt.tie()


def test_compensated_rounding_of_shards_is_refused_before_anything_changes(group):
    model = Net()
    link = LinkConfig(r=2, target_modules=BODY)
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, rounding="compensated", lr=0.1)
    sharded(model)
    train(opt, model, 1)
    with pytest.raises(ValueError, match="use 'stochastic'"):
        opt.tie()
    train(opt, model, 1)
