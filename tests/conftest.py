"""Settings of all tests: `--slow`, one torch thread per worker, hypothesis without deadlines or surprises."""

from __future__ import annotations

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
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)
