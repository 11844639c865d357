"""Strings of the small languages: models, data, threats, suites, attacks. A wrong one is a UsageError."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from outcome import fuzzed, in_time
from words import strings

from robustkit import load_data, load_model
from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.models.strings import ModelString
from robustkit.registry import parse_attack, parse_suite

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("here")
    np.savez(folder / "d.npz", x=np.zeros((4, 1, 8, 8), np.float32), y=np.arange(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def refused_or(work: Callable[[str], object], text: str) -> None:
    with in_time(text):
        with contextlib.suppress(UsageError):
            work(text)


@fuzzed
@given(strings("threat"))
def test_threats(text: str) -> None:
    def work(text: str) -> None:
        threat = ThreatModel.parse(text)
        assert 0 <= float(threat.eps) < float("inf")
        assert ThreatModel.parse(str(threat)) == threat

    refused_or(work, text)


@fuzzed
@given(strings("suite"))
def test_suites(text: str) -> None:
    def work(text: str) -> None:
        entries = parse_suite(text, "linf")
        assert entries
        assert all(isinstance(entry.spec["name"], str) for entry in entries)

    refused_or(work, text)


@fuzzed
@given(strings("attack"))
def test_attacks_with_techniques(text: str) -> None:
    refused_or(lambda text: parse_attack(text, "linf"), text)


@fuzzed
@given(strings("model"))
def test_models(text: str) -> None:
    def work(text: str) -> None:
        if ModelString.parse(text).kind in ("robustkit", "timm", "torchvision"):
            assert load_model(text).fingerprint

    refused_or(work, text)


@fuzzed
@given(strings("data"))
def test_data(text: str) -> None:
    refused_or(lambda text: load_data(text).images([0]), text)
