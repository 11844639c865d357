"""The record: rates with intervals, run ids, JSON round trips."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from scipy import stats

from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.core.schema import FORMAT
from robustkit.runs.craft_record import CraftSpec
from robustkit.runs.diversity_record import DiversitySpec
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Cost, Outcome, Rate, Stage
from robustkit.runs.spec import RunSpec, dumps
from robustkit.runs.training_record import TrainSpec


def make_spec(**changes):
    return replace(
        RunSpec(
            model={"string": "timm:resnet50", "fingerprint": "ab" * 32},
            data={"string": "folder:val", "n": 3, "fingerprint": "cd" * 32},
            threat="linf:8/255",
            suite=[{"name": "pgd", "steps": 40, "step_size": 0.1}, {"name": "fgsm"}],
            seed=0,
        ),
        **changes,
    )


def make_report(**changes):
    spec = make_spec()
    return replace(
        Report(
            run_id=spec.run_id,
            spec=spec,
            n=3,
            clean_accuracy=Rate.of(2, 3),
            robust_accuracy=Rate.of(1, 3),
            stages=[Stage("clean", Rate.of(2, 3), 1, 3, 0, 0.25), Stage("pgd", Rate.of(1, 3), 1, 82, 80, 1.5)],
            cost=Cost(85, 80, 1.75),
            flags=[
                Flag("zero-gradient", "warning", 2.0, "gradients were zero", "distrust them"),
                Flag("non-finite", "info", None, "NaN", "look"),
            ],
            verdicts=[
                Outcome(0, 7, 7, True, None, 1.25),
                Outcome(1, 3, 3, False, "pgd", -0.1),
                Outcome(2, 1, 0, False, "clean", -3.0),
            ],
            environment={"torch": "2", "device": {"name": "cpu", "threads": 2}},
            files={"adversarial.npz": "ef" * 32},
        ),
        **changes,
    )


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 50000])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.5, 0.998, 1])
def test_intervals_of_rates_are_wilsons(n, share):
    hits = round(share * n)
    rate = Rate.of(hits, n)
    reference = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert rate.value == hits / n
    assert rate.n == n
    assert rate.low == pytest.approx(reference.low, abs=1e-12)
    assert rate.high == pytest.approx(reference.high, abs=1e-12)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_reports_round_trip_through_json():
    report = make_report()
    body = report.to_json()
    text = json.dumps(body, allow_nan=False)
    again = Report.from_json(json.loads(text))
    assert again == report
    assert json.dumps(again.to_json(), allow_nan=False) == text
    assert next(iter(body)) == "format"
    assert body["format"] == FORMAT
    assert list(json.loads("".join(report.text())).items()) == list(body.items())
    assert body["verdicts"][0]["attack"] is None
    assert body["spec"]["suite"][0]["steps"] == 40


def test_adversarial_images_are_not_in_the_json():
    report = make_report(adversarial={"x": object()})
    assert "adversarial" not in report.to_json()
    assert report == make_report()


@pytest.mark.parametrize("body", [{"format": FORMAT + 1}, {"format": "1"}, {}, {"format": None}, [], None, "x", 3])
def test_other_formats_are_refused_in_one_sentence(body):
    with pytest.raises(UsageError, match=rf"^this report has format .*; this version .* reads {FORMAT}\.$"):
        Report.from_json(body)


@pytest.mark.parametrize("part", ["run_id", "spec", "n", "clean_accuracy", "stages", "verdicts", "cost", "flags"])
@pytest.mark.parametrize("damage", ["gone", "number"])
def test_damaged_reports_are_refused_in_one_sentence(part, damage):
    body = make_report().to_json()
    if damage == "gone":
        del body[part]
    elif damage == "number" and part not in ("run_id", "n"):
        body[part] = 3
    else:
        return
    with pytest.raises(UsageError, match=r"^this report is damaged: "):
        Report.from_json(body)


def test_run_ids_are_pinned_and_do_not_depend_on_strings():
    spec = make_spec()
    assert len(spec.run_id) == 8
    assert int(spec.run_id, 16) >= 0
    elsewhere = make_spec(
        model={"fingerprint": "ab" * 32, "string": "/other/path.pt"},
        data={"n": 3, "fingerprint": "cd" * 32, "string": "npz:x"},
        suite=[{"step_size": 0.1, "steps": 40, "name": "pgd"}, {"name": "fgsm"}],
    )
    assert elsewhere.run_id == spec.run_id
    assert make_spec(suite=tuple(spec.suite)).run_id == spec.run_id
    read = RunSpec(**json.loads(dumps(spec)))
    assert read.run_id == spec.run_id


MODEL = {"string": "robustkit:digits-cnn", "fingerprint": "ab" * 32}
DATA = {"string": "digits:test", "n": 40, "fingerprint": "cd" * 32}
MI = {"string": "auto", "name": "mi-fgsm", "steps": 10, "techniques": [{"name": "di", "p": 0.5}]}
SIZE = (3, 16, 0.1, 3, 0.0, "none", "fp32", 5)


@pytest.mark.parametrize(
    ("run_id", "spec"),
    [
        ("1512a282", RunSpec(MODEL, DATA, "linf:8/255", [{"name": "pgd", "steps": 40, "step_size": 0.1}], 3, 64)),
        ("6fc6de1e", CraftSpec([MODEL] * 2, "consensus", [1.0, 0.5], MI, "next", DATA, "l2:0.5", 7)),
        ("93988c4b", TrainSpec({"name": "dverge", "eps": 0.2}, MODEL, DATA, None, *SIZE)),
        ("49123331", TrainSpec({"name": "dverge", "eps": 0.2}, MODEL, DATA, DATA, *SIZE)),
        ("506e3d92", DiversitySpec(MODEL, DATA, "linf:0.1", 50, 5, 1)),
        ("375831c5", DiversitySpec(MODEL, DATA, "linf:0.1", 50, 5, 1, [1, 4])),
    ],
)
def test_run_ids_are_those_of_the_first_version(run_id, spec):
    """A finished run is found again by them, so they never change without a new `format`."""
    assert spec.run_id == run_id
    assert type(spec)(**json.loads(dumps(spec))).run_id == run_id


def test_run_ids_depend_on_every_other_field():
    spec = make_spec()
    others = [
        make_spec(model={**spec.model, "fingerprint": "0"}),
        make_spec(model={**spec.model, "view": "mean"}),
        make_spec(data={**spec.data, "fingerprint": "0"}),
        make_spec(data={**spec.data, "n": 4}),
        make_spec(threat="linf:4/255"),
        make_spec(threat="l2:8/255"),
        make_spec(suite=[spec.suite[1], spec.suite[0]]),
        make_spec(suite=[{**spec.suite[0], "steps": 41}, spec.suite[1]]),
        make_spec(suite=[spec.suite[0]]),
        make_spec(seed=1),
        make_spec(batch_size=5),
        make_spec(verb="verify"),
        make_spec(format=FORMAT + 1),
    ]
    ids = [spec.run_id, *(other.run_id for other in others)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "value", [{1, 2}, frozenset(), object(), b"x", 1j, math.nan, math.inf, {"a": [-math.inf]}]
)
def test_dumps_refuses_values_that_json_cannot_hold(value):
    with pytest.raises((TypeError, ValueError)):
        dumps({"value": value})


def test_dumps_writes_canonical_json():
    assert dumps({"b": 1, "a": Rate(0.5, 0.25, 0.75, 4)}) == dumps({"a": Rate(0.5, 0.25, 0.75, 4), "b": 1})
    assert json.loads(dumps({"a": Rate(0.5, 0.25, 0.75, 4)})) == {
        "a": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    }
    assert json.loads(dumps(make_report().verdicts[1], indent=2))["attack"] == "pgd"


def test_the_record_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, robustkit.runs.evaluation_record; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("parts", [True, [1], [{"from": 3}]])
def test_a_resumed_run_records_the_versions_of_its_parts(parts):
    body = make_report().to_json()
    body["environment"] = {**body["environment"], "parts": parts}
    with pytest.raises(UsageError, match=r"environment\.parts"):
        Report.from_json(body)
