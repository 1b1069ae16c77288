"""Models and tokenizers: real ones, saved by the test."""

import json

import pytest
import torch

from experiments import models
from experiments.models import ByteTokenizer
from experiments.paper.encoding import Encoder
from tests.experiments import small

transformers = pytest.importorskip("transformers")


@pytest.fixture
def saved(tmp_path):
    """A function that saves a random model with its tokenizer and returns the folder."""

    def save(kind, opening=True):
        folder = tmp_path / kind
        small.model(kind, torch.float32).save_pretrained(folder)
        small.tokenizer(opening).save_pretrained(folder)
        return str(folder)

    return save


def test_tiny_reads_bytes():
    model, tokenizer = models.load("tiny", device="cpu")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (model.dtype, model.training, model.config.vocab_size) == (torch.float32, False, 257)


def test_a_pretrained_tiny_model_is_known_by_its_folder(tmp_path):
    from experiments.tiny import tiny_opt

    configuration = tiny_opt.config(width=16, layers=1, heads=2, context=32)
    tiny_opt.save(tiny_opt.fresh(configuration, seed=0), tmp_path, {"made": "here"})
    model, tokenizer = models.load(str(tmp_path), "bf16", device="cpu")
    assert isinstance(tokenizer, ByteTokenizer)
    assert model.dtype == torch.bfloat16


def test_opt_opens_its_texts_as_in_the_protocol(saved):
    folder = saved("opt")
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("It")[0] == 2
    model, tokenizer = models.load(folder, device="cpu")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2, 1)
    assert Encoder(tokenizer).ids("It")[0] == 0
    assert (model.config.model_type, model.training, model.dtype) == ("opt", False, torch.float32)


def test_opt_opens_its_texts_even_if_its_tokenizer_does_not(saved):
    _, tokenizer = models.load(saved("opt", opening=False), device="cpu")
    assert Encoder(tokenizer).opening == (0,)


def test_opts_tokenizer_as_the_hub_has_it(saved, tmp_path):
    """Two files of byte pairs and a configuration that names `</s>` and asks for an opening token."""
    folder = tmp_path / "opt"
    saved("opt")
    pairs = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(pairs["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, pairs["merges"])))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False})
    )
    _, tokenizer = models.load(str(folder), device="cpu")
    expected = [0, *small.tokenizer().encode("It was great")[1:]]
    assert Encoder(tokenizer).ids("It was great") == tuple(expected)


def test_llama_pads_with_token_zero(saved):
    folder = saved("llama")
    tokenizer = small.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token_id is None
    _, tokenizer = models.load(folder, device="cpu")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 2)


@pytest.mark.parametrize(("name", "dtype"), list(models.DTYPES.items()))
def test_dtypes(saved, name, dtype):
    model, _ = models.load(saved("llama"), name, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_gradient_checkpointing_changes_no_gradient(saved):
    folder = saved("llama")
    gradients = []
    for checkpointing in (False, True):
        model, _ = models.load(folder, device="cpu", gradient_checkpointing=checkpointing)
        assert model.model.gradient_checkpointing == checkpointing
        model.train()
        ids = torch.arange(20).view(2, 10)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    # the second forward pass is the first one again
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_device_map(saved):
    pytest.importorskip("accelerate")
    model, tokenizer = models.load(saved("opt"), device_map={"": "cpu"})
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cpu")}
    assert Encoder(tokenizer).opening == (0,)


def test_what_cannot_be_loaded_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8' is none of float32, fp32"):
        models.load("tiny", "int8")
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto': give one of the two"):
        models.load("tiny", device="cpu", device_map="auto")
    with pytest.raises(OSError, match=r"(?s)model='no-one/nothing' is no folder here; .*hf download no-one/nothing"):
        models.load("no-one/nothing")
    with pytest.raises(OSError, match="is a directory, but not of a causal language model"):
        models.load(str(tmp_path))
