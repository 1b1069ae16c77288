"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import theory

MODULES = [m.name for m in pkgutil.iter_modules(theory.__path__) if m.name not in ("llm_gap",)]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"theory.{name}")
    import numpy as np

    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.failed == 0
