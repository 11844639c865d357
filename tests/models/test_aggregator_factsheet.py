"""Fact sheets of aggregators against values derived by hand."""

from __future__ import annotations

import json

import pytest

from robustkit.cli import run
from robustkit.core.errors import UsageError
from robustkit.models.ensembles.aggregator_factsheet import fact_sheet


@pytest.mark.parametrize(
    ("k", "predictors", "classes", "ties"),
    [(2, 8, 10, 0.70), (3, 8, 10, 0.018), (2, 10, 10, 0.95), (3, 10, 10, 0.09), (2, 8, 100, 0.02)],
)
def test_ties_of_crossmax(k: int, predictors: int, classes: int, ties: float) -> None:
    sheet = fact_sheet(f"crossmax:{k}", predictors, classes)
    assert sheet.ties == pytest.approx(ties, abs=0.02)
    assert sheet.predictors_to_tie == k
    assert sheet.predictors_to_win == max(k, predictors - k + 1)
    # With k first places the winner is on the plateau; else it hangs on four logits at most.
    assert sheet.plateau > 0.05
    assert sheet.partials <= 4


def test_fact_sheet_of_crossmax() -> None:
    sheet = fact_sheet("crossmax:3", 8, 10)
    changes = {"constant on one class", "factor on one predictor"}
    assert {name for name, stays in sheet.invariances.items() if not stays} == changes
    assert 0.2 < sheet.unpredicted < 0.3
    assert sheet == fact_sheet("crossmax:3", 8, 10)


def test_one_controlled_predictor_wins_under_the_mean() -> None:
    sheet = fact_sheet("logits", 8, 10)
    assert (sheet.predictors_to_tie, sheet.predictors_to_win) == (1, 1)
    assert (sheet.plateau, sheet.ties, sheet.partials) == (0, 0, 8)
    assert {name for name, stays in sheet.invariances.items() if not stays} == {"factor on one predictor"}


def test_fact_sheets_of_other_aggregators() -> None:
    """The lower of two middle logits falls with a half of the predictors, and so do votes and probabilities."""
    median, vote, mean = (fact_sheet(name, 8, 10) for name in ("median", "vote", "probabilities"))
    assert median.predictors_to_win == vote.predictors_to_win == mean.predictors_to_win == 4
    assert median.partials == 1
    assert median.invariances["constant on one class"]
    assert not median.invariances["constant on one predictor"]
    assert vote.unpredicted == 0
    assert mean.invariances["constant on one predictor"]
    assert not mean.invariances["factor on all predictors"]
    assert all(sheet.invariances["order of predictors"] for sheet in (median, vote, mean))


def test_impossible_fact_sheets_are_refused() -> None:
    for name, predictors, classes, words in (
        ("crossmax:9", 8, 10, "k = 9"),
        ("logits", 1, 10, "2 or more"),
        ("logits", 8, 1, "2 or more"),
        ("max", 8, 10, "no combine 'max'"),
    ):
        with pytest.raises(UsageError, match=words):
            fact_sheet(name, predictors, classes)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["doctor", "--aggregator", "crossmax:3", "--predictors", "8", "--classes", "10"]
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert "3 of 8 predictors taken over" in printed
    assert "6 of 8 predictors taken over" in printed
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictors_to_win"] == 6
    assert run(["doctor", "robustkit:digits-cnn", "--aggregator", "vote"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
