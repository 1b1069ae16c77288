"""Grids as text: small ones against what they must look like, hostile ones back through a reader."""

import csv
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report import formats
from experiments.report.formats import Grid, Text

GRID = Grid(
    ("", "WSC", "CB"),
    (
        (Text("LoRA"), Text("56.53 ± 7.67"), Text("75.35")),
        (Text("  paper"), Text("–"), Text("")),
        (Text("COLA"), Text("60.19", bold=True), Text("76.42")),
    ),
    groups=(0, 2),
)


def test_a_terminal():
    assert formats.aligned(GRID) == (
        "                  WSC     CB\n"
        "----------------------------\n"
        "LoRA     56.53 ± 7.67  75.35\n"
        "  paper             –\n"
        "\n"
        "COLA            60.19  76.42"
    )


def test_markdown():
    assert formats.markdown(GRID) == (
        "|  | WSC | CB |\n"
        "| :-- | --: | --: |\n"
        "| LoRA | 56.53 ± 7.67 | 75.35 |\n"
        "| &emsp;paper | – |  |\n"
        "| COLA | **60.19** | 76.42 |"
    )


def test_latex():
    assert formats.latex(GRID, "A & B", "tab:x") == "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\caption{A \& B}",
            r"\label{tab:x}",
            r"\begin{tabular}{lrr}",
            r"\toprule",
            r" & WSC & CB \\",
            r"\midrule",
            r"LoRA & 56.53 $\pm$ 7.67 & 75.35 \\",
            r"\quad paper & \textendash{} &  \\",
            r"\midrule",
            r"COLA & \textbf{60.19} & 76.42 \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def test_csv():
    written = formats.csv_text([{"a": 'say "x"', "b": 1.5}, {"a": None, "b": 2}], ["a", "b"])
    assert written == '"a","b"\n"say ""x""",1.5\n"",2\n'


def test_wide_and_combining_characters_keep_the_columns():
    grid = Grid(("", "n"), ((Text("日本"), Text("1")), (Text("e\u0301"), Text("2")), (Text("abcd"), Text("3"))))
    assert formats.aligned(grid).split("\n")[2:] == ["日本  1", "e\u0301     2", "abcd  3"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="has 1 fields, the header 2"):
        Grid(("a", "b"), ((Text("x"),),))


ANY = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.lists(st.lists(st.one_of(ANY, st.none(), st.floats(allow_nan=False, allow_infinity=False)), min_size=2,
                         max_size=2), max_size=4))  # fmt: skip
def test_csv_is_read_back_as_it_was(rows):
    records = [{"a": a, "b": b} for a, b in rows]
    read = list(
        csv.reader(io.StringIO(formats.csv_text(records, ["a", "b"]), newline=""), quoting=csv.QUOTE_NONNUMERIC)
    )
    assert read == [["a", "b"], *([("" if v is None else v) for v in row] for row in rows)]


#: what LaTeX prints for each of the commands that an escaped text may hold
PRINTS = {
    r"\textbackslash{}": "\\", r"\{": "{", r"\}": "}", r"\$": "$", r"\&": "&", r"\#": "#", r"\_": "_", r"\%": "%",
    r"\textasciicircum{}": "^", r"\textasciitilde{}": "~", r"\textless{}": "<", r"\textgreater{}": ">",
    r"\textbar{}": "|", r"\textasciigrave{}": "`", r"\textendash{}": "–", r"$\pm$": "±", "$-$": "−", r"$\times$": "×",
    r"$\cdot$": "·", r"$\to$": "→", r"$\Sigma$": "Σ", r"\textsubscript{2}": "₂", r"$\Delta$": "Δ", "{}": "",
}  # fmt: skip
TOKEN = re.compile("|".join(map(re.escape, sorted(PRINTS, key=len, reverse=True))))


def printed(source):
    """What LaTeX makes of it: commands replaced, anything that still has a meaning is an error."""
    out, place = "", 0
    for found in TOKEN.finditer(source):
        out += plain(source[place : found.start()])
        out, place = out + PRINTS[found.group()], found.end()
    return out + plain(source[place:])


def plain(text):
    assert not set(text) & set("\\{}$&#_%^~<>|`"), text
    assert "''" not in text
    return text


@given(st.one_of(ANY, st.text("\\{}$&#_%^~<>|`'\"-–±−×a 1", max_size=20)))
def test_latex_prints_what_was_written(text):
    flat = "".join(" " if c in "\n\r\t\x0b\x0c\u2028\u2029" or ord(c) < 32 or 127 <= ord(c) < 160 else c for c in text)
    assert printed(formats.escape_latex(text)) == flat


@given(st.text("|\\`*_a \n<~[$", max_size=20))
def test_markdown_keeps_its_columns(text):
    """No bar that is not escaped, and taking the escapes away gives the text."""
    line = formats.markdown(Grid(("", "n"), ((Text(text), Text("1")),))).split("\n")
    assert len(line) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line[2])) == 3
    assert re.sub(r"\\(.)", r"\1", formats.escape_markdown(text)) == text.replace("\n", " ")
