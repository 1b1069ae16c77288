"""The command line for chains on disk: ``cola inspect | verify | merge | export | import``."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from cola.chain import replay, spectrum
from cola.chain.chain import Chain
from cola.chain.files import write
from cola.chain.hub import load_base, save_merged
from cola.chain.on_disk import CHAIN, CHECKPOINT
from cola.chain.plot import draw
from cola.chain.summary import COLUMNS, plain
from cola.chain.summary import table as _table
from cola.checkpoint.directory import read_run
from cola.checkpoint.untied_link import UntiedLink, read_untied_link
from cola.common.version import __version__
from cola.knot.tie import RECORDED
from cola.lora.link import Link


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 1 if a check failed or something went wrong."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
            raise ValueError(f"--out {arguments.out} is a file: give a directory")
        result, text, status = arguments.run(arguments)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"cola {arguments.command}: {str(error).strip()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    try:
        print(json.dumps(plain(result), indent=1) if arguments.json else text, flush=True)
    except BrokenPipeError:  # the reader (head) has seen enough: keep Python from flushing at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


Answer = tuple[dict[str, Any], str, int]  # machine-readable, readable, exit status


def inspect(arguments: argparse.Namespace) -> Answer:
    """Show a chain's links, layers, norms, ranks and overlaps, and draw a picture."""
    chain, untied = _read(arguments.directory)
    result: dict[str, Any] = {
        "directory": str(arguments.directory),
        "links": [_link(chain, i, numbers) for i, numbers in enumerate(chain.summary().to_dict()["links"])],
        "live": _live(untied),
        "missing": chain.missing,
        "base": None if chain.base is None else {"name": chain.base.name, "digest": chain.base.digest},
        "layers": _layers(chain),
    }
    lines = [f"{arguments.directory}: {chain!r}"]
    if chain.base is not None:
        lines.append(f"base {chain.base.name or '(unnamed)'}, fingerprint {chain.base.digest}")
    lines += ["", _table([*COLUMNS.values(), "overlap out", "in", "seed"], _rows(chain, result["links"]))]
    lines += ["", "overlap: share of the link's directions that the link before it used"]
    if untied is not None:
        report = untied.link.report
        lines += ["", f"{untied}, is not included: rank {report.rank}, ‖ΔW‖ {report.delta_norm:.4g}"]
    if result["layers"]:
        header = ["layer", "out×in", "rank of Σ", "‖ΣΔW‖", *(f"‖ΔW_{k}‖" for k in range(min(len(chain), 8)))]
        layers = result["layers"].items()
        lines += ["", _table(header, [[n, x["shape"], x["rank"], x["norm"], *x["norms"][:8]] for n, x in layers])]
    if (result["layers"] or arguments.out) and not arguments.no_plot:
        out, wrote = arguments.out or arguments.directory, "inspect.json"
        try:
            write(out / "inspect.png", draw(chain))
            result["figure"], wrote = str(out / "inspect.png"), "inspect.png and inspect.json"
        except (ImportError, ValueError) as error:  # the tables need no picture
            lines += ["", f"no picture: {error}"]
        write(out / "inspect.json", json.dumps(plain(result), indent=1).encode())
        lines += ["", f"wrote {wrote} to {out}"]
    return result, "\n".join(lines), 0


def verify(arguments: argparse.Namespace) -> Answer:
    """Check that a chain is whole and belongs on a base; lists all checks, and exits with 1 if one fails."""
    checks: list[tuple[str, str | None]] = []

    def check(name: str, run: Callable[[], Any]) -> Any:
        try:
            found = run()
        except (ValueError, RuntimeError, OSError) as error:
            checks.append((name, str(error)))
            return None
        checks.append((name, None))
        return found

    chain = check("files are whole and unchanged", lambda: Chain.load(arguments.directory))
    if (arguments.directory / CHECKPOINT[0]).exists():
        check("the run's state is whole", lambda: read_run(arguments.directory))
    untied: UntiedLink | None = None
    if chain is not None:
        check("all links are there", lambda: chain._complete("verify"))
        check("factors are finite", lambda: _require_finite(chain))
    if chain is not None and all(problem is None for _, problem in checks):
        untied = read_untied_link(arguments.directory, chain)
        if untied is not None:
            check("the live link is finite", lambda: _require_finite([untied.link]))
    if chain is not None and all(problem is None for _, problem in checks):
        model = _base(arguments, chain)
        name = "base is the one that the chain was trained on"
        if chain.base is None:
            name = "layers fit the base (the base that the chain was trained on is not recorded)"
        links = tuple(chain)
        others = check(name, lambda: replay.check(model, links, chain.base))
        if others:
            checks[-1] = (f"{name}, except for {', '.join(others)}, which the chain replaces", None)
        if checks[-1][1] is None:
            check("tied again, every link does what its knot reported", lambda: _require_as_reported(model, chain))
    failed = any(problem is not None for _, problem in checks)
    result = {
        "directory": str(arguments.directory),
        "base": arguments.base,
        "ok": not failed,
        "live": _live(untied),
        "checks": [{"check": name, "ok": problem is None, "problem": problem} for name, problem in checks],
    }
    lines = [
        f"{'ok  ' if problem is None else 'FAIL'}  {name}" + (f": {problem}" if problem else "")
        for name, problem in checks
    ]
    if untied is not None:
        lines.append(f"note  {untied}, is not included: it is in the checkpoint alone")
    if arguments.out is not None:
        write(arguments.out / "verify.json", json.dumps(plain(result), indent=1).encode())
    return result, "\n".join(lines), int(failed)


def merge(arguments: argparse.Namespace) -> Answer:
    """Tie a chain into its base and save the model, ready for from_pretrained."""
    _require_elsewhere(arguments)
    if arguments.out.exists() and Path(arguments.base).exists() and arguments.out.samefile(arguments.base):
        raise ValueError(
            f"--out {arguments.out} is the base itself: the chain needs the untouched base, so save elsewhere"
        )
    chain, untied = _read(arguments.directory, live=arguments.live)
    if arguments.upto is not None:
        if arguments.live:
            raise ValueError("--live ties all links and --upto the first ones: give one of them")
        if not 0 <= arguments.upto <= len(chain):
            raise ValueError(f"--upto {arguments.upto}: the chain has {_links(len(chain))}, so give 0 to {len(chain)}")
    _require_links(chain, untied)
    chain._complete("merge")
    if any(factor.rounding == "stack" for link in chain for factor in link.factors.values()):
        raise ValueError(
            "the chain's links are stacked on quantised weights, where from_pretrained would not look for them: write "
            "an adapter by cola export, and load that on the base"
        )
    model = _base(arguments, chain)
    chain.apply(model, upto=arguments.upto)
    options = {"trust_remote_code": arguments.trust_remote_code, "offline": arguments.offline}
    save_merged(model, arguments.out, arguments.base, **options)
    count = len(chain) if arguments.upto is None else arguments.upto
    result = {"base": arguments.base, "links": count, "live": _live(untied, arguments.live), "out": str(arguments.out)}
    text = f"tied {_links(count)} into {arguments.base}, and saved the model to {arguments.out}"
    return result, _with_note(text, untied, arguments.live), 0


def export(arguments: argparse.Namespace) -> Answer:
    """Write a chain as one PEFT adapter for the original base."""
    _require_elsewhere(arguments)
    chain, untied = _read(arguments.directory, live=arguments.live)
    _require_links(chain, untied)
    chain.to_peft(arguments.out, r=arguments.rank, base_model=arguments.base)
    account = json.loads((arguments.out / "export.json").read_text())
    columns = account["ranks"].items(), account["norm"].values(), account["error"].values()
    rows = [[*layer, norm, error, error / norm if norm else 0.0] for layer, norm, error in zip(*columns)]
    table = _table(["layer", "rank", "‖ΔW‖", "error", "relative"], rows)
    text = _with_note(f"{table}\n\nwrote the adapter to {arguments.out}", untied, arguments.live)
    return {"out": str(arguments.out), "live": _live(untied, arguments.live), **account}, text, 0


def import_(arguments: argparse.Namespace) -> Answer:
    """Make a PEFT LoRA adapter the first link of a new chain."""
    taken = [name for name in (CHAIN[0], CHECKPOINT[0]) if (arguments.out / name).exists()]
    if taken and not arguments.force:
        raise ValueError(f"--out {arguments.out} holds {taken[0]}: give another directory, or --force to replace it")
    chain = Chain.from_peft(arguments.directory, rounding=arguments.rounding)
    chain.save(arguments.out)
    ranks = sorted({factor.rank for factor in chain[0].factors.values()})
    result = {"out": str(arguments.out), "layers": chain.layers(), "ranks": ranks}
    return result, f"{len(chain.layers())} layers of rank {ranks} are link 0 of the chain in {arguments.out}", 0


class _Help(argparse.HelpFormatter):
    """Says every option's default that its help does not say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings or action.required or action.default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text} (default: {'off' if action.default is False else action.default})"


def _parser() -> argparse.ArgumentParser:
    about = "Work with chains of LoRAs on disk."
    parser = argparse.ArgumentParser(prog="cola", description=about, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"cola {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Answer], directory: str) -> argparse.ArgumentParser:
        summary = (run.__doc__ or "").strip()
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=_Help)
        sub.set_defaults(run=run, base=None)
        sub.add_argument("directory", type=Path, metavar="DIR", help=directory)
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        sub.add_argument("--seed", type=int, default=0, help="for drawing parts that a base's files lack")
        return sub

    def base(sub: argparse.ArgumentParser) -> None:
        source = "the untouched base: a model directory or, if there is none of this name, a hub name"
        sub.add_argument("--base", required=True, metavar="MODEL", help=source)
        sub.add_argument("--offline", action="store_true", help="ask no hub: a directory, or the hub's cache")
        sub.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base")

    def live(sub: argparse.ArgumentParser, does: str) -> None:
        what = f"{does} a checkpoint's live link too, as opt.finish() would tie it"
        sub.add_argument("--live", action="store_true", help=what)

    chain = "directory of a chain or of a checkpoint"
    sub = command("inspect", inspect, chain)
    sub.add_argument("--out", type=Path, metavar="DIR", help="where inspect.png and inspect.json go (default: DIR)")
    sub.add_argument("--no-plot", action="store_true", help="write nothing")
    sub = command("verify", verify, chain)
    base(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="where verify.json goes (default: nowhere)")
    sub = command("merge", merge, chain)
    base(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the merged model goes")
    sub.add_argument("--upto", type=int, metavar="K", help="tie the first K links only (default: all)")
    live(sub, "tie")
    sub = command("export", export, chain)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the adapter goes")
    rank = "truncate to this rank (default: exact, the sum of the ranks)"
    sub.add_argument("--rank", type=int, metavar="R", help=rank)
    sub.add_argument("--base", metavar="MODEL", help="the base's name, for the adapter to note (default: the chain's)")
    live(sub, "export")
    sub = command("import", import_, "directory of a PEFT LoRA adapter")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the chain goes")
    rounding = "how ties round; for a quantised base 'stack' or 'requantize'"
    sub.add_argument("--rounding", default="nearest", choices=RECORDED, help=rounding)
    sub.add_argument("--force", action="store_true", help="replace a chain that is there already")
    return parser


def _read(directory: Path, *, live: bool = False) -> tuple[Chain, UntiedLink | None]:
    """A chain, and the live link next to it; with ``live`` that link is made the chain's last."""
    chain = Chain.load(directory)
    untied = read_untied_link(directory, chain)
    if live and untied is None and not (directory / CHECKPOINT[0]).is_file():
        raise ValueError(f"--live: {directory} holds a chain alone; a checkpoint from opt.save has a live link")
    if live and untied is not None:
        if untied.obstacle is not None:
            raise ValueError(f"--live: the {untied}, {untied.obstacle}")
        chain._append(untied.link)
        _require_finite([untied.link])
    return chain, untied


def _links(count: int) -> str:
    return f"{count} link{'' if count == 1 else 's'}"


def _require_elsewhere(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and arguments.directory.exists() and arguments.out.samefile(arguments.directory):
        raise ValueError(f"--out {arguments.out} is the chain's own directory: give another one")


def _require_links(chain: Chain, untied: UntiedLink | None) -> None:
    if not len(chain) and not chain.missing:
        live = "" if untied is None else f", and {untied}, is not included: --live includes it"
        raise ValueError(f"no link is tied yet{live}")


def _live(untied: UntiedLink | None, included: bool = False) -> dict[str, Any] | None:
    if untied is None:
        return None
    report = untied.link.report
    about = {"index": untied.link.index, "rank": report.rank, "steps": untied.steps, "norm": report.delta_norm}
    return {**about, "loss": report.loss, "included": included}


def _with_note(text: str, untied: UntiedLink | None, included: bool) -> str:
    if untied is None:
        return f"{text}\nthere is no live link: nothing has been trained since the last knot" if included else text
    return f"{text}\n{untied}, is {'included' if included else 'not included (--live includes it)'}"


def _base(arguments: argparse.Namespace, chain: Chain) -> Any:
    return load_base(
        arguments.base,
        chain,
        trust_remote_code=arguments.trust_remote_code,
        seed=arguments.seed,
        offline=arguments.offline,
    )


def _link(chain: Chain, i: int, numbers: dict[str, Any]) -> dict[str, Any]:
    found = {**numbers, "seed": chain[i].seed}
    for side in ("out", "in"):
        angles = list(chain.overlap(i - 1, i, side).values()) if i and chain.keep else []
        shares = [float(c.square().mean()) for c in angles if c.numel()]
        found[f"overlap_{side}"] = sum(shares) / len(shares) if shares else None
    return found


def _rows(chain: Chain, links: Sequence[dict[str, Any]]) -> list[list[Any]]:
    rows = chain.summary().texts()
    return [[*row, link["overlap_out"], link["overlap_in"], link["seed"]] for row, link in zip(rows, links)]


def _layers(chain: Chain) -> dict[str, Any]:
    if not chain.keep or chain.missing:
        return {}
    norms, found = chain.norms(), {}
    for layer in chain.layers():
        factor = next(link.factors[layer] for link in chain if layer in link.factors)
        values = chain.singular_values(layer)
        found[layer] = {
            "shape": "×".join(map(str, factor.shape)),
            "rank": spectrum.count(values, factor),  # as Chain.effective_rank, without another SVD
            "norm": values.square().sum().sqrt().item(),
            "norms": norms[layer],
            "singular_values": values.tolist(),
        }
    return found


def _require_finite(links: Iterable[Link]) -> None:
    for link in links:
        for layer, factor in link.factors.items():
            if not all(torch.isfinite(values).all() for triple in factor.triples() for values in triple[:2]):
                raise ValueError(f"link {link.index} has non-finite factors on layer {layer!r}")
            if not factor.norm() <= torch.finfo(torch.float32).max:
                raise ValueError(f"link {link.index} overflows on layer {layer!r}: ‖ΔW‖ is {factor.norm():.3g}")


def _require_as_reported(model: Any, chain: Chain) -> None:
    """Compare norms, which follow from the factors, and rounding losses, which also follow from the weights."""
    for link, ties in zip(chain, replay.tie_links(model, tuple(chain))):
        for layer, tie in ties.items():
            # other hardware sums and draws differently: norms agree to a few units of fp32, and losses, which are means
            # over all elements, to far less than a tenth
            report = link.report.layers.get(layer)
            if report is None or chain.base is None:
                continue
            slack = 0.1 * report.lost_norm + 1e-6 * report.delta_norm
            other_norm = abs(tie.delta - report.delta_norm) > 1e-5 * report.delta_norm
            if other_norm or abs(tie.lost - report.lost_norm) > slack:
                raise ValueError(
                    f"link {link.index} on layer {layer!r} adds {tie.delta:.6g} and loses {tie.lost:.6g} to rounding; "
                    f"its knot reported {report.delta_norm:.6g} and {report.lost_norm:.6g}"
                )


if __name__ == "__main__":
    sys.exit(main())
