"""Runs that end early report it, on a random sample of images; audits run AutoAttack on survivors."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import Small, labelled

from robustkit import evaluate, verify
from robustkit.core.errors import RunError, UsageError
from robustkit.core.intervals import anytime_interval
from robustkit.engine.evaluation import early_stopping
from robustkit.engine.evaluation.early_stopping import shuffled
from robustkit.runs.evaluation_record import Report

SHAPE = (3, 6, 8)
SUITE = "pgd(steps=4),race(targets=3,probe=2,steps=4),square(queries=20)"
THREAT = "linf:0.02"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_stopping, "FIRST_BLOCK", 8)


def same(one: Report, other: Report) -> bool:
    """Whether their verdicts are the same on the images that both have; margins but for rounding."""
    theirs = {verdict.index: verdict for verdict in other.verdicts}
    pairs = [(verdict, theirs[verdict.index]) for verdict in one.verdicts]
    own, of_other = np.array([[a.margin, b.margin] for a, b in pairs]).T
    return all(replace(a, margin=0) == replace(b, margin=0) for a, b in pairs) and np.allclose(
        own, of_other, atol=1e-4
    )


def run(out: Path | None = None, n: int = 60, **options: Any) -> Report:
    net = Small().eval()
    x, y = labelled(net, n, SHAPE)
    return evaluate(net, x, y, THREAT, suite=SUITE, precision="fp32", out=out, **options)


def test_a_run_stopped_at_width_has_the_verdicts_of_the_whole_run() -> None:
    whole, part = run(), run(stop_at_width=0.45)
    assert part.stopped is not None
    assert (part.stopped.reason, part.stopped.images) == ("width", 60)
    assert part.n == len(part.verdicts) < 60
    rate = part.robust_accuracy
    assert rate.high - rate.low <= 0.45
    assert (rate.low, rate.high) == anytime_interval(round(rate.value * rate.n), rate.n)
    order = shuffled(60, 0)
    assert {verdict.index for verdict in part.verdicts} == set(order[: part.n].tolist())
    assert same(part, whole)
    assert Report.from_json(part.to_json()) == replace(part, adversarial=None)


def test_conditional_attacks_are_decided_by_the_current_block() -> None:
    """In the first there is nothing in scope to judge by."""
    net = Small().eval()
    x, y = labelled(net, 60, SHAPE)
    suite = f"{SUITE},pgd(steps=4)@mended?"
    part = evaluate(lambda x: (8 * net(x)).round() / 8, x, y, THREAT, suite=suite, stop_at_width=0.6)
    assert part.stopped is not None
    assert part.stages[-1].attack.endswith("@mended")
    assert part.stages[-1].forwards > 0


def test_the_run_stops_at_the_first_block_that_is_narrow_enough() -> None:
    part = run(stop_at_width=0.45)
    robust = {verdict.index: verdict.robust for verdict in part.verdicts}
    order = shuffled(60, 0)[: part.n].tolist()
    low, high = anytime_interval(sum(robust[index] for index in order[:8]), 8)
    assert high - low > 0.45


@pytest.mark.slow
def test_all_images_are_evaluated_if_the_width_is_never_reached() -> None:
    part = run(stop_at_width=0.01)
    assert part.stopped is None
    assert part.to_json().keys() == run().to_json().keys()
    assert part.robust_accuracy == run().robust_accuracy


def test_a_stopped_run_verifies_and_can_be_continued(tmp_path: Path) -> None:
    net = Small().eval()
    x, y = labelled(net, 60, SHAPE)
    part = run(tmp_path / "run", stop_at_width=0.45)
    again = run(tmp_path / "run", stop_at_width=0.45)
    assert again.verdicts == part.verdicts
    assert again.cost.forwards == part.cost.forwards
    assert not verify(tmp_path / "run", net, x, y).bad
    whole = run(tmp_path / "run")
    assert whole.stopped is None
    assert same(whole, run())
    assert not verify(tmp_path / "run", net, x, y).bad


@pytest.mark.slow
def test_the_time_limit_reports_whole_blocks_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr("time.perf_counter", clock)
    with pytest.raises(RunError, match="give it more time"):
        run(time_limit=0.02)
    for limit in (1.2, 1.8, 2.7, 4.0):  # the same call goes on, with more time
        with suppress(RunError):
            part = run(tmp_path / "run", time_limit=limit)
            if part.stopped is None or not part.stopped.unfinished:
                break
    assert part.stopped is not None
    assert part.stopped.reason == "time-limit"
    assert 8 <= part.n < 60
    assert {verdict.index for verdict in part.verdicts} == set(shuffled(60, 0)[: part.n].tolist())
    more = run(tmp_path / "run", time_limit=1000)
    assert more.stopped is None
    assert same(more, run())


def test_the_time_limit_in_the_first_block_counts_unfinished_images_both_ways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    net = Small().eval()
    x, y = labelled(net, 60, SHAPE)
    first = shuffled(60, 0)[:8]
    y[first[3]] = (y[first[3]] + 1) % int(y.max() + 1)  # one of the first block is wrong as it is
    monkeypatch.setattr("time.perf_counter", clock)
    seen, codes = [], []
    for limit in (0.02, 0.2, 0.4, 0.8, 1.6, 3.2):
        try:
            part = evaluate(
                net, x, y, THREAT, suite=SUITE, precision="fp32", out=tmp_path / f"{limit}", time_limit=limit
            )
        except RunError as error:
            codes.append(str(error))
            continue
        assert part.stopped is not None
        seen.append(part)
        assert not verify(tmp_path / f"{limit}", net, x, y).bad
        if not part.stopped.unfinished:
            break
    assert "no image was classified within 0.02 seconds" in codes[0]
    early = [part for part in seen if part.stopped and part.stopped.unfinished]
    assert early
    for part in early:
        assert part.stopped is not None
        left = part.stopped.unfinished
        assert part.n == 8
        assert (part.clean_accuracy.value, part.clean_accuracy.low) == (7 / 8, anytime_interval(7, 8)[0])
        robust, rate = sum(verdict.robust for verdict in part.verdicts), part.robust_accuracy
        assert (rate.value, rate.n) == (robust / 8, 8)
        assert (rate.low, rate.high) == (anytime_interval(robust - left, 8)[0], anytime_interval(robust, 8)[1])
        assert Report.from_json(part.to_json()) == replace(part, adversarial=None)
        (flag,) = [flag for flag in part.flags if flag.code == "unfinished-images"]
        assert (flag.value, flag.level) == (left, "warning")
    assert any(part.stopped and part.stopped.unfinished == 7 for part in early)  # none is finished
    assert not [flag for part in seen if part not in early for flag in part.flags if flag.code.startswith("unfin")]


def test_shuffled_orders_are_seeded_permutations() -> None:
    assert sorted(shuffled(50, 3).tolist()) == list(range(50))
    assert shuffled(50, 3).tolist() == shuffled(50, 3).tolist()
    assert shuffled(50, 3).tolist() != shuffled(50, 4).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_limit": 0.0}, "time_limit must be above 0, got 0."),
        ({"stop_at_width": 1.0}, "stop_at_width must be above 0 and below 1, got 1."),
        ({"stop_at_width": 0.1, "curve": True}, "leave out --curve"),
        ({"audit": -1}, "audit must be at least 0, got -1."),
    ],
)
def test_stopping_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(**options)


def test_coupled_attacks_cannot_stop_early() -> None:
    net = Small().eval()
    x, y = labelled(net, 4, SHAPE)
    with pytest.raises(UsageError, match="do not depend on the batch"):
        evaluate(net, x, y, THREAT, suite="autoattack:apgd-ce", time_limit=5)


def test_an_audit_runs_autoattack_on_survivors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("robustkit.engine.evaluation.run.AUDIT_SUITE", "apgd(steps=20)")
    net = Small().eval()
    x, y = labelled(net, 24, SHAPE)
    plain = evaluate(net, x, y, THREAT, suite="pgd(steps=1,step_size=0.3eps)", out=tmp_path / "run")
    survivors = [verdict.index for verdict in plain.verdicts if verdict.robust]
    audited = evaluate(
        net, x, y, THREAT, suite="pgd(steps=1,step_size=0.3eps)", out=tmp_path / "run", audit=len(survivors)
    )
    assert audited.verdicts == plain.verdicts
    audit = audited.audit
    assert audit is not None
    assert sorted(audit.audited) == survivors
    truth = evaluate(net, x[survivors], y[survivors], THREAT, suite="apgd(steps=20)")
    assert audit.broke == [survivors[v.index] for v in truth.verdicts if not v.robust]
    assert len(audit.broke) > 0
    assert "audit-broke" in {flag.code for flag in audited.flags}
    expected = (len(survivors) - len(audit.broke)) / 24
    assert audit.robust_accuracy.value == pytest.approx(expected)
    assert audit.robust_accuracy.low <= expected <= audit.robust_accuracy.high
    assert (
        evaluate(net, x, y, THREAT, suite="pgd(steps=1,step_size=0.3eps)", out=tmp_path / "run", audit=2)
        == audited
    )
    assert Report.from_json(audited.to_json()) == audited
    assert np.all(np.diff(audit.audited) > 0)
