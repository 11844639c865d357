"""The records of craft runs: what counts as success, forecasts, JSON round trips, pairs of runs."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from robustkit import UsageError
from robustkit.attack_api import compose
from robustkit.core.intervals import prediction_interval
from robustkit.registry import parse_attack
from robustkit.reporting.html import craft as craft_page
from robustkit.reporting.html.matrix import page
from robustkit.reporting.terminal.transfer import attack_words, differences, short_names
from robustkit.runs.craft_record import Craft, CraftSpec, Forecast, Judgement, Matrix, Point, Saved
from robustkit.runs.report_parts import Rate

NET = {"string": "robustkit:cifar-resnet20@/far/away/a.safetensors", "fingerprint": "f" * 64}
LABELS = [0, 1, 2, 3]


def judgement(adversarial: list[int], goals: list[int] | None = None, **more: list[int]) -> Judgement:
    clean = [0, 1, 2, 0]  # the last one is wrong as it is
    return Judgement.of(NET, LABELS, goals, {"clean": clean, "adversarial": adversarial, **more})


def craft(**changes: Any) -> Craft:
    spec = CraftSpec([NET], "gradients", None, {"string": "auto", "name": "mi-fgsm", "techniques": []}, None,
                     {"string": "d.npz", "n": 4, "fingerprint": "d"}, "linf:8/255", 0)  # fmt: skip
    body: dict[str, Any] = {
        "run_id": spec.run_id,
        "spec": spec,
        "n": 4,
        "gradients_per_image": 10.0,
        "forwards_per_image": 10.0,
        "seconds": 1.0,
        "labels": LABELS,
        "goals": None,
        "not_finite": 0,
        "surrogates": [judgement([1, 1, 1, 1])],
        "targets": [judgement([1, 0, 2, 3])],
        "environment": {},
    }
    return Craft(**{**body, **changes})


def test_success_is_over_correctly_classified_images() -> None:
    found = judgement([1, 1, -1, 1], noise=[0, 1, 1, 1], transplant=[1, 2, 0, 0])
    assert (found.n, found.clean_accuracy) == (3, 0.75)
    assert found.success == 1 / 3  # logits that are not finite fool nobody
    assert (found.noise, found.transplant) == (1 / 3, 1.0)
    assert found.fooled(LABELS, None) == [True, False, False, None]
    assert found.rate == Rate.of(1, 3)


def test_targeted_success_needs_the_target_class() -> None:
    assert judgement([1, 2, 3, 1], [1, 0, 3, 1]).fooled(LABELS, [1, 0, 3, 1]) == [True, False, True, None]


def test_no_correct_image_gives_no_rate() -> None:
    found = Judgement.of(NET, [0], None, {"clean": [1], "adversarial": [1]})
    assert (found.success, found.rate, found.noise, found.n) == (None, None, None, 0)


def test_the_record_round_trips_through_json() -> None:
    forecast = Forecast.of([[True, False, None, None], [True, True, None, None]], 30.0)
    assert forecast.expected == 0.75
    assert forecast.images == [1.0, 0.5, None, None]
    record = craft(
        forecast=forecast,
        budgets=[Point(1, None, None, None), Point(10, 5, 0.2, 10.0, [Rate.of(1, 3)])],
        png=Saved("png", 8, [None]),
    )
    body = json.loads(json.dumps(record.to_json()))
    assert Craft.from_json(body) == Craft.from_json(record.to_json())
    assert Craft.from_json(body).to_json() == body
    assert next(iter(body)) == "format"
    assert {"model", "clean_accuracy", "success", "success_low", "success_high", "n"} <= body["targets"][0].keys()
    broken: Any
    for broken in ({**body, "format": 2}, {**body, "n": 5}, {**body, "targets": [{}]}, []):
        with pytest.raises(UsageError):
            Craft.from_json(broken)


def test_the_run_id_does_not_depend_on_strings_and_targets() -> None:
    record = craft()
    moved = {**record.to_json()["spec"], "surrogates": [{**NET, "string": "elsewhere"}]}
    assert CraftSpec(**moved).run_id == record.run_id
    for name, value in (("seed", 1), ("combine", "loss"), ("targeted", "next"), ("threat", "linf:4/255")):
        assert CraftSpec(**{**moved, name: value}).run_id != record.run_id


def test_the_interval_of_an_unseen_model() -> None:
    assert prediction_interval([(3, 4)]) == (0.0, 1.0)
    low, high = prediction_interval([(90, 100), (92, 100), (88, 100), (91, 100)])
    assert 0.8 < low < 0.9 < high < 0.97
    wide_low, wide_high = prediction_interval([(97, 100), (96, 100), (98, 100), (5, 100)])
    assert wide_low < 0.01
    assert wide_high > 0.99
    # equal shares are no certainty: their own counts are uncertain, and their mean is in
    for counts, narrow in (([(0, 1), (0, 1)], 0.9), ([(100, 100)] * 3, 0.05), ([(50, 100)] * 4, 0.2)):
        low, high = prediction_interval(counts)
        assert low <= counts[0][0] / counts[0][1] <= high
        assert high - low > narrow
    assert prediction_interval([(100, 100)] * 3)[0] > 0.8
    # coverage: groups drawn from one distribution, the last one held out, by exact counting of a seed
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        shares = 1 / (1 + np.exp(-rng.normal(1, 1, 5)))
        hits = rng.binomial(200, shares)
        low, high = prediction_interval([(int(hit), 200) for hit in hits[:4]])
        inside += low <= hits[4] / 200 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_two_craft_runs_are_compared_in_pairs() -> None:
    a, b = craft(), craft(targets=[judgement([1, 1, 0, 3])])
    (found,) = differences(a, b)
    assert (found.n, found.value, found.only_a, found.only_b, found.p) == (3, 0.0, [1], [2], 1.0)
    with pytest.raises(UsageError, match="no target model in common"):
        differences(a, craft(targets=[]))


def test_short_names() -> None:
    model = "robustkit:cifar-resnet20@/x/at.safetensors"
    assert short_names([model, "timm:resnet50.a1_in1k", "m:f@/y/w.pt?defense=jpeg:75"]) == [
        "at",
        "resnet50.a1_in1k",
        "w?jpeg:75",
    ]
    assert short_names(["/x/csgld-1a2b/", "runs/csgld-1a2b/#3", "one"]) == ["csgld-1a2b", "csgld-1a2b/#3", "one"]
    assert short_names([model, "m:f@/z/at.pt"]) == [model, "m:f@/z/at.pt"]


@pytest.mark.parametrize(
    ("string", "printed"),
    [
        ("mi-fgsm(steps=3)+di", "mi-fgsm(steps=3)+di"),
        ("mi-fgsm+di", "mi-fgsm+di"),
        ("vmi-fgsm+di", "vmi-fgsm+di = mi-fgsm+vmi+di"),
        # Fields alone make it another attack than the one of that name.
        ("adam-cwa", "adam-cwa"),
    ],
)
def test_a_recipe_is_printed_with_its_parts(string: str, printed: str) -> None:
    attack = {**compose(parse_attack(string, "linf")).spec(), "string": string}
    assert attack_words(attack) == printed


def test_the_matrix_page_is_self_contained() -> None:
    evil = "robustkit:<script>alert(1)</script>"
    record = Matrix(
        run_id="12345678",
        models=["timm:a", evil],
        targets=["timm:c"],
        attack={"string": "auto", "name": "mi-fgsm", "techniques": []},
        targeted=None,
        data={"string": "/far/d.npz"},
        threat="linf:8/255",
        seed=0,
        n=50,
        gradients_per_image=[10.0, 10.0],
        clean_accuracy=[0.9, 0.8, 0.7],
        noise=[0.01, None, 0.0],
        success=[[Rate.of(40, 40), Rate.of(10, 40), None], [Rate.of(5, 40), Rate.of(39, 40), Rate.of(1, 30)]],
        worst=[Rate.of(40, 40), Rate.of(40, 40), Rate.of(1, 30)],
        folders=["a", "b"],
        environment={},
    )
    text = page(record)
    assert "<script" not in text
    assert "http" not in text
    assert text.count('class="same') == 2
    assert 'style="--share: 0.25"' in text
    assert "crafted on a, evaluated on" in text
    assert json.loads(json.dumps(record.to_json()))["success"][0][2] is None


def test_the_page_of_a_craft_run() -> None:
    forecast = Forecast.of([[True, False, None], [True, True, None]], 30.0)
    record = craft(
        surrogates=[judgement([1, 1, 1, 1]), judgement([0, 1, 2, 3])],
        targets=[
            judgement([1, 0, 2, 3], noise=[1, 1, 2, 3], transplant=[0, 1, 2, 3]),
            judgement([1, 1, -1, 1]),
            *(judgement([0, 0, 0, 0]) for _ in range(3)),
        ],
        forecast=forecast,
        budgets=[Point(1, None, None, None), Point(10, 5, 0.2, 10.0, [Rate.of(1, 3)] * 5),
                 Point(40, 20, 0.2, 40.0, [Rate.of(2, 3), None])],  # two came later
        png=Saved("<png>", 8, [Rate.of(1, 3)]),
    )  # fmt: skip
    text = craft_page.page(record, None)
    assert "<script" not in text
    assert "<png>" not in text
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert text.count('class="chart"') == 2 + 2  # success, forecast; five targets' curves in two charts
    assert "one step costs more" in text
    assert "Expected success on an unseen model: 75.0 %" in text
    assert "<tr><td>50 %</td><td>1</td></tr>" in text
    assert "the most of 5 targets" in text
    assert not re.search(r'="[^"]*(nan|inf)[%"]', text)
    arrays = {
        "index": np.arange(4), "distance": np.full(4, 0.03), "prediction": np.arange(4), "shown": np.array([0, 3]),
        "hard": np.zeros(2, bool), "clean": np.zeros((2, 3, 4, 4)), "adversarial": np.full((2, 3, 4, 4), 0.03),
        "shape": np.array([3, 4, 4]), "classes": np.array(["a", "b", "c", "<d>"]),
    }  # fmt: skip
    text = craft_page.page(craft(), arrays)
    assert text.count("data:image/png;base64,") == 6
    assert "difference × 16" in text
    assert ": a → b" in text
    assert "<d>" not in text
    alone = craft_page.page(craft(targets=[]), arrays)
    assert "No target model has been evaluated on these images yet" in alone
    assert "surrogate: a → b" in alone
