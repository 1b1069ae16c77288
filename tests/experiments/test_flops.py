"""The count of training FLOPs, against torch's counter on real models, and the formula of Table 4."""

import doctest
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

import transformers

from cola import ChainOptimizer, LinkConfig, NeverKnots
from experiments import flops
from experiments.flops import FULL, NOTHING, Architecture, Trained, batch_flops, run_flops

ROWS, LENGTH = 2, 7


def added(total, left, right, **kwargs):
    (m, k), (_, n) = left, right
    return 2 * m * k * n


IN_PLACE = {torch.ops.aten.addmm_: added}
"""The products of our layer that torch's counter has no formula for."""


def opt(**changes):
    shape = {
        "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 2, "vocab_size": 51,
        "word_embed_proj_dim": 16, "max_position_embeddings": 32,
    }  # fmt: skip
    return transformers.OPTConfig(**{**shape, **changes}, attn_implementation="eager")


def llama(kind=transformers.LlamaConfig, **changes):
    shape = {
        "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 20, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 51, "max_position_embeddings": 32,
    }  # fmt: skip
    return kind(**{**shape, **changes}, attn_implementation="eager")


CONFIGS = {
    "opt": opt(),
    "opt, one layer": opt(num_hidden_layers=1),
    "opt, projected embeddings": opt(word_embed_proj_dim=8),
    "opt, norms after, untied": opt(do_layer_norm_before=False, tie_word_embeddings=False),
    "llama": llama(),
    "llama, grouped queries": llama(num_key_value_heads=2, num_hidden_layers=3),
    "llama, one key head, wide heads": llama(num_key_value_heads=1, head_dim=8),
    "mistral": llama(transformers.MistralConfig, num_key_value_heads=2),
    "qwen2": llama(transformers.Qwen2Config, num_key_value_heads=2, tie_word_embeddings=True),
}
TRAINED = {
    "nothing": NOTHING,
    "q/v, rank 1": Trained(1),
    "q/v, rank 8": Trained(8),
    "keys alone": Trained(3, ("k_proj",)),
    "values alone": Trained(3, ("v_proj",)),
    "all linear": Trained(4, ("all-linear",)),
    "all weights": FULL,
}


def products(model, trained, custom):
    """FLOPs of forward and of backward, as torch counts them."""
    ids = torch.randint(3, 51, (ROWS, LENGTH))
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    forward = counter.get_total_flops()
    if trained == NOTHING:
        return forward, 0
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        loss.backward()
    return forward, counter.get_total_flops()


def ours(config, trained):
    model = transformers.AutoModelForCausalLM.from_config(config)
    if trained.rank:
        targets = "all-linear" if trained.targets == ("all-linear",) else list(trained.targets)
        link = LinkConfig(r=trained.rank, target_modules=targets)
        ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.1)
    return model


@pytest.mark.parametrize("trained", [pytest.param(value, id=name) for name, value in TRAINED.items()])
@pytest.mark.parametrize("config", [pytest.param(value, id=name) for name, value in CONFIGS.items()])
def test_the_count_is_torchs_to_the_last_flop(config, trained):
    counted = products(ours(config, trained), trained, IN_PLACE)
    expected = batch_flops(config, ROWS, LENGTH, trained)
    assert (expected.forward, expected.backward) == counted


@pytest.mark.parametrize("kind", ["q/v, rank 8", "keys alone", "all linear"])
@pytest.mark.parametrize("name", ["opt", "llama, grouped queries"])
def test_pefts_layers_cost_the_same_and_torch_knows_all_their_products(name, kind):
    peft = pytest.importorskip("peft")
    config, trained = CONFIGS[name], TRAINED[kind]
    targets = "all-linear" if trained.targets == ("all-linear",) else list(trained.targets)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=trained.rank, target_modules=targets, lora_dropout=0.0))
    expected = batch_flops(config, ROWS, LENGTH, trained)
    assert products(model, trained, {}) == (expected.forward, expected.backward)


def test_what_torchs_counter_misses_in_our_layer_are_the_products_added_in_place():
    config, trained = CONFIGS["opt"], TRAINED["q/v, rank 8"]
    forward, backward = products(ours(config, trained), trained, {})
    expected = batch_flops(config, ROWS, LENGTH, trained)
    layers, adapters, width = 2, 2, 16
    product = 2 * ROWS * LENGTH * 8 * width
    assert expected.forward - forward == layers * adapters * product  # with B
    assert expected.backward - backward == (layers - 1) * adapters * product  # with A, where x needs a gradient


@pytest.mark.parametrize("name", ["opt, projected embeddings", "llama, grouped queries"])
@pytest.mark.parametrize("trained", [Trained(2), FULL])
def test_logits_of_the_last_positions_only(name, trained):
    config, ids = CONFIGS[name], torch.randint(3, 51, (ROWS, LENGTH))
    model = ours(config, trained)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        model(input_ids=ids, logits_to_keep=3, use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == batch_flops(config, ROWS, LENGTH, trained, kept=3).total
    assert batch_flops(config, ROWS, LENGTH, trained, kept=LENGTH) == batch_flops(config, ROWS, LENGTH, trained)


def test_training_an_adapted_layers_bias_costs_no_product():
    config = CONFIGS["opt"]
    model = transformers.AutoModelForCausalLM.from_config(config)
    link = LinkConfig(r=8, bias="lora_only", target_modules=["q_proj", "v_proj"])
    ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.1)
    expected = batch_flops(config, ROWS, LENGTH, Trained(8))
    counted = products(model, Trained(8), IN_PLACE)
    assert counted == (expected.forward, expected.backward)


def test_a_batch_by_hand():
    """One block of width 4 and one head, MLP of 8, 5 tokens of the vocabulary, 3 tokens, adapters of rank 2 on q, v."""
    config = opt(hidden_size=4, num_hidden_layers=1, ffn_dim=8, num_attention_heads=1, vocab_size=5,
                 word_embed_proj_dim=4)  # fmt: skip
    counted = batch_flops(config, 1, 3, Trained(2))
    square, mlp, logits, attention = 2 * 3 * 4 * 4, 2 * 3 * 4 * 8, 2 * 3 * 4 * 5, 2 * 3 * 3 * 4
    side = 2 * 3 * 4 * 2  # the product with A, or with B
    assert counted.adapter_forward == 2 * 2 * side
    assert counted.forward == 4 * square + 2 * mlp + logits + 2 * attention + counted.adapter_forward
    # no gradient for the embeddings: A and B, then A x; x none
    assert counted.adapter_backward == 2 * 3 * side
    # the output projection's x, the MLP's, the logits'; the gradients of q, of the probabilities and of v, none of k
    assert counted.backward == square + 2 * mlp + logits + 3 * attention + counted.adapter_backward
    assert counted.total == counted.forward + counted.backward


@given(
    st.integers(1, 64), st.integers(1, 64), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), max_size=4),
    st.sampled_from([("q_proj", "v_proj"), ("all-linear",), ("fc1",)]),
)  # fmt: skip
def test_what_a_rank_saves_is_linear_in_rank_and_tokens(rank, reference, batches, targets):
    """The whole runs' difference, attention and all, is the closed formula."""
    config = CONFIGS["opt"]
    tokens = sum(rows * length for rows, length in batches)
    low, high = (run_flops(config, batches, Trained(r, targets)) for r in (rank, reference))
    saved = flops.saved_by_rank(config, tokens, rank, reference, targets)
    assert high.total - low.total == high.adapters - low.adapters == saved
    if rank != reference:
        assert flops.implied_tokens(saved, config, rank, reference, targets) == pytest.approx(tokens, rel=1e-12)


def test_the_paper_models_cost_per_token_and_rank():
    """OPT-1.3B: 24 layers, q and v of 2048×2048: 6·(in + out) each, but the first block's inputs need no gradient."""
    opt_1b = transformers.OPTConfig(
        hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32, word_embed_proj_dim=2048
    )
    rule_of_thumb = flops.PAPER_PER_ADAPTER_PARAMETER * 24 * 2 * (2048 + 2048)
    assert flops.per_token_and_rank(opt_1b) == rule_of_thumb - 2 * 2 * 2048 == 1_171_456
    assert Fraction(flops.per_token_and_rank(opt_1b), rule_of_thumb) > Fraction(99, 100)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: batch_flops(transformers.GPT2Config(), 1, 1, FULL), "config.model_type='gpt2'"),
        (lambda: batch_flops(CONFIGS["opt"], 0, 1, FULL), "rows=0"),
        (lambda: batch_flops(CONFIGS["opt"], 1, 0, FULL), "length=0"),
        (lambda: batch_flops(CONFIGS["opt"], 1, 4, FULL, kept=5), "kept=5"),
        (lambda: batch_flops(CONFIGS["opt"], 1, 1, Trained(1, ("up_proj",))), r"\('up_proj',\).*q_proj"),
        (lambda: batch_flops(CONFIGS["opt"], 1, 1, Trained(1, ())), "targets=()"),
        (lambda: batch_flops(CONFIGS["opt"], 1, 1, Trained(1, ("lm_head",))), "lm_head"),
        (lambda: Trained(-1), "rank=-1"),
        (lambda: Trained(8, weights=True), "weights=True"),
        (lambda: flops.saved_by_rank(CONFIGS["opt"], 10, 0), "rank=0"),
        (lambda: flops.saved_by_rank(CONFIGS["opt"], -1, 4), "tokens=-1"),
        (lambda: flops.implied_tokens(1e9, CONFIGS["opt"], 8), "saves nothing"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_docstrings_numbers():
    assert doctest.testmod(flops).failed == 0


def test_an_unknown_decoder_can_be_described():
    config = CONFIGS["llama"]
    assert batch_flops(Architecture.of(config), 2, 5, Trained(2)) == batch_flops(config, 2, 5, Trained(2))
