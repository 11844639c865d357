"""Bounds the memory of fuzzing."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

BYTES = 16 << 30  # of addresses, of which torch alone takes several GiB


@pytest.fixture(autouse=True, scope="session")
def _bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
