"""Settings of all tests: `--slow`, one torch thread per worker, hypothesis without deadlines and seeded."""

from __future__ import annotations

import os
import re
import zlib

import hypothesis
import pytest

hypothesis.settings.register_profile("robustkit", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("robustkit")


def pytest_configure(config):
    # foolbox 3.3.4 imports this from where scipy no longer keeps it.
    config.addinivalue_line("filterwarnings", "ignore:Please import `gaussian_filter`:DeprecationWarning")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in _other_norms(items):
        item.add_marker(pytest.mark.slow)
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


def _other_norms(items):
    """Return the cases that repeat a problem in another norm: one is run by default, chosen by the problem's hash.

    Cases are of one problem if they differ in `norm` or `threat` alone. A module or test marked `every_norm` tests
    code that each norm has of its own.
    """
    problems: dict[str, list[pytest.Item]] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        norm = params.get("norm", params.get("threat"))
        if isinstance(norm, str) and "every_norm" not in item.keywords:
            problem = re.sub(rf"(?<![^-\[]){re.escape(norm)}(?![^-\]])", "", item.nodeid)
            problems.setdefault(problem, []).append(item)
    for problem, cases in problems.items():
        chosen = zlib.crc32(problem.encode()) % len(cases)
        yield from (case for number, case in enumerate(cases) if number != chosen)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_flush_to_disk():
    """Leave files in the page cache: only a power failure could show the difference."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", os.fstat)
    yield
    patch.undo()
