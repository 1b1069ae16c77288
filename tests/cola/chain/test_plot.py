"""The picture of a chain: what each panel shows, for chains of all shapes."""

import builtins
import itertools
import sys

import numpy as np
import pytest
import torch

from cola import Chain, ChainOptimizer, Factor, KnotReport, LayerReport, Link, LinkConfig, StepKnots
from cola.chain import spectrum
from cola.chain.plot import draw, layers_by_kind, spread
from tests.models import BODY, Net, train

pytest.importorskip("matplotlib")

LOSS = "Training loss at the knots"
MOVES, MOVE = "How far each link moved the layers", "How far the link moved the layers"
SPECTRUM, RANK = "Singular values of the whole update", "Rank of the whole update"
ALL = [LOSS, MOVES, SPECTRUM, RANK]


def made(links, layers, *, factors=True, loss=True, norm=4.0, size=6):
    """A chain without a run: every link adds ``rank`` random directions to each layer."""
    generator = torch.Generator().manual_seed(0)
    chain = []
    for index, rank in enumerate(links):
        pairs = {
            path: Factor(
                torch.randn(rank, size, generator=generator),
                torch.randn(size, rank, generator=generator),
                1.0,
                "nearest",
            )
            for path in layers
        }
        parts = {path: LayerReport(factor.norm(), 0.0, "nearest", norm) for path, factor in pairs.items()}
        whole = sum(part.delta_norm**2 for part in parts.values()) ** 0.5
        seen = 1.0 / (index + 1) if loss else None
        report = KnotReport(index, 10 * (index + 1), rank, whole, 0.0, seen, 0.0, parts)
        chain.append(Link(index, 0, pairs if factors else {}, {}, report))
    return Chain(chain, keep=factors)


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def texts(axes):
    return {text.get_text() for text in axes.texts}


BLOCKS = [f"model.layers.{i}.{name}" for i in range(3) for name in ("attn.q_proj", "attn.v_proj", "mlp.fc1")]

SHAPES = {
    "a chain": (made([2, 2, 1], BLOCKS), ALL),
    "one link": (made([2], BLOCKS), [MOVE, SPECTRUM]),
    "one layer": (made([2, 1], ["fc"]), ALL),
    "one link on one layer": (made([1], ["0"]), [MOVE, SPECTRUM]),
    "many links and layers": (made([1] * 30, [f"h.{i}.{n}" for i in range(12) for n in "abcdefghij"]), ALL),
    "links that were not kept": (made([2, 2], BLOCKS, factors=False), [LOSS, MOVES, RANK]),
    "one link that was not kept": (made([2], BLOCKS, factors=False), [MOVE]),
    "losses that nobody saw": (made([2, 2], BLOCKS, loss=False), [MOVES, SPECTRUM, RANK]),
    "weights of unknown norm": (made([2, 2], BLOCKS, norm=None), ALL),
    "links that changed nothing": (made([2, 2], ["fc"], size=6), ALL),
    "first links that are lost": (Chain(list(made([2, 2, 1], BLOCKS))[1:]), [LOSS, MOVES]),
    "ranks beyond the width": (made([4, 4, 4], ["fc"]), ALL),
}
for link in SHAPES["links that changed nothing"][0]:
    link.factors["fc"].B.zero_()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", SHAPES)
def test_every_panel_says_what_it_shows(shape):
    chain, wanted = SHAPES[shape]
    figure = chain.plot()
    assert list(panels(figure)) == wanted
    assert figure._suptitle.get_text().startswith("Chain of ")
    for title, axes in panels(figure).items():
        assert axes.get_xlabel(), title
        assert axes.get_ylabel() or [label.get_text() for label in axes.get_yticklabels()], title
    figure.set_layout_engine("none")  # the slowest part
    figure.draw_without_rendering()


def test_the_numbers_are_the_chains():
    """Medians and ranges by kind, the losses, and the reachable and the reached rank."""
    chain, layers = made([2, 2, 1], BLOCKS), 3
    found = panels(chain.plot())
    assert found[LOSS].lines[0].get_xydata().tolist() == [[10, 1.0], [20, 0.5], [30, pytest.approx(1 / 3)]]
    for line, band, name in zip(found[MOVES].lines, found[MOVES].collections, ("q_proj", "v_proj", "fc1"), strict=True):
        shares = [[100 * link.report.layers[p].share for p in BLOCKS if p.endswith(name)] for link in chain]
        assert line.get_xdata().tolist() == [0, 1, 2]
        assert line.get_ydata() == pytest.approx(np.median(shares, 1))
        edges = band.get_paths()[0].vertices
        assert edges[:, 1].min() == pytest.approx(np.min(shares))
        assert edges[:, 1].max() == pytest.approx(np.max(shares))
        assert f"{name} ({layers})" in texts(found[MOVES])
    first = found[SPECTRUM].lines[0].get_ydata()
    values = np.median([chain.singular_values(path).numpy() for path in BLOCKS if path.endswith("q_proj")], 0)
    assert first == pytest.approx(values)
    reachable, reached, large = (line.get_ydata().tolist() for line in found[RANK].lines)
    assert reachable == [2, 4, 5]
    assert reached == [2, 4, 5]
    assert large == [2, 4, 5]
    assert reached[-1] == np.median(list(chain.effective_rank().values()))
    assert {"reachable: Σr", "reached"} < texts(found[RANK])


def test_rank_beyond_the_width_is_not_reached():
    reachable, reached, _ = panels(made([4, 4, 4], ["fc"]).plot())[RANK].lines
    assert reachable.get_ydata().tolist() == [4, 8, 12]
    assert reached.get_ydata().tolist() == [4, 6, 6]


def test_a_run_that_starts_at_products_and_one_on_half_precision():
    for options in ({"init": "two-sided"}, {}):
        model = Net(dtype=torch.float32 if options else torch.bfloat16)
        link = LinkConfig(r=1, target_modules=BODY, **options)
        opt = ChainOptimizer(torch.optim.AdamW, model, policy=StepKnots(every=2), link=link, lr=0.1)
        train(opt, model, 5, dtype=next(model.parameters()).dtype)
        opt.finish()
        assert opt.chain.plot()
        assert [row["share"] > 0 for row in opt.chain.summary().to_dict()["links"]] == [True] * 3


@pytest.mark.parametrize("widths", [(3, 2), (2, 3, 2), (4, 4)])
def test_one_qr_gives_the_spectrum_of_every_first_part(widths):
    """Of tall factors and of factors wider than the layer."""
    factors = [link.factors["a"] for link in made(widths, ["a"], size=5)]
    counts = range(len(factors) + 1)
    for count, values in zip(counts, spectrum.of_first(factors, counts)):
        wanted = spectrum.singular_values(factors[:count]) if count else values.new_zeros(0)
        assert torch.allclose(values[: len(wanted)], wanted, rtol=1e-10, atol=1e-10)
        assert not (values[len(wanted) :] > 1e-10).any()


@pytest.mark.parametrize(
    ("paths", "kinds"),
    [
        (["h.0.q", "h.1.q", "h.0.v"], {"q": 2, "v": 1}),
        (["h.0.attn.out", "h.0.mlp.out"], {"attn.out": 1, "mlp.out": 1}),
        (["layer.0.att.out.dense", "layer.0.out.dense"], {"att.out.dense": 1, "layer.out.dense": 1}),
        (["0", "2"], {"layers": 2}),
        (["2"], {"layer 2": 1}),
        (["net.0", "net.2"], {"net": 2}),
        ([""], {"layer ": 1}),
        ([f"h.0.{part}.{n}" for part in "xyz" for n in "abc"], {"a": 3, "b": 3, "c": 3}),
        ([f"h.0.{n}" for n in "abcdefghi"] + ["h.1.i"], {"i": 2, **dict.fromkeys("abcde", 1), "3 other kinds": 3}),
    ],
)  # fmt: skip
def test_layers_are_put_together_by_kind(paths, kinds):
    found = layers_by_kind(paths)
    assert {name: len(group) for name, group in found.items()} == kinds
    assert sorted(path for group in found.values() for path in group) == sorted(paths)


@pytest.mark.parametrize("heights", [[0.5] * 5, [0, 0, 1, 1], [0.2, 0.21, 0.8], [-3, 0.5, 7], [0.99, 0.995, 1.0], []])
def test_names_keep_apart_and_inside(heights):
    places = spread(heights, 0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in itertools.pairwise(places))
    assert all(-1e-12 <= place <= 1 + 1e-12 for place in places)


def test_an_empty_chain_and_a_missing_library_are_named(monkeypatch):
    with pytest.raises(ValueError, match="an empty chain has nothing to draw"):
        Chain().plot()
    with pytest.raises(ValueError, match="nothing to draw: its links have neither factors nor norms of layers"):
        Chain([Link(0, 0, {}, {}, KnotReport(0, 1, 1, 1.0, 0.0, None, 0.0))], keep=False).plot()
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"matplotlib is missing \(pip install matplotlib\)"):
        made([1], ["fc"]).plot()


def test_drawing_leaves_pyplot_and_the_settings_alone():
    import matplotlib

    def state():
        pyplot = sys.modules.get("matplotlib.pyplot")
        return matplotlib.rcParams.copy(), pyplot, pyplot and pyplot.get_fignums()

    before = state()
    draw(made([1, 1], ["fc"]))
    assert state() == before


def test_the_command_line_draws_the_same():
    chain = made([2], BLOCKS)
    assert draw(chain) == chain.plot()._repr_png_()
    assert draw(chain).startswith(b"\x89PNG\r\n\x1a\n")
