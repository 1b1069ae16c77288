"""Lets pages include files of the repository: their links lead to pages of the site, and results get one form.

A link to a repository's file that is a page here leads to the page, one to any other file downloads it, and a link to a
folder becomes its name. In RESULTS.md a section starts with its pictures, and its command leaves the heading.
"""

import os
import re
from pathlib import Path

from docutils.nodes import make_id

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

#: the page of each file that has one
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "reference/changelog",
    "CONTRIBUTING.md": "contributing",
    "cola/chain/FORMAT.md": "reference/file-format",
    "cola/integrations/README.md": "how-to/index",
    "experiments/README.md": "reference/experiments",
    "experiments/RESULTS.md": "results/index",
    "theory/README.md": "explanation/theory",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
HEADING = re.compile(r"^(##+) (.+?)(?:: (`.*))?$", re.MULTILINE)
PICTURE = re.compile(r"^!\[.*\n", re.MULTILINE)


def relink(text: str, folder: Path) -> str:
    """Make the relative links of a text that lies in a folder valid on every page.

    >>> relink("[results](../experiments/RESULTS.md), [the code](../cola)", DOCS)
    '[results](/results/index.md), the code'
    """

    def link(match: re.Match[str]) -> str:
        mark, words, target, anchor = match.groups()
        path = Path(os.path.normpath(folder / target))
        if not target or "://" in target or target.startswith("/") or not path.exists():
            return match.group()
        if path.is_dir():
            return words
        page = PAGES.get(path.relative_to(ROOT).as_posix())
        if page is None:
            return f"{mark}[{words}](/{os.path.relpath(path, DOCS)}{anchor or ''})"
        if path.name == "RESULTS.md" and anchor:
            return f"{mark}[{words}](/{result_page(anchor[1:])}.md{anchor})"
        return f"{mark}[{words}](/{page}.md)"

    return LINK.sub(link, text)


def titles(text: str) -> list[str]:
    """The headings of RESULTS.md in order, without their commands."""
    return [match[2] for match in HEADING.finditer(text)]


def result_page(anchor: str) -> str:
    """The page that includes a section of RESULTS.md.

    >>> result_page("rates")
    'results/policies-and-rates'
    """
    found = titles((ROOT / "experiments" / "RESULTS.md").read_text())
    for page in sorted((DOCS / "results").glob("*.md")):
        for after, before in re.findall(r':start-after: "## (.*)"\n(?::end-before: "## (.*)")?', page.read_text()):
            sections = found[found.index(after) : found.index(before) if before else None]
            if anchor in map(make_id, sections):
                return f"results/{page.stem}"
    raise ValueError(f"no page in docs/results includes the section #{anchor} of experiments/RESULTS.md")


def arrange_results(text: str) -> str:
    """RESULTS.md with all its sections on one level: a heading, the section's pictures, its command, the rest.

    >>> print(arrange_results("### The map: `map`\\n\\nText.\\n\\n![Map](map.png)\\n"))
    ## The map
    <BLANKLINE>
    ![Map](map.png)
    <BLANKLINE>
    Measured by `map`.
    <BLANKLINE>
    Text.
    <BLANKLINE>
    <BLANKLINE>
    """
    starts = [match.start() for match in HEADING.finditer(text)]
    sections = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]
    arranged = [text[: starts[0]]]
    for section in sections:
        first, _, rest = section.partition("\n")
        _, title, command = HEADING.fullmatch(first).groups()
        pictures = PICTURE.findall(rest)
        lines = [f"## {title}", *pictures, f"Measured by {command}." if command else "", PICTURE.sub("", rest).strip()]
        arranged.append("\n\n".join(line.strip() for line in lines if line) + "\n\n")
    return "".join(arranged)


def included(app, relative: Path, parent: str, content: list[str]) -> None:
    """Adapt an included file."""
    path = (DOCS / relative).resolve()
    text = relink(content[0], path.parent)
    content[0] = arrange_results(text) if path.name == "RESULTS.md" else text


def source(app, docname: str, content: list[str]) -> None:
    """Adapt a page's own links."""
    content[0] = relink(content[0], (DOCS / docname).parent)


def setup(app):
    """Sphinx calls this."""
    app.connect("include-read", included)
    app.connect("source-read", source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
