"""The engine against pyautoattack called directly, against closed forms, and under errors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Faulty, Flat, Small, labelled
from pyautoattack import AutoAttack

from robustkit import RunError, UsageError, evaluate
from robustkit.engine.model import profiling
from robustkit.engine.progress import Progress
from robustkit.runs.evaluation_record import Report
from robustkit.runs.ledger import Ledger

SHAPE = (3, 6, 8)
QUICK = {
    "autoattack:apgd-ce": {"steps": 8},
    "autoattack:apgd-t": {"steps": 6},
    "autoattack:fab-t": {"steps": 4},
    "autoattack:square": {"queries": 60},
}
QUICK_SUITE = ",".join(f"{name}({','.join(f'{k}={v}' for k, v in f.items())})" for name, f in QUICK.items())
# Three of the official attacks at a tenth of the cost, where their strength does not matter.
SHORT_SUITE = "autoattack:apgd-ce(steps=3),autoattack:fab(steps=2,restarts=1),autoattack:square(queries=20)"


def robust(report: Report) -> list[bool]:
    return [verdict.robust for verdict in report.verdicts]


def by_hand(
    net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, norm: str, eps: float, batch: int
) -> list[bool]:
    """AutoAttack standard with shortened attacks, by its authors' own driver."""
    official = AutoAttack(net, norm=norm, eps=eps, seed=0, version="standard")
    official.apgd.n_iter = official.apgd.n_iter_orig = 8
    official.apgd_targeted.n_iter = official.apgd_targeted.n_iter_orig = 6
    for attack, steps in ((official.apgd, 8), (official.apgd_targeted, 6)):
        attack.n_iter_2, attack.n_iter_min, attack.size_decr = (
            max(int(share * steps), 1) for share in (0.22, 0.06, 0.03)
        )
    official.fab.n_iter = 4
    official.square.n_queries = 60
    x_adv, _ = official.run_standard_evaluation(x, y, batch_size=batch)
    with torch.no_grad():
        return (net(x_adv).argmax(1) == y).tolist()


@pytest.mark.parametrize("threat", ["linf:0.01", "l2:0.1", "l1:0.6"])
def test_same_verdicts_as_autoattack_by_hand(threat: str) -> None:
    norm, _, eps = threat.partition(":")
    net = Small().eval()
    x, y = labelled(net, 15, SHAPE)
    y[3] = (y[3] + 1) % 10  # one that is wrong from the start
    expected = by_hand(net, x, y, {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], float(eps), batch=8)
    found = evaluate(net, x, y, threat, suite=QUICK_SUITE, batch_size=8)
    assert 0 < sum(expected) < len(expected) - 1
    assert robust(found) == expected
    assert found.verdicts[3].attack == "clean"


def test_counts_are_those_of_an_independent_counter() -> None:
    net = Small()
    x, y = labelled(net, 12, SHAPE)
    seen = {"forward": 0, "backward": 0}
    net.body[0].register_forward_hook(lambda m, i, o: seen.update(forward=seen["forward"] + len(o)))
    # The gradient reaches the first layer's output once for every backward pass.
    net.body[0].register_full_backward_hook(lambda m, i, o: seen.update(backward=seen["backward"] + len(o[0])))
    report = evaluate(
        net, x, y, "linf:0.05", suite="autoattack:apgd-ce(steps=5),autoattack:fab(steps=3,restarts=2)"
    )
    assert report.cost.backwards == seen["backward"] - 1 > 0
    # The image that sizes the batch, and four looks at each of four for dice, are no part of the run.
    assert report.cost.forwards == seen["forward"] - 1 - 4 * 4
    assert report.cost.forwards == sum(stage.forwards for stage in report.stages)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("norm", ["linf:0.05", "l2:0.5", "l1:4"])
def test_models_with_few_classes_are_evaluated(classes: int, norm: str) -> None:
    net = Small(classes=classes)
    x, y = labelled(net, 6, SHAPE)
    suite = QUICK_SUITE + ",autoattack:apgd-dlr(steps=4),autoattack:fab(steps=3,restarts=1)"
    report = evaluate(net, x, y, norm, suite=suite)
    assert len(report.stages) == 7
    assert "few-classes" in {flag.code for flag in report.flags}


@pytest.mark.parametrize("suite", ["autoattack", "autoattack-plus", "autoattack-rand"])
def test_the_suites_are_autoattacks(suite: str) -> None:
    for norm, name in (("linf", "Linf"), ("l2", "L2"), ("l1", "L1")):
        version = suite.partition("-")[2] or "standard"
        official = AutoAttack(Flat(), norm=name, eps=0.1, version=version)
        from robustkit.registry import parse_suite

        ours = [entry.attack for entry in parse_suite(suite, norm)]
        assert [attack.info.name for attack in ours] == [f"autoattack:{n}" for n in official.attacks_to_run]
        for attack in ours:
            kind = attack.info.name.partition(":")[2]
            theirs = {"apgd-t": official.apgd_targeted, "square": official.square}.get(
                kind, official.fab if kind.startswith("fab") else official.apgd
            )
            l1 = norm == "l1"
            if kind.startswith("apgd"):
                assert attack.steps == theirs.n_iter
                assert attack.eot_iter == theirs.eot_iter
                restarts = attack.restarts or (5 if l1 else 1)
                large = l1 if attack.large_start is None else attack.large_start
                assert (restarts, large) == (theirs.n_restarts, theirs.use_largereps)
            if kind == "apgd-t":
                assert (attack.targets or (5 if l1 else 9)) == theirs.n_target_classes
            if kind == "fab":
                assert (attack.steps, attack.restarts) == (theirs.n_iter, theirs.n_restarts)
            if kind == "fab-t":
                assert (attack.steps, attack.restarts, attack.targets) == (100, 1, theirs.n_target_classes)
            if kind == "square":
                assert (attack.queries, attack.restarts) == (theirs.n_queries, theirs.n_restarts)


def test_a_second_run_in_the_process_has_the_same_flags() -> None:
    net, dynamic = Small(1), Faulty("dynamic")
    x, y = labelled(net, 6, (1, 6, 8))

    def flags(model: torch.nn.Module) -> set[str]:
        return {flag.code for flag in evaluate(model, x, y, "linf:0.05", suite=SHORT_SUITE).flags}

    before = flags(net)
    assert "test-time-optimisation" in flags(dynamic)
    assert flags(net) == before
    assert "test-time-optimisation" not in before


def test_eps_zero_is_clean_accuracy_and_more_eps_is_less_accuracy() -> None:
    net = Small()
    x, y = labelled(net, 10, SHAPE)
    y[:2] = (y[:2] + 1) % 10
    left = [
        evaluate(
            net, x, y, f"linf:{eps}", suite="pgd(steps=15),autoattack:apgd-ce(steps=15)"
        ).robust_accuracy.value
        for eps in ("0", "1/255", "4/255", "0.05", "0.3")
    ]
    assert left[0] == 0.8
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.2


def test_robust_accuracy_of_a_linear_net_is_exact() -> None:
    """Robust exactly where the closed-form distance to every other class exceeds eps."""
    net = Flat(size=144)
    x, y = labelled(net, 40, SHAPE)
    x = 0.4 + 0.2 * x  # the box stays out of the way
    y = net(x).argmax(1).detach()
    weight, logits = net.linear.weight.detach(), net(x).detach()
    gap = (logits.gather(1, y[:, None]) - logits) / (weight[y][:, None] - weight[None]).abs().sum(2).clamp(
        min=1e-9
    )
    distance = gap.scatter(1, y[:, None], torch.inf).amin(1)
    eps = float(distance.median())
    report = evaluate(net, x, y, f"linf:{eps}", suite="autoattack:apgd-ce,autoattack:apgd-t")
    clear = (distance - eps).abs() > 1e-4
    assert [r for r, c in zip(robust(report), clear, strict=True) if c] == (distance > eps)[clear].tolist()


class StopAfterChunks(Progress):
    """Stops the run after a number of chunks, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.messages: list[str] = []

    def say(self, text: str) -> None:
        self.messages.append(text)

    def advance(self, done: float, robust: int) -> None:
        if done == int(done):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def without_times(path: Path) -> str:
    """report.json without times and without the hash of the ledger, which holds times."""
    body = json.loads((path / "report.json").read_text())
    for stage in [*body["stages"], body["cost"]]:
        stage.pop("seconds")
    body["files"].pop("ledger.sqlite")
    return json.dumps(body)


def test_a_run_interrupted_anywhere_resumes_to_the_same_report(tmp_path: Path) -> None:
    net = Small()
    x, y = labelled(net, 20, SHAPE)
    suite = SHORT_SUITE + ",autoattack:apgd-dlr(steps=3)"

    def run(name: str, progress: Progress | None = None) -> Report:
        return evaluate(net, x, y, "linf:0.02", suite=suite, batch_size=6, out=tmp_path / name, progress=progress)

    whole = run("whole")
    # In the first and in the last chunk of an attack, between attacks, and near the end.
    for after in (1, 4, 5, 11):
        with pytest.raises(KeyboardInterrupt):
            run(f"cut{after}", StopAfterChunks(after))
        assert not (tmp_path / f"cut{after}" / "report.json").exists()
        with Ledger.open(tmp_path / f"cut{after}" / "ledger.sqlite", whole.run_id) as ledger:
            done = {(c.stage, c.chunk): c.seconds for c in ledger.chunks()}
        watch = StopAfterChunks(10**9)
        run(f"cut{after}", watch)
        assert any("resuming" in line for line in watch.messages)
        assert without_times(tmp_path / f"cut{after}") == without_times(tmp_path / "whole")
        with Ledger.read(tmp_path / f"cut{after}" / "ledger.sqlite", whole.run_id) as ledger:
            again = {(c.stage, c.chunk): c.seconds for c in ledger.chunks()}
        assert done.items() <= again.items()  # no finished chunk ran twice
        assert (tmp_path / f"cut{after}" / "adversarial.npz").read_bytes() == (
            tmp_path / "whole" / "adversarial.npz"
        ).read_bytes()


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    net = Small()
    x, y = labelled(net, 5, SHAPE)
    first = evaluate(net, x, y, "linf:0.02", suite="fgsm", out=tmp_path / "r")
    before = (tmp_path / "r" / "report.json").read_bytes()
    again = evaluate(net, x, y, "linf:0.02", suite="fgsm", out=tmp_path / "r")
    assert again == first == Report.from_json(json.loads(before))
    assert (tmp_path / "r" / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"threat": "linf:0.03"}, "threat"),
        ({"suite": "fgsm(loss=margin)"}, "suite"),
        ({"seed": 1}, "seed"),
    ],
)
def test_another_run_in_the_folder_is_refused(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    net = Small()
    x, y = labelled(net, 5, SHAPE)
    settings: dict[str, Any] = {"threat": "linf:0.02", "suite": "fgsm", "seed": 0}
    evaluate(net, x, y, out=tmp_path / "r", **settings)
    with pytest.raises(UsageError, match=f"differs in {word};"):
        evaluate(net, x, y, out=tmp_path / "r", **{**settings, **change})
    with pytest.raises(UsageError, match="differs in model;"):
        evaluate(Small(seed=1), x, y, out=tmp_path / "r", **settings)
    with pytest.raises(UsageError, match="differs in data;"):
        evaluate(net, x + 1e-4 * (x < 0.5), y, out=tmp_path / "r", **settings)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    net = Small()
    x, y = labelled(net, 5, SHAPE)

    class Second(Progress):
        error = ""

        def stage(self, name: str, images: int, robust: int, n: int) -> None:
            if not self.error:
                with pytest.raises(UsageError) as caught:
                    evaluate(net, x, y, "linf:0.02", suite="fgsm", out=tmp_path / "r")
                self.error = str(caught.value)

    watch = Second()
    evaluate(net, x, y, "linf:0.02", suite="fgsm", out=tmp_path / "r", progress=watch)
    assert watch.error.startswith("another process is working in")


class OutOfMemoryNet(Small):
    """Runs out of memory above a number of images."""

    limit = 10**9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return super().forward(x)


def test_out_of_memory_continues_with_smaller_pieces_and_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    net = OutOfMemoryNet()
    x, y = labelled(net, 16, SHAPE)
    suite = SHORT_SUITE + ",autoattack:apgd-t(steps=2),pgd(steps=4)"
    plenty = evaluate(net, x, y, "linf:0.02", suite=suite)
    monkeypatch.setattr(OutOfMemoryNet, "limit", 5)
    watch = StopAfterChunks(10**9)
    tight = evaluate(net, x, y, "linf:0.02", suite=suite, progress=watch)
    assert [line for line in watch.messages if "out of memory" in line]
    assert tight.environment["images_at_once"] == 4
    assert robust(tight) == robust(plenty)
    assert [s.fooled for s in tight.stages] == [s.fooled for s in plenty.stages]
    assert (tight.cost.forwards, tight.cost.backwards) == (plenty.cost.forwards, plenty.cost.backwards)
    monkeypatch.setattr(OutOfMemoryNet, "limit", 0)
    with pytest.raises(RunError, match="out of memory even with one image"):
        evaluate(net, x, y, "linf:0.02", suite=suite)


def test_an_evaluation_changes_no_global_state() -> None:
    net = Small()
    x, y = labelled(net, 6, SHAPE)
    net.train()
    weight = net.get_parameter("body.0.weight")
    weight.grad = torch.ones_like(weight)
    net.body[1].eval()
    net.body[2].weight.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x_before = x.clone()
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    report = evaluate(net, x, y, "linf:0.02", suite=SHORT_SUITE + ",foolbox:LinfPGD(steps=2)")
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == np.random.get_state()[1].tolist()
    assert generators[2] == random.getstate()
    assert modes == [module.training for module in net.modules()]
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True, True, True]
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert torch.equal(x, x_before)
    assert {flag.code for flag in report.flags} == {"training-mode"}


def test_own_attacks_are_independent_of_the_batch_size() -> None:
    net = Small().double()
    x, y = labelled(Small(), 23, SHAPE)
    runs = [
        evaluate(lambda images: net(images.double()), x, y, "linf:0.02", suite="pgd(steps=6)", batch_size=size)
        for size in (1, 7, 23)
    ]
    assert robust(runs[0]) == robust(runs[1]) == robust(runs[2])
    assert len({run.run_id for run in runs}) == 1


@pytest.mark.parametrize("wrap", [lambda z: (z, None), lambda z: {"aux": None, "logits": z}, lambda z: [z]])
def test_outputs_that_hold_the_logits(wrap: object) -> None:
    net = Small()
    x, y = labelled(net, 4, SHAPE)
    assert evaluate(lambda images: wrap(net(images)), x, y, "linf:0", suite="fgsm").robust_accuracy.value == 1


def test_stored_adversarials_are_the_verified_points(tmp_path: Path) -> None:
    net = Small()
    x, y = labelled(net, 20, SHAPE)
    report = evaluate(net, x, y, "linf:4/255", suite=SHORT_SUITE, out=tmp_path / "r")
    arrays = np.load(tmp_path / "r" / "adversarial.npz")
    fooled = [v.index for v in report.verdicts if not v.robust]
    assert arrays["index"].dtype == np.int64
    assert arrays["index"].tolist() == fooled
    assert arrays["x"].dtype == np.float32
    assert arrays["x"].shape == (len(fooled), *SHAPE)
    assert np.abs(arrays["x"] - x.numpy()[fooled]).max() <= 4 / 255
    assert arrays["x"].min() >= 0
    assert arrays["x"].max() <= 1
    assert (net(torch.from_numpy(arrays["x"])).argmax(1) != y[fooled]).all()
    assert (arrays["y"] == y[fooled].numpy()).all()
    assert (report.clean_accuracy.n, report.n) == (20, 20)


def test_a_run_in_memory_returns_its_adversarials() -> None:
    net = Small()
    x, y = labelled(net, 8, SHAPE)
    report = evaluate(net, x, y, "linf:0.1", suite="pgd(steps=5)")
    assert report.adversarial is not None
    assert len(report.adversarial["index"]) == sum(not r for r in robust(report)) > 0


def test_a_full_disk_raises_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Small()
    x, y = labelled(net, 40, SHAPE)
    create = Ledger.open.__func__  # type: ignore[attr-defined]

    def tiny(cls: type[Ledger], path: Path, run_id: str) -> Ledger:
        ledger = create(cls, path, run_id)
        ledger._db.execute("PRAGMA max_page_count = 8")
        return ledger

    monkeypatch.setattr(Ledger, "open", classmethod(tiny))
    with pytest.raises(RunError, match="full; make room and run the same command again"):
        evaluate(net, x, y, "linf:0.1", suite="pgd(steps=5)", out=tmp_path / "r")
    monkeypatch.undo()
    evaluate(net, x, y, "linf:0.1", suite="pgd(steps=5)", out=tmp_path / "r")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="disk is full"):
        evaluate(net, x, y, "linf:0.1", suite="pgd(steps=4)", out=tmp_path / "s")


def test_an_error_in_an_attack_names_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Small()
    x, y = labelled(net, 5, SHAPE)
    monkeypatch.setattr("robustkit.attacks.gradient.fgsm.ascend", lambda *a: 1 / 0)
    with pytest.raises(RunError, match="fgsm failed on images 0 to 4 with ZeroDivisionError: division by zero"):
        evaluate(net, x, y, "linf:0.1", suite="fgsm")


def test_bf16_search_float32_verdict() -> None:
    net = Small()
    x, y = labelled(net, 20, SHAPE)
    report = evaluate(net, x, y, "linf:0.03", suite="pgd(steps=10)", precision="bf16")
    assert report.environment["precision"] == "bf16"
    assert report.adversarial is not None
    found = torch.from_numpy(np.array(report.adversarial["x"]))
    assert (net(found).argmax(1).numpy() != report.adversarial["y"]).all()


def test_the_automatic_batch_size_fits_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Small()
    x, y = labelled(net, 12, SHAPE)
    monkeypatch.setattr(profiling, "free_memory", lambda device: 30_000)
    small = evaluate(net, x, y, "linf:0.03", suite="pgd(steps=3)")
    assert small.environment["images_at_once"] < 12


@pytest.mark.parametrize(
    ("suite", "flagged"),
    [
        ("pgd(steps=3,step_size=0.1eps)", True),
        ("pgd(steps=3,step_size=0.001px)", True),
        ("pgd(steps=3)", False),
        ("pgd(steps=3,step_size=0.1eps),pgd(steps=3)", False),
    ],
)
def test_attacks_that_cannot_reach_the_edge_of_the_ball_are_flagged(suite: str, flagged: bool) -> None:
    x, y = torch.rand(3, 1, 5, 7), torch.tensor([0, 1, 0])
    report = evaluate(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(35, 2)), x, y, "linf:0.1", suite=suite
    )
    assert [flag.code for flag in report.flags if flag.code == "steps-fall-short"] == [
        "steps-fall-short"
    ] * flagged
