"""DDP and FSDP2 over every kind of layer, against one process."""

import copy

import pytest
import torch
import torch.distributed as dist

from cola import ChainOptimizer, LinkConfig, StepKnots
from cola.lora.reading import ReadingLayer
from tests.integrations.test_distributed import CLOSE, deltas, require_equal, sharded, torchrun, trained_parameters
from tests.kinds import KINDS, Mixed
from tests.models import train


def chained(model, r=(4,), alpha=4):
    link = LinkConfig(r=r, lora_alpha=alpha, target_modules="all", dtype=torch.float32)
    return ChainOptimizer(torch.optim.AdamW, model, StepKnots(at=[2, 4, 6]), link=link, lr=0.02)


def one_process(r=(4,)):
    """What the group's processes must see."""
    model = Mixed()
    opt = chained(model, r)
    assert len(opt.live.layers) == 6
    parameters = trained_parameters(opt)
    losses = train(opt, model, 8)
    drawn = {path: [factor.A.tolist(), factor.B.tolist()] for path, factor in opt.live.snapshot().items()}
    opt.finish()
    return {
        "losses": losses, "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "drawn": drawn, "steps": [link.step for link in opt.chain], "links": [link.rank for link in opt.chain],
        "deltas": deltas(opt.chain), "base": opt.chain.base.to_json(), "parameters": parameters,
        "shares": [report.share for report in opt.reports],
    }  # fmt: skip


@pytest.mark.long
def test_two_processes_equal_one(tmp_path):
    """Ranks that step down, and a checkpoint of two processes that goes on in one."""
    runs = [
        (kind, tmp_path / f"{kind}-{r}", "--mixed", "--ranks", r, "--save", tmp_path / f"{kind}-{r}-saved")
        for kind in ("ddp", "fsdp2")
        for r in ("4", "4,2,1")
    ]
    torchrun(2, *runs)
    wanted = {"4": one_process(), "4,2,1": one_process((4, 2, 1))}
    for _, out, _, _, r, *_ in runs:
        require_equal(out, 2, wanted[r])
    resumed = {kind: tmp_path / f"{kind}-resumed" for kind in ("ddp", "fsdp2")}
    torchrun(1, *(
        (kind, out, "--mixed", "--ranks", "4,2,1", "--resume", tmp_path / f"{kind}-4,2,1-saved" / "3")
        for kind, out in resumed.items()
    ))  # fmt: skip
    for out in resumed.values():
        require_equal(out, 1, wanted["4,2,1"], start=3)


@pytest.fixture(scope="module")
def group():
    """A group of one process: sharded tensors without torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("r", [(2,), (2, 1)])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "conv2d channels last"])  # FSDP2 refuses it
def test_a_sharded_kind_equals_one_in_one_piece(group, name, r):
    kind = KINDS[name]
    plain = kind.model()
    model = copy.deepcopy(plain)
    models, losses = (model, plain), []
    opts = [chained(one, r) for one in models]
    sharded(model)
    for one, opt in zip(models, opts):
        losses.append([])
        for step in range(5):
            opt.zero_grad()
            loss = (one(kind.inputs(step)) - 1).square().mean()
            loss.backward()
            opt.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=CLOSE)
    opts[0].finish(), opts[1].finish()
    for (path, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.full_tensor(), theirs, atol=CLOSE, rtol=0), path
    assert not any(isinstance(m, ReadingLayer) for m in model.modules())
    model(kind.inputs()).square().sum().backward()  # a pass after the links are gone
    assert [path for path, _ in model.named_parameters()] == [path for path, _ in plain.named_parameters()]
