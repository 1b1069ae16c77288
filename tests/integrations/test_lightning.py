"""Lightning with a chain: epochs, losses and knots, checkpoints and resuming."""

import copy
import warnings

import pytest
import torch

from cola import ChainOptimizer, EpochKnots, LinkConfig, PlateauKnots, StepKnots, log_to
from tests.models import BODY, Net, batch

lightning = pytest.importorskip("lightning")

from cola.integrations.lightning import ChainKnots  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Lit(lightning.LightningModule):
    def __init__(self, policy, r=2):
        super().__init__()
        self.net = Net()
        link = LinkConfig(**(r if isinstance(r, dict) else {"r": r}), lora_alpha=2, target_modules=BODY)
        self.chain_optimizer = ChainOptimizer(torch.optim.AdamW, self.net, policy, link=link, lr=0.02)

    def configure_optimizers(self):
        return {
            "optimizer": self.chain_optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.StepLR(self.chain_optimizer, 2),
                "interval": "step",
            },
        }

    def training_step(self, rows, index):
        x, y = rows
        return (self.net(x) - y).square().mean()

    def train_dataloader(self):
        x, y = batch(0, n=12)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


def fit(module, tmp_path, ckpt=None, knots=True, **changes):
    save = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )
    arguments = {"max_steps": 10, "accelerator": "cpu", "devices": 1, "logger": False, "callbacks": [save], **changes}
    arguments["callbacks"] = [*arguments["callbacks"], *([ChainKnots()] if knots else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **arguments
        )
        trainer.fit(module, ckpt_path=ckpt)
    return trainer


def test_epochs_and_losses_reach_the_policy_and_knots_the_logger(tmp_path):
    module = Lit(EpochKnots(at=[1, 2]))
    losses = []
    module.chain_optimizer.on_knot(lambda report: losses.append(report.loss))
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    fit(module, tmp_path, logger=logger)
    assert [link.step for link in module.chain_optimizer.chain] == [3, 6, 10]  # 3 steps an epoch
    assert all(loss > 0 for loss in losses)
    assert type(module.net.first) is torch.nn.Linear
    assert {"knot_rank", "knot_delta_norm"} <= set(logger.experiment.metrics_keys)


@pytest.mark.parametrize("r", [2, (2, 1)], ids=str)
@pytest.mark.parametrize("step", [3, 6])
def test_a_checkpoint_resumes_bit_for_bit(tmp_path, r, step):
    policy = lambda: StepKnots(at=[3, 5]) | PlateauKnots(window=4)  # noqa: E731
    whole = Lit(policy(), r)
    fit(whole, tmp_path)
    resumed = Lit(policy(), r)
    fit(resumed, tmp_path / "again", ckpt=tmp_path / f"step={step}.ckpt")
    ours, theirs = resumed.net.state_dict(), whole.net.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert [link.step for link in resumed.chain_optimizer.chain] == [3, 5, 10]


def test_clipping_and_accumulation_count_optimizer_steps(tmp_path):
    module = Lit(StepKnots(every=2))
    fit(module, tmp_path, max_steps=4, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert [link.step for link in module.chain_optimizer.chain] == [2, 4]


def test_the_module_copies_with_its_optimizer(tmp_path):
    module = copy.deepcopy(Lit(StepKnots(every=2)))
    fit(module, tmp_path, max_steps=4)
    assert len(module.chain_optimizer.chain) == 2


class Judged(Lit):
    """Notes what it computes when a checkpoint is written, and what it is tested with."""

    def __init__(self, policy, r=2, best=0):
        super().__init__(policy, r)
        self.noted, self.tested, self.best, self.rounds = {}, None, best, 0

    def validation_step(self, rows, index):
        self.noted[self.global_step] = self.net(batch(5)[0])
        self.log("score", float(self.rounds != self.best), batch_size=1)
        self.rounds += 1

    def test_step(self, rows, index):
        self.tested = self.net(batch(5)[0])

    predict_step = test_step

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1, 1))

    test_dataloader = predict_dataloader = val_dataloader


SELECTS = {"r": 2, "train": "B", "init": "selector"}


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights"])
@pytest.mark.parametrize(("r", "best"), [(2, 0), (2, 1), (2, 2), ((2, 1), 0), ((2, 1), 1), (SELECTS, 1)], ids=str)
def test_the_best_checkpoint_is_tested_with_its_link(tmp_path, best, r, weights_only):
    """Knots after steps 2 and 5; epochs, and so checkpoints, end with steps 3, 6 and 9."""
    module = Judged(StepKnots(at=[2, 5]), r, best)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="score", save_weights_only=weights_only)
    trainer = fit(module, tmp_path, callbacks=[keep], max_steps=9, num_sanity_val_steps=0)
    at = [3, 6, 9][best]
    assert f"step={at}" in keep.best_model_path
    wanted = module.noted[at]
    rate = 4 * torch.finfo(torch.float32).eps * 30  # sums of a few products in another order, through three layers
    for how in (trainer.test, trainer.predict, trainer.test):
        module.tested = None
        how(module, ckpt_path="best", **({"verbose": False} if how == trainer.test else {}))
        torch.testing.assert_close(module.tested, wanted, rtol=rate, atol=rate)
    assert not [name for name in module.state_dict() if "lora" in name]
    # a fresh module takes the link as a link
    fresh = Judged.load_from_checkpoint(keep.best_model_path, policy=StepKnots(at=[2, 5]), r=r)
    torch.testing.assert_close(fresh.net(batch(5)[0]), wanted, rtol=rate, atol=rate)
    # and one that was finished elsewhere is given it by its own run
    other = Judged(StepKnots(at=[2, 5]), r)
    fit(other, tmp_path / "other", callbacks=[], max_steps=9, num_sanity_val_steps=0)
    other.load_state_dict(torch.load(keep.best_model_path, weights_only=True)["state_dict"])
    torch.testing.assert_close(other.net(batch(5)[0]), wanted, rtol=rate, atol=rate)


@pytest.mark.parametrize("knots", [False, True])
def test_lightning_without_the_callback_is_recognised_once(knots, tmp_path, caplog):
    module = Lit(StepKnots(every=2))
    fit(module, tmp_path, knots=knots, max_steps=3)
    told = [record.getMessage() for record in caplog.records if "trains this chain without" in record.getMessage()]
    assert len(told) == (not knots)
    assert all("Lightning" in message and "ChainKnots()" in message for message in told)


def test_knots_reach_a_logger_of_lightning(tmp_path):
    pytest.importorskip("pandas")
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    model = Net()
    link = LinkConfig(r=1, target_modules=BODY)
    opt = ChainOptimizer(torch.optim.SGD, model, policy=StepKnots(every=1), link=link, lr=0.1)
    opt.on_knot(log_to(logger))
    x, y = batch(0)
    for _ in range(2):
        (model(x) - y).square().mean().backward()
        opt.step()
    logger.save()
    heading, *lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"step", "knot/share", "knot/delta_norm"} <= set(heading.split(","))
    assert len(lines) == 2
