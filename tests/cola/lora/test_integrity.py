"""Layers changed under a running chain are refused by name at the knot, and nothing changes; hooks may stay."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.lora.layer import AdaptedLayer
from tests.cola.chain.chained import chained
from tests.models import BODY, Net, batch, loss_of, tiny_opt, train

STEPS = 4  # a knot after the third


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(before, module):
    after = module.state_dict()
    pairs = [(value, after.get(name)) for name, value in before.items()]
    return before.keys() == after.keys() and all(a.is_meta == b.is_meta and (a.is_meta or a.equal(b)) for a, b in pairs)


# layers of our own


def replace(model):
    model.second = nn.Linear(6, 6, bias=False)


def delete(model):
    layer = model.second
    del model.second
    model.__dict__["second"] = layer  # so that the forward still runs


def move(model):
    model.second = nn.Sequential(model.second)


def reassign(model):
    model.second.weight = nn.Parameter(torch.zeros(6, 6), requires_grad=False)


def quantise(model):
    model.second.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)


def quantise_in_place(model):
    model.second.weight.data = model.second.weight.data.to(torch.float8_e4m3fn)


def offload(model):
    model.second.weight = nn.Parameter(model.second.weight.to("meta"), requires_grad=False)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "replaced": (replace, r"'second' has been replaced by a Linear.*put the adapted layer back"),
    "deleted": (delete, r"'second' has been deleted"),
    "moved": (move, r"'second' is now at 'second\.0'.*put it back"),
    "weight reassigned": (reassign, r"'second' has been given another weight after training had begun"),
    "quantised": (quantise, r"'second' has a torch\.int8 weight now \(quantised\?\)"),
    "quantised in place": (quantise_in_place, r"'second' has a torch\.float8_e4m3fn weight now"),
    "offloaded": (offload, r"'second' has its parameters on the meta device"),
    "parametrized": (
        lambda model: parametrize.register_parametrization(model.second, "weight", Doubled()),
        r"'second' has a weight that is computed.*remove_parametrizations",
    ),
    "weight norm": (lambda model: parametrizations.weight_norm(model.second), "'second' has a weight that is computed"),
    "spectral norm": (lambda model: nn.utils.spectral_norm(model.second), "'second' has a weight that is computed"),
    "pruned": (
        lambda model: prune.l1_unstructured(model.second, "weight", amount=0.5),
        "'second' has a weight that is computed",
    ),
}
#: taken off by its own means, each lets the run go on
UNDONE = {
    "parametrized": lambda model: parametrize.remove_parametrizations(model.second, "weight", leave_parametrized=False),
    "pruned": lambda model: prune.remove(model.second, "weight"),
}


KNOTS = ("tie", "finish", "policy", "state_dict", "save")
NO_FORWARD = ("quantised", "quantised in place", "offloaded")


@pytest.mark.parametrize(
    ("change", "knot"), [(c, k) for c in CHANGES for k in KNOTS if not (k == "policy" and c in NO_FORWARD)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_layer_changed_under_the_chain_is_refused_and_nothing_changes(change, knot, tmp_path):
    model, opt = chained(policy=StepKnots(at=[3, 5]))
    train(opt, model, STEPS)
    CHANGES[change][0](model)
    before, chain = snapshot(model), repr(opt.chain)
    call = {
        "tie": opt.tie,
        "finish": opt.finish,
        "policy": lambda: train(opt, model, 1, start=STEPS),
        "state_dict": opt.state_dict,
        "save": lambda: opt.save(tmp_path),
    }[knot]
    with pytest.raises(RuntimeError, match=CHANGES[change][1]):
        call()
    assert repr(opt.chain) == chain
    assert not opt.finished
    if knot != "policy":
        assert unchanged(before, model)


@pytest.mark.parametrize("change", CHANGES)
def test_the_run_can_be_given_up_or_goes_on(change):
    model, opt = chained(policy=StepKnots(at=[3, 5]))
    train(opt, model, STEPS)
    CHANGES[change][0](model)
    if change in ("parametrized", "weight norm", "spectral norm", "pruned"):
        with pytest.raises(RuntimeError, match="a weight that is computed"):
            opt.finish(merge=False)
        if change in UNDONE:
            UNDONE[change](model)
            if change == "parametrized":
                assert isinstance(model.second, AdaptedLayer)
                opt.finish(merge=False)
    else:
        assert opt.finish(merge=False) is None
        assert len(opt.chain) == 1
        assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
        assert repr(opt)
        opt.state_dict()


@pytest.mark.parametrize("change", ["replaced", "deleted", "parametrized", "offloaded"])
def test_what_was_changed_before_the_first_step_is_refused_there(change):
    model, opt = chained()
    CHANGES[change][0](model)
    if change != "offloaded":
        loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=CHANGES[change][1]):
        opt.step()
    assert opt.steps == 0


def test_a_weight_may_be_replaced_before_the_first_step_and_by_a_loaded_state():
    model, opt = chained(policy=StepKnots(at=[3, 5]))
    model.second.weight = nn.Parameter(model.second.weight.detach().clone(), requires_grad=False)
    train(opt, model, STEPS)
    weights, state = copy.deepcopy((model.state_dict(), opt.state_dict()))
    twin, again = chained(policy=StepKnots(at=[3, 5]))
    train(again, twin, STEPS)
    for p in ("first", "second"):
        twin.get_submodule(p).weight = nn.Parameter(weights[f"{p}.weight"].clone(), requires_grad=False)
    again.load_state_dict(state)
    twin.load_state_dict(weights)
    assert train(again, twin, 3, start=STEPS) == train(opt, model, 3, start=STEPS)
    again.finish()


def test_copies_know_their_own_weights():
    pair = chained(policy=StepKnots(at=[3, 5]))
    train(pair[1], pair[0], STEPS)
    for copying in (copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))):
        model, opt = copying(pair)
        train(opt, model, 3, start=STEPS)
        opt.finish()
        assert len(opt.chain) == 3


# PEFT's layers


def peft_chain(policy=None, **config):
    peft = pytest.importorskip("peft")
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_opt(), peft.LoraConfig(**config))
    return peft, model, ChainOptimizer(torch.optim.AdamW, model, policy or NeverKnots(), lr=5e-2)


def peft_steps(model, opt, steps, start=0):
    for number in range(start, start + steps):
        ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(number))
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()


def add_another(peft, model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def switch(peft, model):
    add_another(peft, model)
    model.set_adapter("other")


def swap(peft, model):
    add_another(peft, model)
    model.set_adapter("other")
    model.delete_adapter("default")


def merge_and_unload(peft, model):
    return model.merge_and_unload()


PEFT_CHANGES = {
    "merge_and_unload": (
        merge_and_unload,
        r"has been merged and unloaded by PEFT.*second time.*finish\(merge=False\)",
    ),
    "unload": (lambda peft, model: model.unload(), r"has been unloaded by PEFT, and the live link with it"),
    "merge_adapter": (lambda peft, model: model.merge_adapter(), "adapter merged: call unmerge_adapter"),
    "disable_adapter_layers": (
        lambda peft, model: model.base_model.disable_adapter_layers(),
        "adapter disabled: call enable_adapter_layers",
    ),
    "add_adapter": (add_another, r"carries the PEFT adapters default, other.*delete_adapter"),
    "set_adapter": (switch, r"carries the PEFT adapters default, other"),
    "delete_adapter": (swap, r"has lost its PEFT adapter 'default'"),
}
PEFT_UNDONE = {
    "merge_adapter": lambda peft, model: model.unmerge_adapter(),
    "disable_adapter_layers": lambda peft, model: model.base_model.enable_adapter_layers(),
    "add_adapter": lambda peft, model: model.delete_adapter("other"),
    "set_adapter": lambda peft, model: (model.set_adapter("default"), model.delete_adapter("other")),
}


@pytest.mark.parametrize("change", PEFT_CHANGES)
@pytest.mark.parametrize("knot", ["tie", "finish", "state_dict", "save"])
def test_what_peft_does_by_the_users_habit_is_refused_at_the_knot(change, knot, tmp_path):
    peft, model, opt = peft_chain()
    peft_steps(model, opt, 2)
    opt.tie()
    peft_steps(model, opt, 2, start=2)
    inner = PEFT_CHANGES[change][0](peft, model) or model
    before = snapshot(inner)
    with pytest.raises(RuntimeError, match=r"layer 'model\.decoder\.layers\.0\.self_attn\.[a-z]_proj' " + ".*" +
                       PEFT_CHANGES[change][1]):  # fmt: skip
        {"tie": opt.tie, "finish": opt.finish, "state_dict": opt.state_dict, "save": lambda: opt.save(tmp_path)}[knot]()
    assert unchanged(before, inner)
    assert len(opt.chain) == 1
    if change in PEFT_UNDONE:
        PEFT_UNDONE[change](peft, model)
        peft_steps(model, opt, 1, start=4)
        opt.finish()
        assert len(opt.chain) == 2
        base = tiny_opt()
        opt.chain.apply(base)
        ids = torch.arange(3, 9).view(1, 6)
        with torch.no_grad():  # merging and unmerging rounds
            assert torch.allclose(base.eval()(ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("change", ["merge_and_unload", "unload", "delete_adapter"])
def test_a_model_that_peft_has_let_go_is_let_go(change):
    peft, model, opt = peft_chain()
    peft_steps(model, opt, 3)
    inner = PEFT_CHANGES[change][0](peft, model) or model
    before = snapshot(inner)
    opt.finish(merge=False)
    assert unchanged(before, inner)
    assert len(opt.chain) == 0
    assert repr(opt)
    opt.state_dict()


def test_a_merged_adapter_is_not_dropped_while_it_is_in_the_weights():
    _, model, opt = peft_chain()
    peft_steps(model, opt, 2)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="call unmerge_adapter"):
        opt.finish(merge=False)


def test_looking_at_the_model_without_or_with_its_adapter_merged_between_knots_is_free():
    _, model, opt = peft_chain(StepKnots(every=2))
    peft_steps(model, opt, 3)
    with model.disable_adapter():
        pass
    model.merge_adapter(), model.unmerge_adapter()
    peft_steps(model, opt, 3, start=3)
    opt.finish()
    assert len(opt.chain) == 3


# forwards that others keep


def hooked(model, place):
    from accelerate import hooks

    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            type(self).calls += 1
            return args, kwargs

    targets = {"layers": [model.first, model.second], "model": [model], "all": list(model.modules())}[place]
    for module in targets:
        hooks.add_hook_to_module(module, Counting(), append=True)
    return Counting


def dispatched(model):
    from accelerate import dispatch_model

    dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def compiled_calls(model):
    model.first.compile(backend="eager")
    model.second.compile(backend="eager")


def partials(model):
    for layer in (model.first, model.second):
        layer.forward = functools.partial(layer.forward)


def closures(model):
    for layer in (model.first, model.second):

        def forward(x, kept=layer.forward):
            return kept(x)

        layer.forward = functools.wraps(layer.forward)(forward)


def bound(model):
    for layer in (model.first, model.second):
        layer.forward = layer.forward
        layer.also = layer.extra_repr


KEPT = {
    "hooks on layers": lambda model: hooked(model, "layers"),
    "hook on the model": lambda model: hooked(model, "model"),
    "hooks everywhere": lambda model: hooked(model, "all"),
    "twice": lambda model: (hooked(model, "layers"), hooked(model, "layers")),
    "dispatch_model": dispatched,
    "compiled in place": compiled_calls,
    "partial": partials,
    "closure": closures,
    "bound": bound,
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("when", ["before the first step", "after a knot"])
def test_forwards_that_others_keep_are_plain_after_the_end(kept, when):
    pytest.importorskip("accelerate")
    model, opt = chained()
    twin, other = chained()
    if when == "before the first step":
        KEPT[kept](model)
    assert train(opt, model, 4) == train(other, twin, 4)
    if when == "after a knot":
        KEPT[kept](model)
    assert train(opt, model, 4, start=4) == train(other, twin, 4, start=4)
    opt.finish(), other.finish()
    x, _ = batch(0)
    assert torch.equal(model(x), twin(x))
    loss_of(model, 0).backward()
    again = copy.deepcopy(model) if kept not in ("partial", "closure") else model
    assert torch.equal(again(x), twin(x))
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("kept", ["hooks on layers", "twice", "dispatch_model", "bound"])
def test_nothing_of_the_chain_is_left_in_what_hooks_keep(kept):
    pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_module

    model, opt = chained()
    KEPT[kept](model)
    train(opt, model, 4)
    opt.finish()
    for layer in (model.first, model.second):
        for value in vars(layer).values():
            for found in (value, getattr(value, "__wrapped__", None), getattr(value, "__func__", None)):
                assert "LoRALinear" not in repr(getattr(found, "__func__", found)), found
    if kept != "bound":
        remove_hook_from_module(model, recurse=True)
    x, _ = batch(0)
    opt.chain.apply(plain := Net())
    assert torch.equal(model(x), plain(x))


def test_a_peft_model_may_be_dispatched_after_the_optimizer():
    pytest.importorskip("accelerate")
    _, model, opt = peft_chain(StepKnots(every=2))
    _, twin, other = peft_chain(StepKnots(every=2))
    dispatched(model)
    peft_steps(model, opt, 3), peft_steps(twin, other, 3)
    opt.finish(), other.finish()
    ids = torch.arange(3, 9).view(1, 6)
    assert torch.equal(model.unload()(ids).logits, twin.unload()(ids).logits)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_layers_are_refused_at_the_first_step(how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, opt = chained()
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        accelerate.dispatch_model(model, {"first": "cpu", "second": "disk", "head": "cpu"}, main_device="cpu",
                                  offload_dir=tmp_path)  # fmt: skip
    loss_of(model, 0).requires_grad_(True).backward()
    with pytest.raises(RuntimeError, match=r"has its parameters on the meta device: they were offloaded"):
        opt.step()
    assert opt.steps == 0


def test_layers_that_are_offloaded_beside_the_chain_do_no_harm(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, opt = chained()
    accelerate.dispatch_model(model, {"first": "cpu", "second": "cpu", "head": "disk"}, main_device="cpu",
                              offload_dir=tmp_path)  # fmt: skip
    twin, other = chained()
    assert train(opt, model, 4) == train(other, twin, 4)
    opt.finish(), other.finish()
    x, _ = batch(0)
    assert torch.equal(model(x), twin(x))


def test_the_factors_go_with_the_optimizer():
    model, opt = chained()
    dispatched(model)
    train(opt, model, 4)
    factor = weakref.ref(model.first.lora_A)
    opt.finish()
    del opt
    gc.collect()
    assert factor() is None


@pytest.mark.parametrize("trained", ["both", "A", "B"])
@pytest.mark.parametrize("way", ["weights alone", "both state dicts", "save and load", "weights of a finished run"])
def test_a_link_that_comes_without_its_history_is_mentioned_once(caplog, tmp_path, trained, way):
    link = LinkConfig(r=2, target_modules=BODY, train=trained)
    wrap = functools.partial(ChainOptimizer, torch.optim.SGD, policy=StepKnots(every=3), link=link, lr=0.1)
    model, resumed = Net(), Net()
    opt, again = wrap(model=model), wrap(model=resumed)
    train(opt, model, 4)
    if way == "save and load":
        opt.save(tmp_path)
        again.load(tmp_path)
    else:
        if way == "weights of a finished run":
            opt.finish()
        elif way == "both state dicts":
            again.load_state_dict(copy.deepcopy(opt.state_dict()))
        resumed.load_state_dict(model.state_dict(), strict=way != "weights of a finished run")
    train(again, resumed, 2)
    assert caplog.text.count("the link was trained before") == (way == "weights alone")
