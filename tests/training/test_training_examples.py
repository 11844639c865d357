"""The examples in the docstrings of training methods, defenses and data."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("module", ["training.method", "data.load", "data.sources.arrays"])
def test_the_examples_run(module: str) -> None:
    results = doctest.testmod(import_module(f"robustkit.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
