"""A chain as a table: for reading, as JSON, as a DataFrame and in a notebook."""

import builtins
import html
import json
import math

import pytest
import torch

from cola import Chain, ChainOptimizer, KnotReport, LinkConfig, StepKnots
from cola.chain.summary import COLUMNS
from cola.lora.link import LayerReport, Link
from tests.models import BODY, Net, train


def chained(**options):
    model = Net()
    link = LinkConfig(r=(3, 2), target_modules=BODY)
    return model, ChainOptimizer(torch.optim.AdamW, model, policy=StepKnots(at=[2, 5]), link=link, lr=0.1, **options)


def made(count, **report):
    layers = {"a<b>": LayerReport(1.0, 0.0, "nearest", 4.0)}
    values = {"rank": 2, "delta_norm": 1.0, "lost_norm": 0.0, "loss": 1.0, "seconds": 0.1, "layers": layers, **report}
    return Chain([Link(i, 0, {}, {}, KnotReport(i, 10 * (i + 1), **values)) for i in range(count)])


@pytest.mark.parametrize("keep", [True, False])
def test_every_number_is_that_of_the_knots_report(keep):
    model, opt = chained(keep_links=keep)
    train(opt, model, 7)
    opt.finish()
    rows = opt.chain.summary().to_dict()["links"]
    assert [row["steps"] for row in rows] == [2, 3, 2]
    for row, report in zip(rows, opt.reports, strict=True):
        assert {name: row[name] for name in report.to_dict()} == report.to_dict()
        assert row["share"] == max(layer.delta_norm / layer.weight_norm for layer in report.layers.values())
        assert row["lost"] == report.lost_norm / report.delta_norm


def test_as_text_it_has_a_line_per_link():
    model, opt = chained()
    train(opt, model, 7)
    opt.finish()
    title, header, _, *lines = str(opt.chain.summary()).splitlines()
    assert title == repr(opt.chain) == "Chain(3 links, ranks [3, 2, 2])"
    assert all(heading in header for heading in COLUMNS.values())
    assert [line.split()[:4] for line in lines] == [["0", "2", "2", "3"], ["1", "5", "3", "2"], ["2", "7", "2", "2"]]
    assert len({len(line) for line in (header, *lines)}) == 1
    assert "\n" not in repr(opt.chain.summary())


def test_what_is_not_known_is_a_dash_and_null():
    chain = made(1, loss=None, layers={})
    assert {name: chain.summary().to_dict()["links"][0][name] for name in ("loss", "share")} == dict.fromkeys(
        ("loss", "share")
    )
    assert str(chain.summary()).splitlines()[-1].count("–") == 2
    assert made(2).summary().to_dict()["links"][1]["steps"] == 10
    rest = Chain(list(made(3))[1:])  # a framework dropped the first link
    assert [row["steps"] for row in rest.summary().to_dict()["links"]] == [None, 10]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_its_dict_is_json(loss):
    found = json.loads(json.dumps(made(1, loss=loss).summary().to_dict(), allow_nan=False))
    assert found["links"][0]["loss"] is None


def test_as_a_frame():
    pandas = pytest.importorskip("pandas")
    frame = made(3).summary().to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == [0, 1, 2]
    assert frame["share"].tolist() == [0.25] * 3
    assert made(0).summary().to_frame().empty


def test_a_frame_without_pandas_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"to_frame\(\) needs pandas: pip install pandas"):
        made(1).summary().to_frame()


def test_a_notebook_gets_a_small_table_without_markup_from_outside():
    assert Chain()._repr_html_() == "<code>Chain(0 links, ranks [])</code>"
    assert made(3)._repr_html_().count("<tr>") == 4
    long = made(100)._repr_html_()
    assert long.count("<tr>") == 22
    assert "<td>0</td>" in long
    assert "<td>99</td>" in long
    class_ = type("<script>", (StepKnots,), {})
    opt = ChainOptimizer(torch.optim.SGD, Net(), policy=class_(every=2), link=LinkConfig(r=1, target_modules=BODY))
    assert "<script>" not in opt._repr_html_()
    assert html.escape(repr(opt)) in opt._repr_html_()
