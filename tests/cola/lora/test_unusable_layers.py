"""Layers that cannot carry a link: refused by path when named, left out with the reason by "all-linear"."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

from cola import ChainOptimizer, LinkConfig, NeverKnots
from tests.kinds import Shared


def pair(odd):
    """A usable layer, and one under the name "odd"."""
    model = nn.Module()
    model.plain, model.odd = nn.Linear(4, 4), odd
    return model


def chained(model, targets):
    return ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=2, target_modules=targets), lr=0.1)


def with_weight(change):
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(change(layer.weight.data), requires_grad=False)
    return layer


def pruned():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def hooked():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


#: the model's own kind: "all-linear" goes on without the layer
KINDS = {
    "float8": (lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)), "has a torch.float8_e4m3fn weight"),
    "int8": (lambda: with_weight(lambda w: w.to(torch.int8)), "has a torch.int8 weight"),
    "complex": (lambda: with_weight(lambda w: w.to(torch.complex64)), "has a torch.complex64 weight"),
    "sparse": (lambda: with_weight(lambda w: w.to_sparse()), "of layout torch.sparse_coo"),
    "subclass": (lambda: with_weight(lambda w: TwoTensor(w, w.clone())), "has a weight that is a TwoTensor"),
    "parametrized": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "parametrization"),
    "pruned": (pruned, "has a weight that is computed"),
    "hooked": (hooked, "forward replaced on the instance"),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_unusable_layer_is_left_out_or_refused_by_path(name, caplog):
    make, reason = KINDS[name]
    with pytest.raises(ValueError) as error:
        chained(pair(make()), ["plain", "odd"])
    assert "layer 'odd'" in str(error.value)
    assert reason in str(error.value)
    opt = chained(pair(make()), "all-linear")
    assert list(opt.live.layers) == ["plain"]
    assert "leaves out odd: it" in caplog.text
    assert reason in caplog.text
    with pytest.raises(ValueError, match="no linear layer that can carry a link: odd "):
        chained(nn.ModuleDict({"odd": make()}), "all-linear")


def inference():
    with torch.inference_mode():
        return nn.Linear(4, 4)


#: the caller has a next move: it is said before anything is done
UNREADY = {
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "'odd' has its weight on the meta device: load the weights"),
    "inference": (inference, "'odd' was made under torch.inference_mode"),
    "lazy": (lambda: nn.LazyLinear(4), r"'odd.weight' has no shape yet \(a lazy layer\): run one batch"),
    "lazy norm": (lambda: nn.LazyBatchNorm1d(), "'odd.weight' has no shape yet"),
}


@pytest.mark.parametrize("name", UNREADY)
@pytest.mark.parametrize("targets", [["plain", "odd"], "all-linear"])
def test_a_model_that_is_not_ready_is_refused(name, targets):
    make, reason = UNREADY[name]
    with pytest.raises(ValueError, match=reason):
        chained(pair(make()), targets)


def test_shared_layers_are_left_out_by_all_linear_and_refused_by_name(caplog):
    model = pair(nn.Linear(4, 4))
    model.third = nn.Linear(4, 4)
    model.third.weight = model.odd.weight
    assert list(chained(model, "all-linear").live.layers) == ["plain"]
    assert "leaves out odd, third: each is tied (odd.weight and third.weight are one tensor)" in caplog.text
    assert "leave the layer out" not in caplog.text
    model = pair(nn.Linear(4, 4))
    model.third = nn.Linear(4, 4)
    model.third.weight = model.odd.weight
    with pytest.raises(ValueError, match=r"the weight of 'odd' is tied"):
        chained(model, ["odd"])


def test_the_output_projection_of_attention_is_refused_in_subclasses_too():
    class Attention(nn.MultiheadAttention):
        pass

    attention = Attention(4, 2)
    attention.out_proj = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"belongs to an nn\.MultiheadAttention, whose forward reads the weight"):
        chained(pair(attention), ["out_proj"])
    assert list(chained(pair(attention), "all-linear").live.layers) == ["plain"]


def test_a_layer_of_another_library_that_is_called_linear_is_told_apart():
    Linear = type(
        "Linear", (nn.Module,), {"__module__": "elsewhere", "__init__": lambda self: nn.Module.__init__(self)}
    )
    odd = Linear()
    odd.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"layer 'odd' is a elsewhere\.Linear"):
        chained(pair(odd), ["odd"])


def test_parameters_that_peft_adapts_by_themselves_are_refused_by_path():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["plain"], target_parameters=["odd.weight"])
    model = pair(nn.Linear(4, 4))
    model.forward = lambda x: model.odd(model.plain(x))
    tuned = peft.inject_adapter_in_model(config, model)
    with pytest.raises(ValueError, match=r"PEFT's layer 'odd' adapts the parameter 'weight' by itself \(target_param"):
        ChainOptimizer(torch.optim.SGD, tuned, NeverKnots(), lr=0.1)


def test_a_head_that_reads_an_embeddings_link_is_not_left_out(caplog):
    opt = chained(Shared(), "all")
    assert list(opt.live.layers) == ["tokens", "positions"]
    assert "leaves out" not in caplog.text
