"""`with opt.merged()`: inside, the model that a twin's `finish` gives; after it, the run of a twin without it."""

import contextlib
import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import BODY, Net, batch, loss_of, tiny_gpt2, tiny_opt, train


class Normed(Net):
    """With running statistics, which move at every forward in training mode."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


def made(net=Net, dtype=torch.float32, base=torch.optim.AdamW, knots=3, **options):
    kwargs = {name: options.pop(name) for name in ("rounding", "reset", "keep_links") if name in options}
    lr = options.pop("lr", 0.02)
    link = LinkConfig(**{"r": 2, "lora_alpha": 2, "target_modules": BODY, **options})
    return ChainOptimizer(base, net(dtype=dtype), StepKnots(every=knots), link=link, lr=lr, **kwargs)


def schedule_free(**kwargs):
    opt = made(base=pytest.importorskip("schedulefree").AdamWScheduleFree, bias="lora_only", **kwargs)
    opt.train()
    return opt


HALF = {"dtype": torch.bfloat16}
#: how the run is made, the dtype of its batches, and the steps that it has taken
CASES = {
    "plain": (made, {}, 5),
    "before the first step": (made, {}, 0),
    "right after a knot": (made, {}, 3),
    "the first link": (made, {"knots": 9}, 2),
    "biases and a head": (made, {"bias": "lora_only", "modules_to_save": ["head"]}, 5),
    "a head alone has moved": (made, {"modules_to_save": ["head"], "lr": 0.0}, 2),
    "falling ranks": (made, {"r": (3, 2, 1)}, 5),
    "masked ranks": (made, {"r": (3, 2, 1), "rank_change": "mask"}, 5),
    "stochastic": (made, HALF, 5),
    "compensated": (made, {**HALF, "rounding": "compensated"}, 5),
    "compensated, no knot yet": (made, {**HALF, "rounding": "compensated"}, 2),
    "fp16": (made, {"dtype": torch.float16, "dtype_": torch.float16, "lr": 1e-3}, 5),
    "fp64": (made, {"dtype": torch.float64}, 5),
    "selected inputs": (made, {"train": "B", "init": "selector", "reset": "transport"}, 5),
    "two-sided": (made, {"init": "two-sided"}, 5),
    "two-sided, no step yet": (made, {"init": "two-sided"}, 0),
    "running statistics": (made, {"net": Normed}, 5),
    "links not kept": (made, {"keep_links": False}, 5),
    "momentum": (made, {"base": torch.optim.SGD, "reset": "keep"}, 5),
    "a base with modes": (schedule_free, {}, 5),
}
EACH = pytest.mark.parametrize("case", CASES)


def running(case):
    make, options, steps = CASES[case]
    options = {name: value for name, value in options.items() if name != "dtype_"}
    opt = make(**options)
    train(opt, opt.model, steps, dtype=options.get("dtype", torch.float32))
    opt.zero_grad()
    return opt, options.get("dtype", torch.float32), steps


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    """Keys in order, and values bit for bit: signs of zeros count."""
    pairs = list(zip(one.values(), two.values()))
    equal = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    return list(one) == list(two) and equal and all(torch.equal(a.signbit(), b.signbit()) for a, b in pairs)


def about(model):
    """What a state dict does not say."""
    return {
        "classes": [type(m) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "trained": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "gradients": [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._load_state_dict_post_hooks) for m in model.modules()],
    }


@EACH
def test_inside_it_is_the_finished_model_and_after_it_the_run_goes_on(case):
    opt, dtype, steps = running(case)
    opt.model.second.eval()
    twin = copy.deepcopy(opt)
    for one in (opt, twin):  # gradients that wait for their step
        loss_of(one.model, 50, dtype).backward()
    finished = copy.deepcopy(opt)
    finished.finish()
    before, state, random = about(opt.model), copy.deepcopy(opt.state_dict()), torch.get_rng_state()
    identities = [id(p) for p in opt.model.parameters()]
    memory = [p.data_ptr() for p in opt.model.parameters()]
    with opt.merged() as model:
        assert model is opt.model
        inside = about(model)
        assert inside["classes"] == [type(m) for m in finished.model.modules()]
        assert inside["trained"] == about(finished.model)["trained"]
        assert inside["attributes"] == about(finished.model)["attributes"]
        assert inside["hooks"] == about(finished.model)["hooks"]
        kept = model.state_dict()
        assert same(kept, bits(finished.model))
        x, _ = batch(0, dtype=dtype)
        assert torch.equal(model.eval()(x), finished.model.eval()(x))
        assert pickle.dumps(model).count(b"cola") == pickle.dumps(finished.model).count(b"cola")
        loss_of(model.train(), 51, dtype).backward()  # none of this is the run's
        inside = bits(model)
    assert torch.equal(random, torch.get_rng_state())
    assert memory == [p.data_ptr() for p in opt.model.parameters()]
    assert [id(p) for p in opt.model.parameters()] == identities
    assert about(opt.model) == before == about(twin.model)
    assert same(bits(opt.model), bits(twin.model))
    assert repr(opt.state_dict()) == repr(state)
    for one in (opt, twin):
        one.step()
        train(one, one.model, 5, start=steps, dtype=dtype)
        one.finish()
    assert same(bits(opt.model), bits(twin.model))
    assert [link.report.delta_norm for link in opt.chain] == [link.report.delta_norm for link in twin.chain]
    assert [link.report.loss for link in opt.chain] == [link.report.loss for link in twin.chain]
    assert same(kept, inside)  # what was read in the block stays, without a copy of it


@pytest.mark.parametrize("when", ["in the block", "on entry"])
def test_an_exception_leaves_the_run_as_it_was(when):
    opt = made(bias="lora_only")
    train(opt, opt.model, 4)
    if when == "on entry":
        with torch.no_grad():
            opt.model.second.lora_B[0, 0] = float("nan")
    twin = copy.deepcopy(opt)
    error, message = (ZeroDivisionError, "division") if when == "in the block" else (RuntimeError, "is not tied")
    with pytest.raises(error, match=message), opt.merged():
        1 / 0  # noqa: B018
    assert {**about(opt.model), "gradients": 0} == {**about(twin.model), "gradients": 0}  # a copy has none
    assert repr(bits(opt.model)) == repr(bits(twin.model))
    with torch.no_grad():
        for one in (opt, twin):
            one.model.second.lora_B.nan_to_num_()
    for one in (opt, twin):
        train(one, one.model, 4, start=4)
    assert same(bits(opt.model), bits(twin.model))


CALLS = {
    "step": lambda opt, path: opt.step(),
    "step with a closure": lambda opt, path: opt.step(lambda: 0.0),
    "zero_grad": lambda opt, path: opt.zero_grad(),
    "observe": lambda opt, path: opt.observe(1.0),
    "tie": lambda opt, path: opt.tie(),
    "finish": lambda opt, path: opt.finish(),
    "finish without a tie": lambda opt, path: opt.finish(merge=False),
    "save": lambda opt, path: opt.save(path),
    "load": lambda opt, path: opt.load(path),
    "state_dict": lambda opt, path: opt.state_dict(),
    "load_state_dict": lambda opt, path: opt.load_state_dict({}),
    "undo": lambda opt, path: opt.undo(Net()),
    "follow": lambda opt, path: opt.follow(opt.chain),
    "on_knot": lambda opt, path: opt.on_knot(print),
    "add_param_group": lambda opt, path: opt.add_param_group({"params": [opt.model.head.weight]}),
    "merged": lambda opt, path: opt.merged().__enter__(),
    "with": lambda opt, path: opt.__enter__(),
    "copying": lambda opt, path: copy.deepcopy(opt),
    "pickling": lambda opt, path: pickle.dumps(opt),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_trains_ties_saves_or_loads_is_refused_in_the_block(call, tmp_path):
    opt = made()
    train(opt, opt.model, 4)
    opt.save(tmp_path)
    before = bits(opt.model)
    name = call.split()[0]
    with opt.merged(), pytest.raises(RuntimeError, match=rf"{name}.* inside `with opt.merged\(\)`.*leave the block"):
        CALLS[call](opt, tmp_path)
    assert same(bits(opt.model), before)
    train(opt, opt.model, 2)
    assert opt.steps == 6


def test_tensors_that_share_memory_share_it_in_the_block_and_after_it():
    """A trained head, another Parameter over it, and a buffer that is a row of it."""
    net = Net()
    net.frozen = nn.Parameter(net.head.weight.data.t())
    net.register_buffer("row", net.head.weight.data[1])
    link = LinkConfig(r=2, target_modules=BODY, modules_to_save=["head"])
    opt = ChainOptimizer(torch.optim.AdamW, net, NeverKnots(), link=link, lr=0.02)
    train(opt, net, 2)
    before = bits(net)
    with opt.merged() as model:
        kept, inside = model.state_dict(), bits(model)
        model.head.weight.data.zero_()
        assert not model.frozen.any()
        assert not model.row.any()
    assert not kept["head.weight"].any()
    assert torch.equal(kept["first.weight"], inside["first.weight"])
    assert same(bits(net), before)
    assert net.frozen.data_ptr() == net.head.weight.data_ptr()
    assert net.row.data_ptr() == net.head.weight[1].data_ptr()


def test_the_model_alone_can_be_copied_in_the_block():
    opt = made()
    train(opt, opt.model, 4)
    with opt.merged() as model:
        copied, inside = copy.deepcopy(model), bits(model)
    assert same(bits(copied), inside)
    train(opt, copy.deepcopy(opt).model, 1)  # after it the optimizer can be copied again


def test_a_block_stays_open_that_nobody_else_holds():
    opt, twin = made(), made()
    for one in (opt, twin):
        train(one, one.model, 4)
    twin.finish()
    opt.merged().__enter__()
    gc.collect()
    assert same(bits(opt.model), bits(twin.model))
    opt._merged.__exit__(None, None, None)
    train(opt, opt.model, 2)


@pytest.mark.parametrize("where", ["reset", "init"])
def test_in_the_middle_of_a_knot_it_is_refused_by_name(where):
    def reset(base, old, new):
        with opt.merged():
            pass

    def init(start):
        if start.opt is not None:
            reset(None, None, None)
        return torch.ones(start.rank, start.shape[1])

    opt = made(**{where: reset if where == "reset" else init})
    with pytest.raises(RuntimeError, match=r"merged\(\) during a knot"):
        train(opt, opt.model, 3)
    with opt.merged():
        pass


def test_a_listener_and_a_policy_may_look_at_the_merged_model():
    seen = []

    class Looks(StepKnots):
        def update(self, signal):
            with signal.opt.merged() as model:
                seen.append(loss_of(model, 0).item())
            return super().update(signal)

    plain, looking = (
        made(),
        ChainOptimizer(
            torch.optim.AdamW, Net(), Looks(every=3), link=LinkConfig(r=2, lora_alpha=2, target_modules=BODY), lr=0.02
        ),
    )

    def look(report):
        with looking.merged() as model:
            seen.append(loss_of(model, 0).item())

    looking.on_knot(look)
    for opt in (plain, looking):
        train(opt, opt.model, 7)
        opt.finish()
    assert same(bits(plain.model), bits(looking.model))
    assert len(seen) == 7 + 3
    with looking.merged() as model:  # finished: just the model
        assert model is looking.model


def test_what_the_block_does_to_the_model_is_undone():
    opt = made(bias="lora_only")
    train(opt, opt.model, 4)
    twin = copy.deepcopy(opt)
    with opt.merged() as model:
        model.half().eval()
        model.head = nn.Linear(6, 1)
        for p in model.first.parameters():
            p.requires_grad_(False)
        calls = []
        handle = model.first.register_forward_hook(lambda *_: calls.append(1))
    for one in (opt, twin):
        train(one, one.model, 4, start=4)
    assert same(bits(opt.model), bits(twin.model))
    assert len(calls) == 4  # hooks are the user's to remove
    handle.remove()


@pytest.mark.parametrize("trained", [True, False])
def test_weights_loaded_in_the_block_are_put_back_or_named(trained, caplog):
    opt = made(modules_to_save=["head"] if trained else ())
    train(opt, opt.model, 4)
    before = bits(opt.model)
    with opt.merged() as model:
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    after, said = bits(opt.model), [record.getMessage() for record in caplog.records]
    kept = () if trained else ("head.weight", "head.bias")
    assert same({n: v for n, v in after.items() if n not in kept}, {n: v for n, v in before.items() if n not in kept})
    assert all(torch.equal(after[name], before[name] + 1) for name in kept)
    assert [text.split(":")[0] for text in said] == ([] if trained else ["head.weight, head.bias"])
    with opt.merged() as model:  # the words come once
        loss_of(model, 0)
    assert len(caplog.records) == len(said)


def test_under_inference_mode_it_is_entered_first():
    opt = made()
    train(opt, opt.model, 2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="enter it inside the block"), opt.merged():
        pass
    with opt.merged() as model, torch.inference_mode():
        loss_of(model, 0)
        model.register_buffer("cache", torch.ones(1))
    with torch.inference_mode():
        opt.model.register_buffer("cache", torch.ones(1))
    with opt.merged() as model, torch.inference_mode():
        loss_of(model, 0)
    train(opt, opt.model, 2)


def test_a_state_dict_without_the_models_own_is_still_refused_at_the_next_step():
    opt = made()
    train(opt, opt.model, 4)
    other = made()
    other.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="load the model's own state dict too"), other.merged():
        pass
    other.model.load_state_dict(opt.model.state_dict())
    with other.merged() as model:
        weights = bits(model)
    other.model.load_state_dict(made().model.state_dict())
    with pytest.raises(RuntimeError, match="load the model's own state dict too"):
        train(other, other.model, 1)
    with opt.merged() as model:
        assert same(bits(model), weights)


def ids(step):
    return torch.arange(48).view(4, 12) * (step + 5) % 32


@pytest.mark.parametrize("make", [tiny_opt, tiny_gpt2, lambda: tiny_opt(tie_word_embeddings=True)])
def test_models_of_transformers_are_saved_as_the_finished_one(make, tmp_path, caplog):
    """GPT-2's weights are in×out; and an embedding that is trained may be the head as well."""
    model = make()
    link = LinkConfig(r=2, modules_to_save=["embed_tokens"] if "embed_tokens" in str(model) else ())
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=0.02)

    def steps(one, numbers):
        for number in numbers:
            one.zero_grad()
            one.model(input_ids=ids(number), labels=ids(number)).loss.backward()
            one.step()

    steps(opt, range(3))
    twin, finished = copy.deepcopy(opt), copy.deepcopy(opt)
    finished.finish()
    caplog.clear()
    with opt.merged() as merged:
        merged.save_pretrained(tmp_path)
    assert not caplog.records
    again = type(model).from_pretrained(tmp_path)
    assert same(bits(again), bits(finished.model))
    for one in (opt, twin):
        steps(one, range(3, 5))
    assert same(bits(opt.model), bits(twin.model))
    opt.model.save_pretrained(tmp_path)
    assert "leaves out the live link" in caplog.text  # the reminder is back


# at the end of a `with` block


def test_with_finishes_at_the_end():
    with made() as opt:
        train(opt, opt.model, 4)
    assert opt.finished
    assert len(opt.chain) == 2
    assert type(opt.model.first) is nn.Linear


def test_with_leaves_a_finished_chain_alone():
    with made() as opt:
        train(opt, opt.model, 4)
        opt.finish(merge=False)
    assert len(opt.chain) == 1
    with pytest.raises(RuntimeError, match=r"with after finish\(\)"), opt:
        pass


def test_an_exception_passes_and_ties_nothing():
    opt, plain = made(), made()
    with contextlib.suppress(KeyboardInterrupt), opt:
        train(opt, opt.model, 4)
        raise KeyboardInterrupt
    assert not opt.finished
    train(plain, plain.model, 4)
    assert same(bits(opt.model), bits(plain.model))
    for one in (opt, plain):
        train(one, one.model, 3, start=4)
        one.finish()
    assert same(bits(opt.model), bits(plain.model))


def test_with_of_no_steps_gives_the_model_back():
    before = bits(Net())
    with ChainOptimizer(torch.optim.SGD, Net(), NeverKnots(), link=LinkConfig(r=1, target_modules=BODY)) as opt:
        pass
    assert same(bits(opt.model), before)


def test_numbers_of_parameters_inside_are_those_of_the_run(capsys):
    opt, *_ = running("biases and a head")
    opt.print_trainable_parameters()
    with opt.merged():
        opt.print_trainable_parameters()
    opt.print_trainable_parameters()
    assert len(set(capsys.readouterr().out.splitlines())) == 1
