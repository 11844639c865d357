"""Minimum norms against closed forms, and the properties of the returned points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Small, labelled
from teams import as_threads
from torch import nn

import robustkit
from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.engine.evaluation import batch_runner
from robustkit.engine.model import instrumented_model, profiling
from robustkit.runs import recorded_outputs, run_folder
from robustkit.runs.ledger import Ledger

NORMS = ("linf", "l2", "l1")


class LinearLogits(nn.Module):
    """Logits linear in the image, without a matrix product, whose rounding depends on the batch."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return ((x - 0.5).flatten(1)[:, None] * self.weight).sum(2)


def exact(weight, x, labels, norm):
    """Return the distances (B) of the nearest images in [0, 1] that another class takes."""
    found = []
    for image, label in zip(x.flatten(1).double(), labels.tolist(), strict=True):
        logits = weight.double() @ (image - 0.5)
        far = []
        for other in set(range(len(weight))) - {label}:
            slope = (weight[other] - weight[label]).double()
            gap = logits[label] - logits[other]
            room, size = torch.where(slope > 0, 1 - image, image), slope.abs()
            if norm == "l1":
                order = size.argsort(descending=True)
                gained = (size * room)[order].cumsum(0)
                if gained[-1] < gap:
                    continue
                last = int((gained < gap).sum())
                rest = gap - (gained[last - 1] if last else 0)
                far.append(float(room[order][:last].sum() + rest / size[order][last]))
                continue
            rate = torch.ones_like(size) if norm == "linf" else size
            low, high = 0.0, 1e6
            if (size * room).sum() < gap:
                continue
            for _ in range(100):
                middle = (low + high) / 2
                moved = torch.minimum(middle * rate, room)
                low, high = (low, middle) if (size * moved).sum() >= gap else (middle, high)
            moved = torch.minimum(high * rate, room)
            far.append(float(moved.max() if norm == "linf" else moved.norm()))
        found.append(min(far, default=np.inf))
    return torch.tensor(found, dtype=torch.float64)


def problem(shape, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, shape[1] * shape[2] * shape[3], generator=draw)
    x = torch.rand(shape, generator=draw)
    model = LinearLogits(weight)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "classes"), [((5, 3, 4, 6), 4), ((7, 1, 6, 5), 2)], ids=["rgb", "grey"])
def test_distances_of_linear_models_are_exact(shape, classes, norm):
    """The box is active: a random image has pixels near its ends."""
    model, x, y = problem(shape, classes, seed=3)
    found = robustkit.minimum_norm(model, x, y, norm, attack="shrinking-pgd-t(targets=3)")
    truth = exact(model.weight, x, y, norm)
    assert (found.distance >= truth * (1 - 1e-6)).all()
    assert (found.distance <= truth * (1.01 if norm == "l1" else 1.002)).all()
    assert (model(found.x).argmax(1) != y).all()
    assert ((found.x >= 0) & (found.x <= 1)).all()
    assert torch.equal(found.distance, ThreatModel.parse(f"{norm}:min").distance(found.x, x))


@pytest.mark.parametrize("norm", NORMS)
def test_auto_returns_the_nearest_point_of_all_attacks(norm):
    model, x, y = problem((3, 3, 2, 4), 3, seed=5)
    found = robustkit.minimum_norm(model, x, y, norm)
    truth = exact(model.weight, x, y, norm)
    assert ((found.distance >= truth * (1 - 1e-6)) & (found.distance <= truth * 1.001)).all()
    assert found.passes < 2000
    assert found.passes * len(x) == found.forwards + found.backwards


@given(seed=st.integers(0, 10**6), channels=st.sampled_from([1, 3]), classes=st.integers(2, 5))
@settings(max_examples=4)
@pytest.mark.parametrize("attack", ["fmn(steps=12)", "ddn(steps=12)", "fab-t(steps=4,targets=2)", "fab(steps=3)"])
def test_no_distance_is_below_the_exact_one(attack, seed, channels, classes):
    model, x, y = problem((4, channels, 3, 2), classes, seed)
    found = robustkit.minimum_norm(model, x, y, "l2", attack=attack, seed=seed)
    truth = exact(model.weight, x, y, "l2")
    assert (found.distance >= truth * (1 - 1e-6)).all()
    assert torch.equal(found.distance.isfinite(), (model(found.x).argmax(1) != y))


def test_misclassified_images_have_distance_zero_and_unfooled_images_have_none():
    model, x, y = problem((4, 3, 2, 5), 3, seed=1)
    wrong = (y + torch.tensor([1, 0, 1, 0])) % 3
    found = robustkit.minimum_norm(model, x, wrong, "l2", attack="ddn(steps=20)")
    assert found.distance[[0, 2]].tolist() == [0, 0]
    assert torch.equal(found.x[[0, 2]], x[[0, 2]])
    assert (found.attack[0], found.attack[1]) == ("clean", "ddn")
    constant = robustkit.minimum_norm(lambda x: x.flatten(1)[:, :3] * 0 + torch.arange(3), x, y * 0 + 2, "l2")
    assert constant.distance.isinf().all()
    assert constant.attack == [None] * 4
    assert torch.equal(constant.x, x)


@pytest.mark.parametrize("norm", ["l3", "l2:0.5"])
def test_norms_without_an_attack_are_refused_in_one_sentence(norm):
    model, x, y = problem((2, 1, 3, 4), 3, seed=1)
    with pytest.raises(UsageError, match=rf"^norm must be linf, l2 or l1, got '{norm}'\.$"):
        robustkit.minimum_norm(model, x, y, norm)


@pytest.mark.parametrize("attack", ["pgd", "fmn@mean-logit", "fmn?", "fnm"])
def test_attacks_that_find_no_minimum_are_refused_in_one_sentence(attack):
    model, x, y = problem((2, 1, 3, 4), 3, seed=1)
    with pytest.raises(UsageError, match=r"^[^\n]+\.$"):
        robustkit.minimum_norm(model, x, y, "l2", attack=attack)


SUITE = "fmn(steps=6),shrinking-pgd-t(steps=5,targets=2)"


def run(n=10, seed=0, net=None, **settings):
    net = net or Small().eval()
    x, y = labelled(Small().eval(), n, (3, 6, 8), seed)
    y[3] = (y[3] + 1) % 10
    return robustkit.evaluate(net, x, y, **{"threat": "l2:min", "suite": SUITE, "batch_size": 4, **settings})


def outcomes(report):
    return report.minimum, [(v.attack, v.margin) for v in report.verdicts], [s.fooled for s in report.stages]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return run(out=out), out


def test_a_run_reports_the_distance_of_every_image(whole):
    report, out = whole
    far = report.minimum.distances
    assert far[3] == 0
    assert report.verdicts[3].attack == "clean"
    assert not any(verdict.robust for verdict in report.verdicts)
    stored = run_folder.read_adversarial(out)
    x, _ = labelled(Small().eval(), 10, (3, 6, 8))
    clean = x[torch.from_numpy(stored["index"])]
    measured = ThreatModel.parse("l2:min").distance(torch.from_numpy(stored["x"]), clean)
    assert measured.tolist() == [far[index] for index in stored["index"]]
    assert report.stages[0].fooled + sum(stage.fooled for stage in report.stages[1:]) == 10
    in_order = sorted(far[:3] + far[4:])
    assert report.minimum.median.value == pytest.approx(in_order[4])
    assert (report.minimum.median.low, report.minimum.median.high) == (in_order[1], in_order[7])
    with Ledger.read(out / run_folder.LEDGER, report.run_id) as ledger:
        kept = {v.position: v.distance for chunk in ledger.chunks() for v in chunk.verdicts if chunk.stage}
    assert kept == {index: value for index, value in enumerate(far) if value}


def test_distances_do_not_depend_on_the_other_images(whole):
    assert run(n=5).minimum.distances == pytest.approx(whole[0].minimum.distances[:5], rel=1e-6)


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"workers": 2}], ids=str)
def test_distances_do_not_depend_on_batch_and_workers(settings, whole, monkeypatch):
    as_threads(monkeypatch)
    other = run(**settings)
    assert other.run_id == whole[0].run_id
    assert other.minimum.distances == pytest.approx(whole[0].minimum.distances, rel=1e-6)
    assert [v.attack for v in other.verdicts] == [v.attack for v in whole[0].verdicts]


class Interrupted(nn.Module):
    """A net that is interrupted after a number of images."""

    def __init__(self):
        super().__init__()
        self.net, self.left = Small().eval(), float("inf")

    def forward(self, x):
        self.left -= len(x)
        if self.left < 0:
            raise KeyboardInterrupt
        return self.net(x)


def test_a_killed_run_resumes(tmp_path, monkeypatch):
    for module in (instrumented_model, profiling):
        monkeypatch.setattr(module, "SLOW_BATCH_SECONDS", 0.0)
        monkeypatch.setattr(module, "PART_SECONDS", 0.0)
    monkeypatch.setattr(recorded_outputs, "WRITE_EVERY", 0.0)
    monkeypatch.setattr(recorded_outputs, "MAX_COST_SHARE", float("inf"))
    monkeypatch.setattr(batch_runner.BatchRunner, "_check", lambda self, x, positions: ([], []))
    net, broken = Interrupted(), 0
    expected = run(n=4, net=net, out=tmp_path / "whole")
    for _ in range(100):
        net.left = 25
        try:
            found = run(n=4, net=net, out=tmp_path / "pieces")
            break
        except KeyboardInterrupt:
            broken += 1
    assert broken > 1
    assert outcomes(found) == outcomes(expected)
    assert found.cost.forwards == expected.cost.forwards


def test_verify_recomputes_the_distances(whole):
    _, out = whole
    x, y = labelled(Small().eval(), 10, (3, 6, 8))
    y[3] = (y[3] + 1) % 10
    found = robustkit.verify(out, Small().eval(), x, y)
    assert (found.bad, found.borderline, found.checked) == ([], [], 9)


@pytest.mark.parametrize("part", ["distances", "median"])
def test_verify_finds_a_recorded_distance_that_is_too_small(part, whole, tmp_path):
    report, out = whole
    x, y = labelled(Small().eval(), 10, (3, 6, 8))
    y[3] = (y[3] + 1) % 10
    false = replace(report.minimum, distances=[0.99 * far for far in report.minimum.distances])
    if part == "median":
        false = replace(report.minimum, median=replace(report.minimum.median, value=0.001))
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    run_folder.write_report(tmp_path, replace(run_folder.read_report(out), minimum=false))
    bad = robustkit.verify(tmp_path, Small().eval(), x, y).bad
    assert any("minimum norms" in sentence for sentence in bad)
    assert (part == "median") or sum("its distance is" in sentence for sentence in bad) == 9


class RandomLogits(nn.Module):
    """A net with random logits."""

    def __init__(self):
        super().__init__()
        self.net = Small()

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"curve": True}, "curve"),
        ({"audit": 3}, "audit"),
        ({"strictness": 0.01, "suite": "auto"}, "strictness"),
        ({"stop_at_width": 0.1}, "width"),
        ({"precision": "bf16"}, "bf16"),
        ({"suite": "pgd"}, "pgd"),
        ({"suite": "rapid"}, "eps"),
        ({"net": RandomLogits()}, "random"),
    ],
    ids=["curve", "audit", "strictness", "width", "precision", "pgd", "rapid", "random"],
)
def test_options_that_need_an_eps_are_refused(settings, word):
    with pytest.raises(UsageError, match=rf"^[^\n]*{word}[^\n]*\.$"):
        run(**settings)


def test_other_verbs_need_an_eps():
    x, y = labelled(Small(), 3, (3, 6, 8))
    for verb in (robustkit.craft, robustkit.diversity):
        with pytest.raises(UsageError, match=r"^threat 'l1:min' is a search for minimum norms[^\n]+l1:12\.$"):
            verb(Small(), x, y, "l1:min")
    with pytest.raises(UsageError, match=r"minimum norms"):
        robustkit.train("pgd-at(threat=linf:min)", x, y)


def test_plan_forecasts_a_minimum_norm_run():
    x, y = labelled(Small().eval(), 9, (3, 6, 8))
    found = robustkit.plan(Small().eval(), x, y, "l2:min", suite=SUITE, seconds=20.0)
    # Steps and an answer more of each attempt, backwards for all but one; a ranking pass; verdicts.
    passes = 7 + 6 + 1 + 2 * (6 + 5) + 3
    assert found.propagations.value == pytest.approx(passes, abs=2)
    assert found.most == pytest.approx(passes, abs=4)
