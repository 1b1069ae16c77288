"""transformers' Trainer and Accelerate in several processes, by DDP and FSDP2: what they train equals one process."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from cola import Chain
from tests.launch import launch, several
from tests.models import tiny_opt

pytestmark = pytest.mark.long

# fp32 sums in another order (over the processes' shares of a batch), carried through 8 steps; asked for by the design
CLOSE = 1e-6
SHARDED = ("--fsdp", json.dumps({"state_dict_type": "SHARDED_STATE_DICT"}))


def train(n, *runs):
    launch("tests.integrations.torchrun_frameworks", *several(runs), processes=n if n > 1 else 0)


def seen_in(directory, n=1):
    return [json.loads((directory / f"seen-{rank}.json").read_text()) for rank in range(n)]


def require_equal(directory, n, one, kind):
    """All processes saw what the one did, and trained ``kind`` of parameters."""
    (wanted,) = seen_in(one)
    for rank, seen in enumerate(seen_in(directory, n)):
        assert seen["kind"] == kind
        assert (seen["steps"], seen["ranks"], seen["missing"]) == (wanted["steps"], wanted["ranks"], 0)
        assert seen["losses"] == pytest.approx(wanted["losses"][-len(seen["losses"]) :], abs=CLOSE)
        assert seen.get("lr") == wanted.get("lr")
        if rank == 0 or kind == "Parameter":  # whole weights of shards are on process 0 alone
            assert seen["weights"].keys() == wanted["weights"].keys()
            for name, value in wanted["weights"].items():
                assert torch.allclose(torch.tensor(seen["weights"][name]), torch.tensor(value), atol=CLOSE, rtol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs in one process."""
    directory = tmp_path_factory.mktemp("alone")
    ranks = ("--ranks", "4,2,1")
    train(
        1,
        ("trainer-ddp", directory / "trainer", *ranks),
        ("trainer-ddp", directory / "trainer-plateau", "--plateau"),
        ("trainer-ddp", directory / "trainer-best", "--best"),
        ("accelerate-ddp", directory / "accelerate", *ranks),
        ("accelerate-ddp", directory / "accelerate-plateau", "--plateau"),
    )
    (plain,), (plateau,) = seen_in(directory / "trainer"), seen_in(directory / "trainer-plateau")
    assert plain["steps"] == [2, 4, 6, 8]
    assert plain["ranks"] == [4, 2, 1, 1]
    assert plateau["steps"] not in ([8], plain["steps"])  # the plateau has decided something
    return directory


def require_a_whole_model(out, links):
    """`save_model` wrote a plain model that loads as ever, and the chain beside it rebuilds its weights."""
    final, base = type(tiny_opt()).from_pretrained(out / "final"), tiny_opt()
    chain = Chain.load(out / "chain")
    assert len(chain) == links
    chain.apply(base)
    assert final.state_dict().keys() == base.state_dict().keys()
    # the links were rounded into shards where they were trained, with the same sums in another order
    assert all(torch.allclose(p, q, atol=CLOSE, rtol=0) for p, q in zip(final.parameters(), base.parameters()))


def test_the_trainer_under_ddp(alone, tmp_path):
    """Three knots, masked ranks, a plateau that the processes see in different losses, checkpoints, the best model."""
    train(
        2,
        ("trainer-ddp", tmp_path / "own", "--own-directories", "--ranks", "4,2,1"),
        ("trainer-ddp", tmp_path / "plateau", "--plateau"),
        ("trainer-ddp", tmp_path / "resumed", "--plateau", "--resume", tmp_path / "plateau" / "checkpoint-3"),
        ("trainer-ddp", tmp_path / "best", "--best"),
    )
    require_equal(tmp_path / "own", 2, alone / "trainer", "Parameter")
    require_equal(tmp_path / "plateau", 2, alone / "trainer-plateau", "Parameter")
    require_equal(tmp_path / "resumed", 2, alone / "trainer-plateau", "Parameter")
    require_equal(tmp_path / "best", 2, alone / "trainer-best", "Parameter")
    assert seen_in(tmp_path / "best")[0]["best"].endswith("checkpoint-4")
    assert seen_in(tmp_path / "own")[0]["knots"] == [2, 4, 6, 8]
    require_a_whole_model(tmp_path / "own" / "of-0", links=4)
    # each process has had a directory of its own: the second has written nothing but the states of its generators
    written = {path.name for path in (tmp_path / "own" / "of-1").rglob("*") if path.is_file()}
    assert written == {"rng_state_1.pth"}
    assert len(Chain.load(tmp_path / "own" / "of-0" / "checkpoint-6" / "chain")) == 3


def test_the_trainer_under_fsdp2(alone, tmp_path):
    """The same with sharded weights, whose optimizer state drops the links: they are beside it in the checkpoint."""
    train(
        2,
        ("trainer-fsdp2", tmp_path / "whole", "--ranks", "4,2,1"),
        ("trainer-fsdp2", tmp_path / "resumed", "--ranks", "4,2,1", "--resume", tmp_path / "whole" / "checkpoint-3"),
        ("trainer-fsdp2", tmp_path / "shards", "--plateau", *SHARDED),
        ("trainer-fsdp2", tmp_path / "best", "--best"),
        ("trainer-fsdp2", tmp_path / "empty", "--plateau", "--fsdp", '{"cpu_ram_efficient_loading": true}'),
    )
    train(
        4,
        # right after a knot, and in the middle of a link
        ("trainer-fsdp2", tmp_path / "four", "--plateau", "--resume", tmp_path / "shards" / "checkpoint-3", *SHARDED),
        ("trainer-fsdp2", tmp_path / "more", "--ranks", "4,2,1", "--resume", tmp_path / "whole" / "checkpoint-3"),
    )
    require_equal(tmp_path / "whole", 2, alone / "trainer", "DTensor")
    require_equal(tmp_path / "resumed", 2, alone / "trainer", "DTensor")
    require_equal(tmp_path / "shards", 2, alone / "trainer-plateau", "DTensor")
    require_equal(tmp_path / "empty", 2, alone / "trainer-plateau", "DTensor")
    require_equal(tmp_path / "best", 2, alone / "trainer-best", "DTensor")
    require_equal(tmp_path / "four", 4, alone / "trainer-plateau", "DTensor")
    require_equal(tmp_path / "more", 4, alone / "trainer", "DTensor")
    assert seen_in(tmp_path / "whole")[0]["knots"] == [2, 4, 6, 8]
    require_a_whole_model(tmp_path / "whole", links=4)


def test_what_a_sharding_trainer_could_not_keep_is_refused(tmp_path):
    pytest.importorskip("peft")
    train(2, ("refused-fsdp", tmp_path))
    for seen in seen_in(tmp_path, 2):
        assert "uses FSDP1, which flattens the parameters: use FSDP2" in seen["FSDP1"]
        assert "a PeftModel, and the trainer's FSDP checkpoints hold its adapter alone" in seen["PEFT"]


def test_accelerate_by_ddp_and_fsdp2(alone, tmp_path):
    """`prepare` puts placeholders into the groups and then new parameters: what is trained must be those."""
    ranks = ("--ranks", "4,2,1")
    train(
        2,
        ("accelerate-ddp", tmp_path / "ddp", *ranks),
        ("accelerate-ddp", tmp_path / "ddp-resumed", *ranks, "--resume", tmp_path / "ddp" / "state-4"),
        ("accelerate-fsdp2", tmp_path / "fsdp2", *ranks),
        ("accelerate-fsdp2", tmp_path / "fsdp2-plateau", "--plateau"),
        ("accelerate-fsdp2", tmp_path / "fsdp2-resumed", *ranks, "--resume", tmp_path / "fsdp2" / "state-3"),
        ("accelerate-fsdp2", tmp_path / "bf16", *ranks, "--mixed", "bf16"),
    )
    train(4, ("accelerate-fsdp2", tmp_path / "four", *ranks, "--resume", tmp_path / "fsdp2" / "state-4"))
    require_equal(tmp_path / "ddp", 2, alone / "accelerate", "Parameter")
    require_equal(tmp_path / "ddp-resumed", 2, alone / "accelerate", "Parameter")
    require_equal(tmp_path / "fsdp2", 2, alone / "accelerate", "DTensor")
    require_equal(tmp_path / "fsdp2-plateau", 2, alone / "accelerate-plateau", "DTensor")
    require_equal(tmp_path / "fsdp2-resumed", 2, alone / "accelerate", "DTensor")
    require_equal(tmp_path / "four", 4, alone / "accelerate", "DTensor")
    (mixed, _), (wanted,) = seen_in(tmp_path / "bf16", 2), seen_in(alone / "accelerate")
    assert mixed["steps"] == wanted["steps"]
    # the losses are those of passes in bf16 (eps 2⁻⁸), through three layers
    assert mixed["losses"] == pytest.approx(wanted["losses"], rel=6 * 2**-8)
