"""The robustness curve against closed forms, against the run that it belongs to, and under errors."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import Flat, Small, labelled

from robustkit import UsageError, evaluate, verify
from robustkit.core.rng import RowRng
from robustkit.engine.evaluation import eps_curve as engine
from robustkit.engine.evaluation.verdicts import image_hashes, sample_ids
from robustkit.engine.progress import Progress
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Curve
from robustkit.runs.spec import dumps

SHAPE = (3, 6, 8)
DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


def linear(norm: str, classes: int = 2) -> tuple[Flat, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a linear net, images, labels, and each image's distance to the boundary; the box is far away."""
    net = Flat(size=144, classes=classes).eval()
    x = 0.4 + 0.2 * labelled(net, 40, SHAPE)[0]
    logits = net(x).detach()
    y, weight = logits.argmax(1), net.linear.weight.detach()
    slopes = (weight[y][:, None] - weight[None]).norm(p=DUAL[norm], dim=2).clamp(min=1e-9)
    gaps = (logits.gather(1, y[:, None]) - logits) / slopes
    return net, x, y, gaps.scatter(1, y[:, None], torch.inf).amin(1)


def found(report: Report) -> Curve:
    assert report.curve is not None
    return report.curve


def rates(curve: Curve) -> list[float]:
    return [rate.value for rate in curve.robust_accuracy]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_distances_are_those_of_the_closed_form(norm: str) -> None:
    net, x, y, truth = linear(norm)
    eps = float(truth.median())
    report = evaluate(net, x, y, f"{norm}:{eps:.6f}", suite="pgd(steps=40,loss=margin)", curve=True)
    curve = found(report)
    ratios = [d / true for d, true in zip(curve.distances, truth.tolist(), strict=True) if d is not None]
    assert 20 < len(ratios) < 40
    assert 1 - 1e-5 < min(ratios)  # the net's float32
    assert max(ratios) < 1.02
    for distance, true in zip(curve.distances, truth.tolist(), strict=True):
        assert (distance is None) <= (true > 1.98 * eps)
    for radius, rate in zip(curve.radii, rates(curve), strict=True):
        least, most = ((truth > factor * radius).double().mean() for factor in (1.001, 0.98))
        assert least <= rate <= most


@pytest.mark.parametrize("norm", ["linf:0.05", "l2:0.5", "l1:4"])
def test_the_curve_is_decreasing_and_agrees_with_the_run_at_eps(norm: str) -> None:
    net = Small().eval()
    x, y = labelled(net, 30, SHAPE)
    y[:3] = (y[:3] + 1) % 10
    report = evaluate(net, x, y, norm, suite="pgd(steps=5)", curve=True)
    curve = found(report)
    assert len(curve.radii) == 16
    assert curve.robust_accuracy[7] == report.robust_accuracy
    assert curve.radii[7] == pytest.approx(float(norm.partition(":")[2]))
    assert rates(curve) == sorted(rates(curve), reverse=True)
    assert rates(curve)[0] > rates(curve)[-1]
    assert curve.distances[:3] == [0, 0, 0]
    for verdict, distance in zip(report.verdicts[3:], curve.distances[3:], strict=True):
        assert distance != 0
        assert (distance is None or distance > curve.radii[7]) == verdict.robust
    assert curve.cost.forwards > 0


def test_images_that_the_suite_missed_count_as_robust_and_raise_a_flag() -> None:
    net, x, y, truth = linear("linf")
    eps = 1.5 * float(truth.median())
    report = evaluate(net, x, y, f"linf:{eps:.6f}", suite="pgd(steps=1,step_size=0.01eps)", curve=True)
    curve = found(report)
    assert curve.robust_accuracy[7] == report.robust_accuracy
    assert report.robust_accuracy.value > (truth > eps).double().mean()
    missed = [flag for flag in report.flags if flag.code == "suite-too-weak"]
    inside = [d for d in curve.distances if d == np.nextafter(curve.radii[7], 1)]
    assert [flag.value for flag in missed] == [len(inside)]


def test_the_grid_ends_at_the_largest_possible_distance() -> None:
    net, x, y, _ = linear("linf")
    assert found(evaluate(net, x, y, "linf:0.8", suite="pgd(steps=3)", curve=True)).radii == pytest.approx(
        [k / 10 for k in range(1, 11)]
    )


def test_curves_of_all_misclassified_and_of_all_robust_images() -> None:
    net, x, y, _ = linear("linf")
    wrong = found(evaluate(net, x, 1 - y, "linf:0.01", suite="fgsm", curve=True))
    assert set(wrong.distances) == {0.0}
    assert (set(rates(wrong)), wrong.median) == ({0.0}, None)
    all_robust = found(evaluate(net, x, y, "linf:1/1000000", suite="fgsm", curve=True))
    assert set(all_robust.distances) == {None}
    assert (set(rates(all_robust)), all_robust.median) == ({1.0}, math.inf)


def test_distances_are_independent_of_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y, _ = linear("l2")
    x, y = x[:8], y[:8]
    whole = found(evaluate(net, x, y, "l2:0.02", suite="pgd(steps=5)", curve=True))
    monkeypatch.setattr(engine, "BATCH_SIZE", 5)
    parts = found(evaluate(net, x, y, "l2:0.02", suite="pgd(steps=5)", curve=True))
    assert parts.robust_accuracy == whole.robust_accuracy
    for one, other in zip(parts.distances, whole.distances, strict=True):
        assert one == other or one == pytest.approx(other, rel=1e-4)


def test_random_draws_of_the_curve_belong_to_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are numbered by the image's content, not by its place in the batch."""
    numbers = []

    def record(model: object, x: torch.Tensor, goal: object, threat: object, *, rng: RowRng) -> torch.Tensor:
        assert torch.equal(rng.ids, sample_ids(image_hashes(x)))
        numbers.extend(rng.ids.tolist())
        return x

    for name in ("ATTACK", "STRAIGHT"):
        monkeypatch.setattr(engine, name, record)
    net = Small().eval()
    x, y = labelled(net, 6, SHAPE)
    evaluate(net, x, y, "linf:0.03", suite="fgsm", curve=True)
    assert len(set(numbers)) > 3


class OutOfMemoryNet(Flat):
    """Runs out of memory above a number of images."""

    most = 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("no more")
        return super().forward(x)


class RecordedMessages(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_out_of_memory_halves_the_batch_and_continues(tmp_path: Path) -> None:
    net, (x, y) = OutOfMemoryNet(144, 2).eval(), linear("linf")[1:3]
    evaluate(net, x, y, "linf:0.01", suite="pgd(steps=5)", out=tmp_path / "r")
    roomy = found(evaluate(net, x, y, "linf:0.01", suite="pgd(steps=5)", curve=True))
    net.most, watch = 12, RecordedMessages()
    tight = evaluate(net, x, y, "linf:0.01", suite="pgd(steps=5)", out=tmp_path / "r", curve=True, progress=watch)
    assert watch.lines[0].endswith("its curve is searched now")
    assert watch.lines[1:] == [
        f"out of memory: going on with {most} images at a time, same numbers" for most in (20, 10)
    ]
    assert found(tight).robust_accuracy == roomy.robust_accuracy
    assert found(tight).cost.forwards == roomy.cost.forwards


def test_a_curve_added_later_is_the_same_and_is_stored(tmp_path: Path) -> None:
    net = Small().eval()
    x, y = labelled(net, 8, SHAPE)
    plain = evaluate(net, x, y, "linf:0.05", suite="pgd(steps=5)", out=tmp_path / "r")
    assert plain.curve is None
    assert "curve" not in json.loads((tmp_path / "r" / "report.json").read_text())
    (tmp_path / "r" / "report.html").write_text("made without the curve")
    later = evaluate(net, x, y, "linf:0.05", suite="pgd(steps=5)", out=tmp_path / "r", curve=True)
    assert not (tmp_path / "r" / "report.html").exists()
    at_once = evaluate(net, x, y, "linf:0.05", suite="pgd(steps=5)", curve=True)
    assert later.run_id == plain.run_id == at_once.run_id
    assert found(later).distances == found(at_once).distances
    seen = []
    net.register_forward_hook(lambda *_: seen.append(1))
    before = (tmp_path / "r" / "report.json").read_bytes()
    again = evaluate(net, x, y, "linf:0.05", suite="pgd(steps=5)", out=tmp_path / "r", curve=True)
    assert (again.curve, seen) == (later.curve, [])
    assert (tmp_path / "r" / "report.json").read_bytes() == before
    assert verify(tmp_path / "r", net, x, y).bad == []


def test_the_curve_round_trips_through_json() -> None:
    net, x, y, _ = linear("linf")
    report = evaluate(net, x, y, "linf:0.01", suite="fgsm", curve=True)
    assert Report.from_json(json.loads(dumps(report.to_json()))) == report
    assert Report.from_json(replace(report, curve=None).to_json()).curve is None
    body = report.to_json()
    body["curve"]["distances"].pop()
    with pytest.raises(UsageError, match="it has 39 distances in its curve for 40 images"):
        Report.from_json(body)
    del body["curve"]["radii"]
    with pytest.raises(UsageError, match="damaged"):
        Report.from_json(body)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its curve, of `linear("linf")` at the median distance."""
    folder = tmp_path_factory.mktemp("curve") / "r"
    net, x, y, truth = linear("linf")
    evaluate(net, x, y, f"linf:{float(truth.median()):.6f}", suite="pgd(steps=10)", out=folder, curve=True)
    return folder


FAULTS = {
    "rate": "its curve is not that of its distances",
    "distance": "is not that of its verdict",
    "radii": "radii of its curve do not rise",
    "at eps": "at eps, its robust accuracy is",
    "rising": "its curve is not that of its distances",
    "too few": "curve has 15 accuracies at 16 radii",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_checks_the_curve(fault: str, finished: Path, tmp_path: Path) -> None:
    net, x, y, truth = linear("linf")
    eps = float(truth.median())
    shutil.copytree(finished, tmp_path / "r")
    file = tmp_path / "r" / "report.json"
    body = json.loads(file.read_text())
    curve = body["curve"]
    if fault == "rate":
        curve["robust_accuracy"][2]["value"] += 0.025
    elif fault == "distance":
        stood = next(verdict["index"] for verdict in body["verdicts"] if verdict["robust"])
        curve["distances"][stood] = eps / 3
    elif fault == "radii":
        curve["radii"][7] *= 1.01
    elif fault == "at eps":
        curve["robust_accuracy"][7] = curve["robust_accuracy"][8]
    elif fault == "rising":
        curve["robust_accuracy"].reverse()
    else:
        curve["robust_accuracy"].pop()
    file.write_text(json.dumps(body))
    if fault == "too few":
        with pytest.raises(UsageError, match=FAULTS[fault]):
            verify(tmp_path / "r", net, x, y)
        return
    assert any(FAULTS[fault] in sentence for sentence in verify(tmp_path / "r", net, x, y).bad)


def test_eps_zero_has_no_curve() -> None:
    net, x, y, _ = linear("linf")
    with pytest.raises(UsageError, match="threat 'linf:0' has no curve; write an eps above 0"):
        evaluate(net, x, y, "linf:0", suite="fgsm", curve=True)
