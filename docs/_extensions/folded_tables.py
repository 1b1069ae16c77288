"""Folds long tables, so that a page can be read without scrolling past them."""

from docutils import nodes

LONGEST = 14  # rows of a table that stays open
LONGEST_RESULT = 8  # on the pages of results, where the picture says it first


def fold(app, doctree: nodes.document, docname: str) -> None:
    """Wrap each long table in an element that opens on a click."""
    if app.builder.format != "html":
        return
    longest = LONGEST_RESULT if docname.startswith("results/") else LONGEST
    for table in list(doctree.findall(nodes.table)):
        rows = len(next(table.findall(nodes.tbody)).children)
        if rows > longest:
            opening = f"<details class='long-table'><summary>A table of {rows} rows</summary>"
            position = table.parent.index(table)
            table.parent.insert(position + 1, nodes.raw("", "</details>", format="html"))
            table.parent.insert(position, nodes.raw("", opening, format="html"))


def setup(app):
    """Sphinx calls this."""
    app.connect("doctree-resolved", fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
