"""The examples in the docstrings of the attack interface run and print what they say."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["composition", "driver", "oracles", "row_wise", "surrogates"])
def test_docstring_examples_run(name: str) -> None:
    found = doctest.testmod(import_module(f"robustkit.attack_api.{name}"))
    assert found.attempted
    assert not found.failed
