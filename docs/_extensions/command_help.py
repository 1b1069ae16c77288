"""The directive `help`: what a command prints for ``--help``, taken from its parser while the site is built."""

import contextlib
import importlib
import io
import os
from unittest import mock

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


def help_of(module: str, *arguments: str) -> str:
    """The output of a module's ``main([*arguments, "--help"])``.

    >>> help_of("theory.fw_gap").splitlines()[0][:31]
    'usage: python -m theory.fw_gap '
    """
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="92"), contextlib.redirect_stdout(out):
        try:
            importlib.import_module(module).main([*arguments, "--help"])
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"{module} {' '.join(arguments)} --help stopped with {stop.code}") from None
    return out.getvalue()


class Help(SphinxDirective):
    """``{help} module [subcommand]``: the help as a literal block."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The block."""
        text = help_of(*self.arguments[0].split())
        return [nodes.literal_block(text, text, language="text")]


def setup(app):
    """Sphinx calls this."""
    app.add_directive("help", Help)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
