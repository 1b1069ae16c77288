"""The paper's eight tables as experiments: their methods, tasks, sizes and learning rates.

A table is a list of lines (methods) over tasks. `searches` lists the runs of every entry: a grid search on the
development score, then every seed at the best rate. `fill` puts our scores next to the paper's. Figures 2 and 3 show
Tables 3 and 4. The paper leaves two things open. Where it writes COLA without a length we take three links (Table 1's
scores are those of length 3 in Table 3), so Tables 2, 5, 6 and 7 have three. In-context learning shows the protocol's
32 demonstrations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experiments import tasks
from experiments.methods import Method
from experiments.paper import cells, score_table
from experiments.paper.cells import Cell
from experiments.paper.published import Published, Score, protocol, published
from experiments.paper.score_table import Column, Entry, Row
from experiments.sweep import Outcome, RateSearch
from experiments.tasks import synthetic

HUB: Mapping[str, str] = MappingProxyType({"OPT-1.3B": "facebook/opt-1.3b", "Llama-2-7B": "meta-llama/Llama-2-7b-hf"})
"""The paper's models -> their names on the hub."""

FIGURES: Mapping[int, int] = MappingProxyType({2: 3, 3: 4})
"""Figure -> the table that it shows."""

LINKS = 3
"""The length of a chain where the paper does not give it."""


@dataclass(frozen=True)
class Line:
    """One method of a table.

    Attributes:
        label: as shown.
        method: of its runs.
        rates: learning rates to choose from; empty for methods that train nothing.
        reference: label of the line it is compared with, seed by seed; None for none.
        group: lines of a group are shown together.
        train, test: number of examples.
        short: the label in a figure.
        printed: the label in `experiments.paper.published`; empty if it is `label`.
        start: the rates to begin with; at an edge the search goes on. Empty for a search over all rates.
    """

    label: str
    method: Method
    rates: tuple[float, ...] = ()
    reference: str | None = None
    group: str = ""
    train: int = 1000
    test: int = 1000
    short: str = ""
    printed: str = ""
    start: tuple[float, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables, or a table of our own whose scores are shown next to one of the paper's.

    Attributes:
        number: of the paper's table, 1 to 8.
        lines: in order.
        saves: whether every task has a column with the training FLOPs that a line saves.
        name: of a table of our own; empty for the paper's.
        title: likewise.
        columns: keys of the tasks; empty for the paper's.
    """

    number: int
    lines: tuple[Line, ...]
    saves: bool = False
    name: str = ""
    title: str = ""
    columns: tuple[str, ...] = ()

    @cached_property
    def published(self) -> Published:
        """The paper's numbers."""
        return published(self.number)

    @property
    def model(self) -> str:
        """The hub name of the paper's model."""
        return HUB[self.published.model]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Keys of the tasks, such as `sst2`."""
        return self.columns or self.published.columns

    @property
    def called(self) -> str:
        """What it is called, for people: such as "Table 3"."""
        return f"table {self.name}" if self.name else f"Table {self.number}"

    @property
    def heading(self) -> str:
        """Its title, after the paper's number."""
        return self.title or f"{self.called}. {self.published.title}"

    def score(self, line: Line, task: str) -> Score | None:
        """The paper's score of a line; None if it prints none."""
        return self.published.score(line.printed or line.label, task)


@dataclass(frozen=True)
class Setting(cells.Circumstances):
    """How a table is run; the defaults are the paper's.

    Attributes:
        model: a folder or a hub name; None for the paper's model.
        seeds: of the comparison.
        search_seeds: the seeds over which a learning rate is judged; None for all, as in the paper.
        tasks: keys of the tasks to run; None for the table's.
        labels: labels of the lines to run; None for all.
        rates: how many of a line's learning rates to try, the largest; None for all.
        train, dev, test: the most examples; None for the table's number.
        epochs: passes; None for the paper's.
        bias: train the adapted layers' biases; None for the paper's choice.
    """

    model: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    search_seeds: tuple[int, ...] | None = None
    tasks: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    rates: int | None = None
    train: int | None = None
    dev: int | None = None
    test: int | None = None
    epochs: int | None = None
    bias: bool | None = None


Place = tuple[str, str]
"""An entry: label of the line, key of the task."""


def searches(table: PaperTable, setting: Setting) -> dict[Place, RateSearch[Cell]]:
    """The runs of every entry of `table`, in the order in which they should run: task by task.

    Raises:
        ValueError: a task or a line that the table does not have, or an invalid setting.
    """
    lines, names = _chosen(table, setting)
    return {
        (line.label, name): cells.search(
            _cell(table, line, name, setting),
            _rates(line, setting),
            setting.seeds,
            setting.search_seeds,
            line.start if setting.rates is None else (),
        )
        for name in names
        for line in lines
    }


def fill(
    table: PaperTable,
    setting: Setting,
    done: Mapping[Cell, Outcome],
    found: Mapping[Place, RateSearch[Cell]] | None = None,
    per_token: int | None = None,
) -> score_table.Table:
    """The table with our scores; entries with missing runs stay empty and are named.

    Args:
        table: the table.
        setting: of the runs.
        done: cell -> outcome.
        found: `searches(table, setting)`, if known.
        per_token: the adapters' FLOPs per token and rank (`flops.per_token_and_rank`), for Table 4; None leaves
            ours out.
    """
    found = searches(table, setting) if found is None else found
    lines, names = _chosen(table, setting)
    columns: list[Column] = []
    entries: dict[Place, Entry] = {}
    for name in names:
        columns.append(Column(name, tasks.task(name).name))
        if table.saves:
            columns.append(Column(f"{name}:flops", "FLOPs saved", ".2e", None))
        for line in lines:
            entries[line.label, name] = entry(found[line.label, name], done, table.score(line, name))
            if table.saves and (saved := _saved(table, line, name, found[line.label, name], done, per_token)):
                entries[line.label, f"{name}:flops"] = saved
    labels = {line.label for line in lines}
    return score_table.Table(
        title=_title(table, setting),
        columns=tuple(columns),
        rows=tuple(
            Row(line.label, line.label, line.reference if line.reference in labels else None, line.group, line.short)
            for line in lines
        ),
        entries=entries,
        seeds=setting.seeds,
        notes=tuple(_notes(table, setting)),
    )


def _chosen(table: PaperTable, setting: Setting) -> tuple[list[Line], list[str]]:
    names = list(table.tasks)
    if setting.tasks is not None:
        names = list(dict.fromkeys(tasks.key(tasks.task(name).name) for name in setting.tasks))
        unknown = [name for name in names if name not in table.tasks]
        if unknown or not names:
            raise ValueError(f"tasks={setting.tasks}: {table.called} has {', '.join(table.tasks)}")
    lines = list(table.lines)
    if setting.labels is not None:
        labels = [line.label for line in lines]
        unknown = [label for label in setting.labels if label not in labels]
        if unknown or not setting.labels:
            raise ValueError(f"lines={setting.labels}: {table.called} has {'; '.join(labels)}")
        lines = [line for line in lines if line.label in setting.labels]
    return lines, names


def _cell(table: PaperTable, line: Line, name: str, setting: Setting) -> Cell:
    """A run of an entry; its rate and seed are replaced."""
    facts, model = protocol(), table.published.model
    return Cell(
        model=setting.model or table.model,
        task=tasks.task(name).name,
        method=line.method,
        lr=line.rates[0] if line.rates else 0.0,
        seed=setting.seeds[0],
        train=_at_most(line.train, setting.train),
        dev=setting.dev,
        test=_at_most(line.test, setting.test),
        epochs=setting.epochs or facts.epochs,
        batch=facts.batch[model],
        bias=line.method.adapts and (facts.adapter_bias[model] if setting.bias is None else setting.bias),
        **setting.circumstances(),
    )


def _at_most(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)


def _rates(line: Line, setting: Setting) -> tuple[float, ...]:
    if setting.rates is None:
        return line.rates
    if setting.rates < 1:
        raise ValueError(f"rates={setting.rates}: at least one is tried")
    return line.rates[-setting.rates :]


def entry(search: RateSearch[Cell], done: Mapping[Cell, Outcome], printed: Score | None = None) -> Entry:
    """Test scores of the runs at the chosen rate, in percent; a run that diverged is NaN.

    Args:
        search: of the entry.
        done: cell -> outcome.
        printed: the paper's score.
    """
    rate = search.chosen(done)
    values: dict[int, float] = {}
    if rate is not None:
        for run in search.results(done):
            if run in done:
                values[run.seed] = done[run].get("test", float("nan"))
    return Entry(
        values,
        paper=None if printed is None else printed.mean,
        paper_std=None if printed is None else printed.std,
        note=f"lr {rate:g}" if rate else "",
    )


def _saved(
    table: PaperTable,
    line: Line,
    name: str,
    search: RateSearch[Cell],
    done: Mapping[Cell, Outcome],
    per_token: int | None,
) -> Entry | None:
    """FLOPs saved per run against rank 8 throughout; None for a line with rank 8 throughout."""
    reference, last = line.method.ranks[0], line.method.ranks[-1]
    if last == reference:
        return None
    values: dict[int, float] = {}
    if per_token is not None and search.chosen(done) is not None:
        for run in search.results(done):
            tokens = done.get(run, {}).get("tokens_by_link")
            if tokens is not None and len(tokens) == line.method.links:
                values[run.seed] = float((reference - last) * sum(tokens[1:]) * per_token)
    printed = table.score(line, name)
    return Entry(values, None if printed is None else printed.flops_saved)


def _title(table: PaperTable, setting: Setting) -> str:
    model = setting.model or table.published.model
    made_up = ", made-up data" if _made_up(setting) else ""
    return f"{table.heading} ({model}{made_up})"


def _made_up(setting: Setting) -> bool:
    return setting.data_dir is not None and (Path(setting.data_dir) / synthetic.NOTICE).exists()


def _notes(table: PaperTable, setting: Setting) -> Iterable[str]:
    printed = table.published
    if _made_up(setting):
        yield "Made-up data: these scores mean nothing."
    if setting.model is not None and setting.model != table.model:
        yield f"The paper's numbers are those of {printed.model}."
    if printed.note is not None:
        yield f"The paper: {printed.note}"
    if table.saves:
        yield (
            "FLOPs saved, ours: of one run against rank 8 throughout, (8 − r) × tokens of the second link × FLOPs per "
            "token and rank; a text that candidates share is read once, and padding is not counted. The paper's agree "
            "with those of one run (a row per candidate, with padding), not of five."
        )


def _adapters(optimizer: str = "AdamW") -> tuple[float, ...]:
    return protocol().grid(adapters=True, optimizer=optimizer)


def _lora(label: str = "LoRA", *, rank: int = 8, optimizer: str = "AdamW", **more: Any) -> Line:
    return Line(label, Method.lora(rank, base=_BASES[optimizer]), _adapters(optimizer), **more)


def _cola(
    label: str = "COLA",
    *,
    links: int = LINKS,
    ranks: Sequence[int] = (8,),
    optimizer: str = "AdamW",
    reference: str = "LoRA",
    **more: Any,
) -> Line:
    method = Method.cola(links, ranks, base=_BASES[optimizer])
    return Line(label, method, _adapters(optimizer), reference, **more)


def _finetune(model: str) -> Line:
    return Line("Finetune", Method("finetune"), protocol().grid(adapters=False, model=model), "LoRA")


def _pair(what: str, **more: Any) -> tuple[Line, Line]:
    """LoRA and COLA under the same condition, as a group."""
    lora, cola = f"LoRA, {what}", f"COLA, {what}"
    ranks = more.pop("rank", 8)
    return (
        _lora(lora, rank=ranks, group=what, **more),
        _cola(cola, ranks=(ranks,), reference=lora, group=what, **more),
    )


_BASES = {"AdamW": "AdamW", "SGD": "SGD", "AdaGrad": "Adagrad"}
"""The paper's names of base optimizers and ours."""

TABLES: Mapping[int, PaperTable] = MappingProxyType(
    {
        table.number: table
        for table in (
            PaperTable(1, (_lora(), _cola(), _finetune("OPT-1.3B"))),
            PaperTable(
                2,
                (
                    _lora(),
                    _cola(),
                    _finetune("Llama-2-7B"),
                    Line("ICL", Method("icl"), reference="LoRA"),
                    Line("0-shot", Method("zero-shot"), reference="LoRA"),
                ),
            ),
            PaperTable(
                3,
                (
                    _lora("length 1", short="1"),
                    *(_cola(f"length {n}", links=n, reference="length 1", short=f"{n}") for n in (2, 3)),
                ),
            ),
            PaperTable(
                4,
                (
                    _lora(),
                    *(_cola(f"COLA(8,{r})", links=2, ranks=(8, r) if r != 8 else (8,), short=f"8,{r}")
                      for r in (8, 6, 4, 2)),
                ),
                saves=True,
            ),
            PaperTable(5, (*_pair("SGD", optimizer="SGD"), *_pair("AdaGrad", optimizer="AdaGrad"))),
            PaperTable(6, (*_pair("100 samples", train=100, test=100), *_pair("50 samples", train=50, test=50))),
            PaperTable(7, (_lora(train=5000), _cola(train=5000))),
            PaperTable(8, tuple(line for rank in (16, 32, 64) for line in _pair(f"rank {rank}", rank=rank))),
        )
    }
)  # fmt: skip
"""Number -> table."""
