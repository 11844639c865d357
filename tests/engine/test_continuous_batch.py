"""Continuous batching: each attack's verdicts are those of the attack alone; refused successes continue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import Faulty, Small, labelled
from torch import Tensor

from robustkit import evaluate
from robustkit.attack_api import Answer, Rows, RowWise, State
from robustkit.core import criteria
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.engine.batching.continuous_batch import ContinuousBatch
from robustkit.engine.batching.samples import Admitted
from robustkit.engine.evaluation import block_runner
from robustkit.engine.evaluation.verdicts import image_hashes, sample_ids
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.gradient_views.view_kinds import MeanView
from robustkit.models import as_classifier
from robustkit.registry import SuiteEntry, parse_suite
from robustkit.runs.evaluation_record import Report

SHAPE = (3, 6, 8)
MIXED = (
    "pgd(steps=6,restarts=2),apgd(steps=12),apgd-t(steps=6,targets=4),fab-t(steps=6,targets=3),"
    "fab(steps=4,restarts=2),race(targets=5,probe=2,steps=5,restarts=2),apgd(steps=4,eot_iter=2),"
    "apgd(steps=5,restarts=3,doubt=9),apgd-t(steps=4,targets=3,restarts=2,doubt=9),square(queries=30)"
)
EPS = {"linf": "linf:0.02", "l2": "l2:0.2", "l1": "l1:1.2"}


def outcomes(report: Report) -> list[tuple[bool, str | None]]:
    return [(verdict.robust, verdict.attack) for verdict in report.verdicts]


@pytest.mark.parametrize("norm", EPS)
def test_verdicts_are_independent_of_the_batch_size(norm: str) -> None:
    net = Small().eval()
    x, y = labelled(net, 12, SHAPE)
    suite = MIXED if norm != "l1" else ",".join(a for a in MIXED.replace(",race", ";race").split(";")[:1])
    reports = [
        evaluate(net, x, y, EPS[norm], suite=suite, batch_size=size, precision="fp32") for size in (1, 5, 64)
    ]
    assert 0 < sum(robust for robust, _ in outcomes(reports[0])) < len(x)
    for other in reports[1:]:
        assert outcomes(other) == outcomes(reports[0])
        margins = [[v.margin for v in report.verdicts] for report in (reports[0], other)]
        assert np.allclose(margins[0], margins[1], atol=1e-4)
        # A success may come a step sooner or later where rounding decides.
        costs = [[s.forwards + s.backwards for s in report.stages[1:]] for report in (reports[0], other)]
        assert np.allclose(costs[0], costs[1], rtol=0.05)


@pytest.mark.parametrize("norm", EPS)
def test_verdicts_are_independent_of_order_and_split(norm: str) -> None:
    net = Small().eval()
    x, y = labelled(net, 24, SHAPE)
    suite = "pgd(steps=4,restarts=2),apgd-t(steps=4,targets=3),square(queries=30)"
    suite += ",race(targets=3,probe=2,steps=4,restarts=2)" if norm != "l1" else ""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    parts = (torch.arange(len(x)), order, order[:11], order[11:])
    whole, mixed, first, second = (
        evaluate(net, x[i], y[i], EPS[norm], suite=suite, precision="fp32") for i in parts
    )
    assert [outcomes(whole)[i] for i in order.tolist()] == outcomes(mixed) == outcomes(first) + outcomes(second)
    shifted = [[whole.verdicts[i].margin for i in order.tolist()], [v.margin for v in mixed.verdicts]]
    assert np.allclose(shifted[0], shifted[1], atol=1e-4)


def test_an_attack_in_a_batch_has_the_result_of_the_attack_alone() -> None:
    net = Small().eval()
    x, y = labelled(net, 24, SHAPE)
    threat = ThreatModel.parse(EPS["linf"])
    for text in ("pgd(steps=6,restarts=2)", "apgd-t(steps=8,targets=4)", "fab(steps=4)", "square(queries=40)"):
        (attack,) = (entry.attack for entry in parse_suite(text, "linf"))
        ids = sample_ids(image_hashes(x))
        found = attack(net, x, Goal(y), threat, rng=RowRng(0, f"{text.partition('(')[0]}/0", ids))
        with torch.no_grad():
            alone = (net(found).argmax(1) == y).tolist()
        report = evaluate(net, x, y, threat, suite=text, precision="fp32", batch_size=7)
        assert [verdict.robust for verdict in report.verdicts] == alone


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_parallel_jobs_fool_the_same_images_as_sequential_jobs(slots: int) -> None:
    net = Small().eval()
    x, y = labelled(net, 24, SHAPE)
    attacks = parse_suite("pgd(steps=3,restarts=4),apgd-t(steps=5,targets=4,restarts=2)", "linf")
    clean = -criteria.margin(net(x), y).detach()
    outcomes = []
    for wide in (False, True):
        waiting = np.arange(len(x))

        def admit(free: int) -> Admitted:
            nonlocal waiting
            part, waiting = waiting[:free], waiting[free:]
            return Admitted(part, torch.from_numpy(part), x[part], y[part], -clean[part], -clean[part])

        instrumented = InstrumentedModel(as_classifier(net), torch.device("cpu"))
        measure(instrumented, x[:1], 64)
        threat = ThreatModel.parse(EPS["linf"])
        batch = ContinuousBatch(
            instrumented, threat, attacks, ["a", "b"], 0, slots, admit, recover=recover, parallel_jobs=wide
        )
        finished = [part for group in batch.run() for part in group]
        position = np.concatenate([part.position for part in finished])
        assert sorted(position) == list(range(len(x)))
        stage = np.concatenate([part.stage for part in finished])[position.argsort()]
        fooled = torch.cat([part.judged.fooled for part in finished]).numpy()[position.argsort()]
        outcomes.append((fooled.tolist(), stage.tolist()))
        spent = np.concatenate([part.spent for part in finished]).sum((0, 1))
        assert spent.tolist() == [instrumented.forwards, instrumented.backwards]
    assert outcomes[0] == outcomes[1]
    assert 0 < sum(outcomes[0][0]) < len(x)
    assert {0, 1} == set(outcomes[0][1])


def test_counts_are_those_of_an_independent_counter() -> None:
    net = Small()
    x, y = labelled(net, 12, SHAPE)
    seen = {"forward": 0, "backward": 0}
    net.body[0].register_forward_hook(lambda m, i, o: seen.update(forward=seen["forward"] + len(o)))
    net.body[0].register_full_backward_hook(lambda m, i, o: seen.update(backward=seen["backward"] + len(o[0])))
    # With room for all jobs at once, since activations that did not fit would be computed again, uncounted.
    report = evaluate(net, x, y, EPS["linf"], suite=MIXED, precision="fp32", batch_size=100)
    # Not counted: the image that sizes the batch, both ways, four looks at each of four for dice, and in each of
    # two memory layouts two of two and three of all.
    trials, looks = 2 * (2 * 2 + 3 * 12), 4 * 4
    assert report.cost.backwards == seen["backward"] - 1 - trials
    assert report.cost.forwards == seen["forward"] - 1 - looks - trials


@dataclass(frozen=True, slots=True)
class FalseSuccess(RowWise):
    """First reports a point that fools only the rounded model, then one that fools the model."""

    steps: int = 3

    def init(self, rows: Rows) -> State:
        return {"x": rows.x, "clock": torch.zeros(len(rows.x), dtype=torch.int64)}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        shift = torch.where(state["clock"] >= 1, 0.2, 0.1).view(-1, 1, 1, 1)
        return {"x": rows.x + shift, "clock": state["clock"] + 1}


class Rounded(torch.nn.Module):
    """Two classes with a boundary at 0.15 above the clean image, at 0.05 in the search's precision."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = True

    def forward(self, x: Tensor) -> Tensor:
        bound = 0.65 if self.exact else 0.55
        score = x.flatten(1).mean(1) - bound
        return torch.stack([-score, score], 1)


@dataclass(frozen=True, slots=True)
class RandomStarts(RowWise):
    """Queries a random start in each of two restarts."""

    steps: int = 2

    @property
    def restarts(self) -> int:
        return 2

    def init(self, rows: Rows) -> State:
        return {"x": rows.threat.random_start(rows.x, rows.rng)}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        return {"x": rows.threat.random_start(rows.x, rows.rng)}


def admit_once(x: Tensor, ids: Tensor, margin: float) -> Callable[[int], Admitted]:
    """Admit these images of class 0 at the first call, none at later ones."""
    far = torch.full((len(x),), -margin)
    labels = torch.zeros(len(x), dtype=torch.int64)
    whole = Admitted(ids.numpy(), ids, x, labels, far, far)
    calls = iter([whole])
    none = Admitted(ids[:0].numpy(), ids[:0], x[:0], labels[:0], far[:0], far[:0])
    return lambda free: next(calls, none)


def recover() -> None:
    raise AssertionError("memory is not short here")


def test_every_job_and_step_has_its_own_random_draws() -> None:
    queried: list[Tensor] = []

    class Listening(InstrumentedModel):
        def __call__(self, x: Tensor) -> Tensor:
            queried.append(x.detach().clone())
            return torch.stack([x.flatten(1).sum(1) * 0 + 1, x.flatten(1).sum(1) * 0], 1)

        def logits_fp32(self, x: Tensor) -> Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    instrumented = Listening(as_classifier(torch.nn.Flatten()), torch.device("cpu"))
    x = torch.full((1, 1, 4, 5), 0.5)
    threat, ids = ThreatModel.parse("linf:0.3"), torch.tensor([7])
    for _ in ContinuousBatch(
        instrumented, threat, [SuiteEntry(RandomStarts())], ["dice"], 5, 8, admit_once(x, ids, margin=1.0), recover
    ).run():
        pass
    rng = RowRng(5, "dice", ids)
    expected = [threat.random_start(x, rng.at(restart=job, step=step)) for job in (0, 1) for step in (0, 1, 2)]
    assert len(queried) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(queried, expected, strict=True))


@dataclass(frozen=True, slots=True)
class FixedDistance(RowWise):
    """Queries the same distance from the image at every step."""

    by: float
    steps: int = 20

    def init(self, rows: Rows) -> State:
        return {"x": rows.x + self.by}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        return state


class NoisyBrightness(torch.nn.Module):
    """Predicts the first class, in brighter images with a larger margin and random errors."""

    def forward(self, x: Tensor) -> Tensor:
        moved = x.flatten(1).mean(1) - 0.5
        margin = 1 + torch.where(moved > 0, moved, 4 * moved) + 8 * moved.clamp(min=0) * torch.randn(len(x))
        return torch.stack([margin, torch.zeros_like(margin)], 1)


@pytest.mark.parametrize("view", ["", "averaged-mended", "loosened"])
@pytest.mark.parametrize("order", [(0.2, -0.2), (-0.2, 0.2)])
def test_the_nearest_point_of_a_randomised_model_is_fooled_by_the_majority(
    order: tuple[float, ...], view: str
) -> None:
    """Single draws at the brighter point are sometimes wrong, but the darker one is nearer on average."""
    model = as_classifier(NoisyBrightness())
    instrumented = InstrumentedModel(model, torch.device("cpu"))
    instrumented.random = True
    instrumented.views = {
        "averaged-mended": [MeanView(model, sigma=0)],
        "loosened": [MeanView(model, draws=3), model],
    }
    x = torch.full((6, 1, 4, 5), 0.5)
    attacks = [SuiteEntry(FixedDistance(order[0])), SuiteEntry(FixedDistance(order[1]), view)]
    torch.manual_seed(0)
    batch = ContinuousBatch(
        instrumented,
        ThreatModel.parse("linf:0.2"),
        attacks,
        ["a", "b"],
        0,
        8,
        admit_once(x, torch.arange(6), 1.0),
        recover,
    )
    (finished,) = (part for group in batch.run() for part in group)
    assert not finished.judged.fooled.any()
    torch.testing.assert_close(finished.judged.x, x - 0.2)
    torch.testing.assert_close(finished.judged.margin, torch.full((6,), 0.2).double())
    # Means over draws are not so often wrong.
    assert view or finished.judged.refused.all()
    assert finished.spent.sum((0, 1)).tolist() == [instrumented.forwards, instrumented.backwards]


def test_a_point_that_does_not_move_is_not_evaluated_again() -> None:
    """Attacks that were not run cost nothing."""
    instrumented = InstrumentedModel(as_classifier(NoisyBrightness()), torch.device("cpu"))
    instrumented.random = True
    x = torch.full((4, 1, 4, 5), 0.5)
    attacks = [SuiteEntry(FixedDistance(0.0, steps=3)), *[SuiteEntry(FixedDistance(0.0), "calm")] * 9]
    batch = ContinuousBatch(
        instrumented,
        ThreatModel.parse("linf:0.2"),
        attacks,
        ["a", *"b" * 9],
        0,
        8,
        admit_once(x, torch.arange(4), 1.0),
        recover,
    )
    (finished,) = (part for group in batch.run() for part in group)
    queries, verdict = 4, 8
    assert finished.spent[:, 0, 0].tolist() == [queries + verdict] * 4
    assert not finished.spent[:, 1:].any()


class UncertainWhenBright(torch.nn.Module):
    """Predicts the first class with a probability that falls with brightness and is never 1."""

    def forward(self, x: Tensor) -> Tensor:
        margin = 2 - 8 * (x.flatten(1).mean(1) - 0.5) + torch.randn(len(x))
        return torch.stack([margin, torch.zeros_like(margin)], 1)


@pytest.mark.parametrize("view", ["", "averaged-mended"])
def test_a_row_that_fools_a_randomised_model_continues(view: str) -> None:
    """The model is right in four of ten draws at the first success and in one of ten at the reported point."""
    model = as_classifier(UncertainWhenBright())
    instrumented = InstrumentedModel(model, torch.device("cpu"))
    instrumented.random, instrumented.views = True, {"averaged-mended": [MeanView(model, draws=5, sigma=0)]}
    x = torch.full((16, 1, 4, 5), 0.5)
    torch.manual_seed(0)
    admitted = admit_once(x, torch.arange(16), 2.0)
    attacks = [SuiteEntry(FixedDistance(0.28, steps=60), view)]
    batch = ContinuousBatch(instrumented, ThreatModel.parse("linf:0.4"), attacks, ["a"], 0, 16, admitted, recover)
    finished = [part for group in batch.run() for part in group]
    fooled = torch.cat([part.judged.fooled for part in finished])
    assert fooled.sum() > 8
    # But for one that chance let win by all of eight draws.
    came = (torch.cat([part.judged.x for part in finished])[fooled] - 0.5).flatten(1).amin(1)
    assert (came > 0.37).double().mean() > 0.7
    assert torch.cat([part.judged.right for part in finished])[fooled].mean() < 0.2
    spent = np.concatenate([part.spent for part in finished]).sum((0, 1))
    assert spent.tolist() == [instrumented.forwards, instrumented.backwards]


def test_a_row_whose_success_is_refused_continues() -> None:
    net = Rounded()
    model = as_classifier(net)

    class Two(InstrumentedModel):
        def logits_fp32(self, x: Tensor) -> Tensor:
            net.exact = True
            try:
                return super().logits_fp32(x)
            finally:
                net.exact = False

    net.exact = False
    instrumented = Two(model, torch.device("cpu"))
    instrumented.num_classes = 2
    x = torch.full((3, 1, 4, 5), 0.5)
    admit = admit_once(x, torch.arange(3), margin=0.3)
    batch = ContinuousBatch(
        instrumented, ThreatModel.parse("linf:0.3"), [SuiteEntry(FalseSuccess())], ["liar"], 0, 8, admit, recover
    )
    finished = [part for group in batch.run() for part in group]
    assert batch.claims_refused == 3
    assert torch.cat([part.judged.fooled for part in finished]).all()


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_every_sample_gets_a_verdict_in_every_precision(precision: str) -> None:
    net = Small().eval()
    x, y = labelled(net, 40, SHAPE)
    report = evaluate(net, x, y, "linf:0.012", suite="pgd(steps=6),square(queries=9)", precision=precision)
    assert all(stage.forwards > 0 for stage in report.stages)
    assert all(verdict.margin > 0 for verdict in report.verdicts if verdict.robust)
    if precision == "bf16":
        assert report.environment["searched_again"] > 0
    clean = evaluate(net, x, y, "linf:0", suite="pgd(steps=1)", precision=precision)
    searched = [(a.margin, b.margin) for a, b in zip(report.verdicts, clean.verdicts, strict=True) if a.robust]
    assert all(after < before for after, before in searched)


class Interrupted(torch.nn.Module):
    """A net that is interrupted after a number of forward passes."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.left: float = float("inf")

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        out: Tensor = self.net(x)
        return out


def test_an_interrupted_run_resumes_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_runner.BlockRunner, "write_every", 0.0)
    net = Interrupted(Small().eval())
    x, y = labelled(net, 40, SHAPE)
    suite = "pgd(steps=4),race(targets=3,probe=2,steps=4,doubt=9),square(queries=20)"

    def run(folder: Path) -> Report:
        return evaluate(net, x, y, EPS["linf"], suite=suite, precision="fp32", batch_size=6, out=folder)

    whole = run(tmp_path / "whole")
    interruptions = 0
    for _ in range(200):
        net.left = 95
        try:
            pieces = run(tmp_path / "pieces")
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 1
    assert outcomes(pieces) == outcomes(whole)
    assert np.allclose([v.margin for v in pieces.verdicts], [v.margin for v in whole.verdicts], atol=1e-4)
    assert [s.fooled for s in pieces.stages] == [s.fooled for s in whole.stages]
    costs = [[stage.forwards + stage.backwards for stage in report.stages] for report in (pieces, whole)]
    assert np.allclose(costs[0], costs[1], rtol=0.05)


def test_out_of_memory_halves_the_pieces_and_keeps_the_verdicts() -> None:
    class Cramped(torch.nn.Module):
        """Refuses more than so many images at once, once it is under attack."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.most = Small().eval(), 1000

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.most and x.requires_grad:
                raise torch.OutOfMemoryError("no room")
            out: Tensor = self.net(x)
            return out

    net = Cramped()
    x, y = labelled(net, 20, SHAPE)
    suite = "race(targets=3,probe=2,steps=4,doubt=9),apgd-t(steps=4,targets=2)"
    before = evaluate(net, x, y, EPS["linf"], suite=suite, precision="fp32")
    net.most = 3
    after = evaluate(net, x, y, EPS["linf"], suite=suite, precision="fp32")
    assert outcomes(after) == outcomes(before)
    assert [(s.forwards, s.backwards) for s in after.stages[1:]] == [
        (s.forwards, s.backwards) for s in before.stages[1:]
    ]
    assert after.environment["images_at_once"] <= 3


def test_slots_stay_full_while_samples_wait() -> None:
    net = Small().eval()
    x, y = labelled(net, 80, SHAPE)
    report = evaluate(net, x, y, "linf:0.005", suite="pgd(steps=5),race(targets=3,probe=2,steps=4)", batch_size=8)
    assert report.environment["occupancy"] > 0.95


@pytest.mark.parametrize("fault", ["quantised", "zero"])
def test_square_fools_nets_without_a_useful_gradient(fault: str) -> None:
    net = {"quantised": lambda: QuantisedLogits(), "zero": lambda: QuantisedLogits(levels=40)}[fault]()
    x, y = labelled(net, 4, (1, 6, 8))
    report = evaluate(net, x, y, "linf:0.15", suite="apgd(steps=10),square(queries=300)")
    fallen = {stage.attack: stage.fooled for stage in report.stages}
    assert fallen["square"] > 0
    assert {"no-gradient", "zero-gradient", "score-beats-gradient"} & {flag.code for flag in report.flags}


class QuantisedLogits(torch.nn.Module):
    """A linear net with quantised logits: the gradient is zero everywhere."""

    def __init__(self, levels: float = 8) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 48, generator=torch.Generator().manual_seed(0)))
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor((x - 0.5).flatten(1) @ self.weight.T * self.levels) / self.levels


def test_the_last_query_is_the_verdict_of_a_deterministic_model() -> None:
    suite = "pgd(steps=1,step_size=1,loss=margin,random_start=false)"
    for net, again in ((Small(), False), (Faulty("random", channels=3), True)):
        x, y = labelled(Small(), 30, SHAPE)
        report = evaluate(net, x, y, EPS["linf"], suite=suite, precision="fp32")
        clean, pgd = report.stages
        right = report.n - clean.fooled
        assert 0 < pgd.fooled < right
        # Two queries, and one more for those that stand; a random model's claims are judged by a fresh draw.
        least = 2 * right + (right - pgd.fooled)
        assert pgd.forwards >= least + pgd.fooled if again else pgd.forwards == least
