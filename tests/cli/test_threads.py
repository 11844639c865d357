"""Idle threads sleep, unless the user has set how they wait."""

from __future__ import annotations

import os

import pytest

from robustkit.cli import WAIT_POLICY_VARIABLES, let_idle_threads_sleep


@pytest.mark.parametrize("variable", ["", *WAIT_POLICY_VARIABLES])
def test_idle_threads_sleep_unless_the_user_has_set_how_they_wait(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WAIT_POLICY_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if variable:
        monkeypatch.setenv(variable, "active")
    let_idle_threads_sleep()
    assert os.environ.get("OMP_WAIT_POLICY") == (
        "active" if variable == "OMP_WAIT_POLICY" else None if variable else "passive"
    )
