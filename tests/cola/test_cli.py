"""The command line on small model directories: what it prints, writes, refuses and returns."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from cola.cli import main
from tests.models import tiny_gpt2, tiny_opt

IDS = torch.arange(24).view(2, 12) % 30


def trained(model, **link):
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(**{"r": 2, **link}), lr=0.02)
    for _ in range(5):
        opt.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        opt.step()
    return opt


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base, chain, checkpoint and merged model of two runs: fp32 and bf16."""
    root = tmp_path_factory.mktemp("runs")
    for name, model in (("fp32", tiny_opt()), ("bf16", tiny_gpt2().to(torch.bfloat16))):
        model.save_pretrained(root / name / "base")
        opt = trained(model, bias="lora_only")
        opt.save(root / name / "checkpoint")
        opt.finish()
        opt.chain.save(root / name / "chain")
        model.save_pretrained(root / name / "merged")
    return root


@pytest.fixture(params=["fp32", "bf16"])
def run(request, made):
    return made / request.param


def weights(directory):
    from safetensors.torch import load_file

    return load_file(next(directory.glob("*.safetensors")))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_inspect_prints_tables_and_draws(run, tmp_path, capsys):
    assert main(["inspect", str(run / "chain"), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    chain = Chain.load(run / "chain")
    for layer, rank in chain.effective_rank().items():
        line = next(line for line in text.splitlines() if line.startswith(layer))
        assert f" {rank} " in line
    assert chain.base.digest in text
    for line in str(chain.summary()).splitlines()[3:]:
        assert any(" ".join(shown.split()).startswith(" ".join(line.split())) for shown in text.splitlines())
    assert (tmp_path / "inspect.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert set(json.loads((tmp_path / "inspect.json").read_text())["layers"]) == set(chain.layers())


def test_inspect_prints_json_and_writes_nothing_on_request(run, capsys):
    before = sorted(os.listdir(run / "checkpoint"))
    assert main(["inspect", str(run / "checkpoint"), "--json", "--no-plot"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [link["index"] for link in result["links"]] == [0, 1]
    chain = Chain.load(run / "checkpoint")
    for link, row in zip(result["links"], chain.summary().to_dict()["links"], strict=True):
        assert {name: link[name] for name in row} == row
        assert link["share"] > 0
    layer = chain.layers()[0]
    assert result["layers"][layer]["norms"] == chain.norms()[layer]
    assert result["layers"][layer]["singular_values"] == chain.singular_values(layer).tolist()
    assert sorted(os.listdir(run / "checkpoint")) == before


def test_verify_passes_on_the_right_base(run, tmp_path, capsys):
    for kind in ("chain", "checkpoint"):
        assert main(["verify", str(run / kind), "--base", str(run / "base"), "--out", str(tmp_path)]) == 0
        text = capsys.readouterr().out
        assert "FAIL" not in text
        assert text.count("ok ") == (7 if kind == "checkpoint" else 5)
    assert json.loads((tmp_path / "verify.json").read_text())["ok"]


def test_verify_fails_on_another_base_and_on_damage(made, tmp_path, capsys):
    chain = made / "fp32" / "chain"
    tiny_opt(seed=1).save_pretrained(tmp_path / "other")
    assert main(["verify", str(chain), "--base", str(tmp_path / "other")]) == 1
    assert "FAIL  base is the one that the chain was trained on: wrong base" in capsys.readouterr().out
    command = ["merge", str(chain), "--base", str(tmp_path / "other"), "--out", str(tmp_path / "merged")]
    assert main(command) == 1
    assert "wrong base" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    broken = tmp_path / "broken"
    shutil.copytree(chain, broken)
    next(broken.glob("link-00001-*")).unlink()
    assert main(["verify", str(broken), "--base", str(made / "fp32" / "base"), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert "link-00001" in result["checks"][0]["problem"]
    shutil.copytree(made / "fp32" / "checkpoint", tmp_path / "checkpoint")
    next((tmp_path / "checkpoint").glob("state-*")).write_bytes(b"")
    assert main(["verify", str(tmp_path / "checkpoint"), "--base", str(made / "fp32" / "base")]) == 1
    assert "FAIL  the run's state is whole" in capsys.readouterr().out
    bad = Chain.load(chain)
    bad[0].factors[bad.layers()[0]].B[0, 0] = float("nan")
    bad.save(tmp_path / "nan")
    assert main(["verify", str(tmp_path / "nan"), "--base", str(made / "fp32" / "base")]) == 1
    assert "link 0 has non-finite factors" in capsys.readouterr().out
    scaled = Chain.load(chain)
    scaled[1].factors[bad.layers()[0]].B.mul_(2)
    scaled.save(tmp_path / "scaled")
    assert main(["verify", str(tmp_path / "scaled"), "--base", str(made / "fp32" / "base")]) == 1
    assert "its knot reported" in capsys.readouterr().out


def test_verify_names_what_differs_elsewhere_and_what_the_chain_replaces(made, tmp_path, capsys):
    base, model = made / "fp32" / "base", tiny_opt()
    opt = trained(model, bias="lora_only")
    opt.finish()
    opt.chain.save(tmp_path / "chain")
    bias = "model.decoder.layers.0.self_attn.q_proj.bias"
    for name, status, text in (
        ("model.decoder.embed_positions.weight", 1, "FAIL  base is the one that the chain was trained on: wrong base"),
        ("model.decoder.layers.1.fc2.bias", 1, "wrong base: 'model.decoder.layers.1.fc2.bias' has other values"),
        (bias, 0, f"ok    base is the one that the chain was trained on, except for {bias}, which the chain replaces"),
    ):
        other = tiny_opt()
        with torch.no_grad():
            other.get_parameter(name).view(-1)[0] += 1
        other.save_pretrained(tmp_path / "other")
        assert main(["verify", str(tmp_path / "chain"), "--base", str(tmp_path / "other")]) == status
        assert text in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "chain"), "--base", str(base), "--json"]) == 0
    assert all("but for" not in check["check"] for check in json.loads(capsys.readouterr().out)["checks"])


def test_a_base_by_its_hub_name(made, tmp_path):
    """From the hub's cache, as after a download."""
    repository, revision = tmp_path / "models--some--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(made / "fp32" / "base", repository / "snapshots" / revision)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "cola.cli", "merge", str(made / "fp32" / "chain"), "--base", "some/model"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "merged")],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tied 3 links into some/model" in done.stdout
    assert same(weights(tmp_path / "merged"), weights(made / "fp32" / "merged"))


def test_a_base_in_mixed_precision_is_loaded_as_it_was(tmp_path, capsys):
    """As users make it: norms in fp32 in a model of half precision, from a file in either."""

    def mixed(dtype):
        model = tiny_opt().to(dtype).to(torch.bfloat16)
        for name, module in model.named_modules():
            if "norm" in name:
                module.float()
        return model

    for dtype in (torch.float32, torch.bfloat16):
        tiny_opt().to(dtype).save_pretrained(tmp_path / "base")
        model = mixed(torch.bfloat16)
        if dtype == torch.float32:
            for one, other in zip(model.parameters(), tiny_opt().parameters()):
                one.data.copy_(other)
        opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=2), lr=0.02)
        opt.tie()
        opt.chain.save(tmp_path / "chain")
        assert main(["verify", str(tmp_path / "chain"), "--base", str(tmp_path / "base")]) == 0
        assert "FAIL" not in capsys.readouterr().out


def test_merge_gives_the_trained_model(run, tmp_path, capsys):
    from transformers.utils import logging

    assert main(["merge", str(run / "chain"), "--base", str(run / "base"), "--out", str(tmp_path)]) == 0
    assert "%|" not in capsys.readouterr().err  # no progress bars in a pipe
    assert logging.is_progress_bar_enabled()
    assert same(weights(tmp_path), weights(run / "merged"))
    assert main(["merge", str(run / "chain"), "--base", str(run / "base"), "--out", str(tmp_path), "--upto", "0"]) == 0
    assert same(weights(tmp_path), weights(run / "base"))
    assert not list(tmp_path.glob("tokenizer*"))  # the base has none


def test_merge_takes_the_tokenizer_along_and_runs_no_code_of_its(made, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    base, mark = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(made / "fp32" / "base", base)
    made_up = Tokenizer(models.WordLevel({"knot": 0, "link": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=made_up, unk_token="?").save_pretrained(base)
    command = ["merge", str(made / "fp32" / "chain"), "--base", str(base), "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab() == {"knot": 0, "link": 1, "?": 2}
    (base / "mine.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Mine: pass\n")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["mine.Mine", None]}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert main([*command, str(tmp_path / "two")]) == 0
    assert same(weights(tmp_path / "two"), weights(made / "fp32" / "merged"))
    assert not mark.exists()


def test_a_reader_that_stops_early_is_no_error(made):
    command = [sys.executable, "-m", "cola.cli", "inspect", str(made / "fp32" / "chain"), "--no-plot", "--json"]
    root = Path(__file__).parents[2]
    done = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    assert done.stderr.read() == ""
    assert done.wait() == 0
    done.stderr.close()


def test_export_then_import_comes_back(run, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    assert main(["export", str(run / "chain"), "--out", str(tmp_path / "exact"), "--base", "a/name"]) == 0
    assert json.loads((tmp_path / "exact" / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/name"
    assert main(["export", str(run / "chain"), "--out", str(tmp_path / "r1"), "--rank", "1", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out[out.index("{") :])
    assert set(result["ranks"].values()) == {1}
    assert all(0 < error < norm for error, norm in zip(result["error"].values(), result["norm"].values()))
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "exact")
    assert main(["import", str(tmp_path / "exact"), "--out", str(tmp_path / "chain")]) == 0
    assert len(Chain.load(tmp_path / "chain")) == 1
    assert main(["verify", str(tmp_path / "chain"), "--base", str(run / "base")]) == 0
    assert "is not recorded" in capsys.readouterr().out


BAD = {
    "live in a chain": (["export", "{run}/chain", "--out", "{tmp}/x", "--live"], "holds a chain alone"),
    "live and some": (
        ["merge", "{run}/checkpoint", "--base", "{tmp}/nowhere", "--out", "{tmp}/x", "--live", "--upto", "1"],
        "--live ties all links and --upto the first ones",
    ),
    "no such chain": (["inspect", "{tmp}/nowhere"], "is not a directory"),
    "no such base": (["merge", "{run}/chain", "--base", "{tmp}/nowhere", "--out", "{tmp}/x"], "no such directory"),
    "rank 0": (["export", "{run}/chain", "--out", "{tmp}/x", "--rank", "0"], "r=0 must be a positive integer"),
    "upto": (
        ["merge", "{run}/chain", "--base", "{run}/base", "--out", "{tmp}/x", "--upto", "9"],
        "--upto 9: the chain has 3 links",
    ),
    "no adapter": (["import", "{run}/chain", "--out", "{tmp}/x"], "adapter_config.json is missing"),
    "the base as out": (["merge", "{run}/chain", "--base", "{run}/base", "--out", "{run}/base"], "is the base itself"),
    "a chain as out": (["import", "{run}/adapter", "--out", "{run}/chain"], "holds chain.json: give another directory"),
    "no model class": (["merge", "{run}/chain", "--base", "{run}/odd", "--out", "{tmp}/x"], "has no class 'logging'"),
    "unknown model": (["merge", "{run}/chain", "--base", "nope", "--out", "{tmp}/x"], "--base nope: "),
    "out is a file": (["import", "{run}/adapter", "--out", "{run}/base/config.json"], "config.json is a file: give a"),
    "merged to a file": (
        ["merge", "{run}/chain", "--base", "{run}/base", "--out", "{run}/base/config.json"],
        "is a file: give a",
    ),
    "exported to a file": (["export", "{run}/chain", "--out", "{run}/base/config.json"], "is a file: give a"),
    "drawn to a file": (["inspect", "{run}/chain", "--out", "{run}/base/config.json"], "is a file: give a"),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_are_one_message_without_traceback(what, made, tmp_path, capsys):
    Chain.load(made / "fp32" / "chain").to_peft(made / "fp32" / "adapter")
    shutil.copytree(made / "fp32" / "base", made / "fp32" / "odd", dirs_exist_ok=True)
    config = json.loads((made / "fp32" / "base" / "config.json").read_text())
    (made / "fp32" / "odd" / "config.json").write_text(json.dumps({**config, "architectures": ["logging"]}))
    arguments, message = BAD[what]
    assert main([a.format(tmp=tmp_path, run=made / "fp32") for a in arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.splitlines()[-1].startswith(f"cola {arguments[0]}: ")  # after transformers' progress bar
    assert "Traceback" not in captured.err
    assert not (tmp_path / "x").exists()


def test_a_pickled_base_is_not_read(made, tmp_path, capsys):
    """transformers would unpickle pytorch_model.bin where it finds no safetensors."""
    base = tmp_path / "base"
    shutil.copytree(made / "fp32" / "base", base)
    torch.save(weights(base), base / "pytorch_model.bin")
    next(base.glob("*.safetensors")).unlink()
    assert main(["merge", str(made / "fp32" / "chain"), "--base", str(base), "--out", str(tmp_path / "x")]) == 1
    assert "safetensors" in capsys.readouterr().err


def test_code_that_comes_with_a_model_is_not_run(made, tmp_path, capsys):
    base, mark = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(made / "fp32" / "base", base)
    (base / "modeling_mine.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import OPTConfig as MineConfig, OPTForCausalLM as MineForCausalLM\n"
    )
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }  # fmt: skip
    config["model_type"], config["architectures"] = "mine", ["MineForCausalLM"]
    (base / "config.json").write_text(json.dumps(config))
    command = ["verify", str(made / "fp32" / "chain"), "--base", str(base)]
    assert main(command) == 1
    assert not mark.exists()
    assert "trust" in capsys.readouterr().err


def test_help_and_version(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # argparse wraps lines
    for arguments in ([], ["inspect"], ["verify"], ["merge"], ["export"], ["import"]):
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--help"])
        assert left.value.code == 0
        text = capsys.readouterr().out
        if arguments:
            assert all(option in text for option in ("--json", "--out", "--seed"))
            assert "None" not in text
            required = {"--base", "--out"} if arguments != ["export"] else {"--out"}
            for option in text[text.index("options:") :].split("\n  -")[1:]:
                assert "default: " in option or f"-{option.split()[0]}" in {"-h,", *required}, option
    with pytest.raises(SystemExit) as left:
        main(["export"])
    assert left.value.code == 2


# a checkpoint whose live link is trained

LIVE = "live link 2, 1 step since its knot, is "
SAYS = {
    "inspect": (["inspect", "{ck}", "--no-plot"], f"{LIVE}not included: rank 2, ‖ΔW‖ "),
    "verify": (["verify", "{ck}", "--base", "{base}"], f"{LIVE}not included: it is in the checkpoint alone"),
    "merge": (["merge", "{ck}", "--base", "{base}", "--out", "{out}"], f"{LIVE}not included (--live includes it)"),
    "export": (["export", "{ck}", "--out", "{out}"], f"{LIVE}not included (--live includes it)"),
    "merge --live": (["merge", "{ck}", "--base", "{base}", "--out", "{out}", "--live"], f"{LIVE}included"),
    "export --live": (["export", "{ck}", "--out", "{out}", "--live"], f"{LIVE}included"),
}


def called(command, made, tmp_path, kind="checkpoint"):
    places = {"ck": made / "fp32" / kind, "base": made / "fp32" / "base", "out": tmp_path / "out"}
    return main([word.format(**places) for word in command])


@pytest.mark.parametrize("what", SAYS)
def test_a_command_says_that_the_live_link_of_a_checkpoint_is_left_out(what, made, tmp_path, capsys):
    command, message = SAYS[what]
    assert called(command, made, tmp_path) == 0
    assert capsys.readouterr().out.count(message) == 1
    assert called([*command, "--json"], made, tmp_path) == 0
    text = capsys.readouterr().out
    live = json.loads(text[text.index("{") :])["live"]
    assert (live["index"], live["rank"], live["steps"], live["included"]) == (2, 2, 1, "--live" in what)
    whole = Chain.load(made / "fp32" / "chain")[2]
    assert live["norm"] == pytest.approx(whole.report.delta_norm, rel=1e-6)
    if "--live" not in what:
        assert called(command, made, tmp_path, "chain") == 0
        assert "live link" not in capsys.readouterr().out


def test_merged_and_exported_live_links_are_those_of_a_finished_run(run, tmp_path):
    checkpoint = str(run / "checkpoint")
    assert main(["merge", checkpoint, "--base", str(run / "base"), "--out", str(tmp_path / "all"), "--live"]) == 0
    assert same(weights(tmp_path / "all"), weights(run / "merged"))
    Chain.load(run / "chain").to_peft(tmp_path / "finished")
    assert main(["export", checkpoint, "--out", str(tmp_path / "adapter"), "--live"]) == 0
    assert same(weights(tmp_path / "adapter"), weights(tmp_path / "finished"))


@pytest.mark.parametrize(("value", "problem"), [(float("nan"), "has non-finite factors"), (1e30, "overflows")])
def test_a_live_link_that_finish_would_refuse_is_refused(value, problem, tmp_path, capsys):
    tiny_opt().save_pretrained(tmp_path / "base")
    opt = ChainOptimizer(torch.optim.AdamW, tiny_opt(), StepKnots(at=[1]), link=LinkConfig(r=2), lr=0.02)
    for _ in range(2):
        opt.model(input_ids=IDS, labels=IDS).loss.backward()
        opt.step()
    for factor in opt.live.adapters():
        factor.data.fill_(value)
    opt.save(tmp_path / "run")
    base, out = ["--base", str(tmp_path / "base")], ["--out", str(tmp_path / "out"), "--live"]
    for command in (["merge", str(tmp_path / "run"), *base, *out], ["export", str(tmp_path / "run"), *out]):
        assert main(command) == 1
        assert f"link 1 {problem} on layer" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "run"), *base]) == 1
    assert f"FAIL  the live link is finite: link 1 {problem}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_asked_of_a_live_link_that_is_not_there(made, tmp_path, capsys):
    opt = ChainOptimizer(torch.optim.AdamW, tiny_opt(), StepKnots(at=[1]), link=LinkConfig(r=2), lr=0.02)
    opt.model(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()
    opt.save(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--live"]) == 0
    assert "there is no live link: nothing has been trained since the last knot" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "run")]) == 1
    assert "is the chain's own directory" in capsys.readouterr().err


def test_a_first_link_alone_is_shown_and_tied_on_request(tmp_path, capsys):
    tiny_opt().save_pretrained(tmp_path / "base")
    opt = ChainOptimizer(torch.optim.AdamW, tiny_opt(), StepKnots(every=9), link=LinkConfig(r=2), lr=0.02)
    opt.model(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()
    opt.save(tmp_path / "run")
    note = "live link 0, 1 step since the run began, is "
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"{note}not included: rank 2" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "adapter")]) == 1
    assert f"no link is tied yet, and {note}not included: --live includes it" in capsys.readouterr().err
    command = ["merge", str(tmp_path / "run"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "merged")]
    assert main(command) == 1
    assert "no link is tied yet" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "run"), "--out", str(tmp_path / "shown")]) == 0
    assert os.listdir(tmp_path / "shown") == ["inspect.json"]
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "adapter"), "--live"]) == 0
    opt.finish()
    opt.chain.to_peft(tmp_path / "finished")
    assert same(weights(tmp_path / "adapter"), weights(tmp_path / "finished"))


def test_tables_come_without_matplotlib_too(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # imported by another test perhaps
    assert main(["inspect", str(made / "fp32" / "chain"), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "no picture: matplotlib is missing (pip install matplotlib)" in text
    assert text.index("overlap out") < text.index("no picture")
    assert os.listdir(tmp_path) == ["inspect.json"]


def test_a_directory_is_looked_for_before_any_hub(made, tmp_path, monkeypatch, capsys):
    from huggingface_hub import file_download

    asked = []

    def ask(*args, **kwargs):
        asked.append(args)
        raise OSError("there is no network here")

    monkeypatch.setattr(file_download, "get_hf_file_metadata", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(made / "fp32")
    for base, words, message in (
        ("base", [], None),
        ("./base", ["--offline"], None),
        ("./bsae", [], "there is no such directory"),
        ("base/none", [], "the directory base has no none, and the hub's cache has no such model"),
        ("", [], "--base is empty"),
        ("a/b/c", [], "there is no such directory"),
        ("nowhere", ["--offline"], "no such directory, and the hub's cache has no such model"),
        ("some/model", ["--offline"], "no such directory, and the hub's cache has no such model"),
    ):
        command = ["merge", "chain", "--base", base, "--out", str(tmp_path / "out"), *words]
        assert main(command) == (message is not None), base
        assert (message or "") in capsys.readouterr().err
    assert not asked
    assert main(["merge", "chain", "--base", "nowhere", "--out", str(tmp_path / "out")]) == 1
    assert asked


def test_help_is_fast_to_load():
    """Nothing heavy is imported before a command needs it."""
    code = "import sys, cola.cli; print([m for m in ('transformers', 'peft', 'matplotlib') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
