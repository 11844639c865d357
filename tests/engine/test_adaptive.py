"""Attacks on gradient views are verified on the model itself; randomised models are judged by draws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import Small
from torch import nn

from robustkit import evaluate
from robustkit.attack_api import Rows
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.engine.batching.attack_queue import AttackQueue
from robustkit.engine.batching.forward_passes import Query, run_queries
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.evaluation.verdicts import judge
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.random_verdicts import MAX_DRAWS, MIN_DRAWS, majority_vote
from robustkit.gradient_views.discovery import discover_views
from robustkit.gradient_views.view_kinds import MEAN_DRAWS
from robustkit.models import as_classifier
from robustkit.models.ensembles.aggregation import parse_aggregator
from robustkit.registry import make

SHAPE, EPS = (3, 6, 8), "linf:0.03"
QUICK = "pgd(steps=8,restarts=1)"


class Ensemble(nn.Module):
    """Small nets under an aggregator."""

    def __init__(self, combine: str, members: int = 3) -> None:
        super().__init__()
        self.members = nn.ModuleList(Small(seed=seed) for seed in range(members))
        self.combine = parse_aggregator(combine)

    def stacked(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(x) for member in self.members], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.combine(self.stacked(x))


class Rounded(nn.Module):
    """Logits on a grid: no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (4 * self.net(x)).round() / 4


class Noisy(nn.Module):
    """Right or wrong at random."""

    def __init__(self, sigma: float = 0.05) -> None:
        super().__init__()
        self.net, self.sigma = Small(), sigma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + self.sigma * torch.randn_like(x))


def labelled(net: nn.Module, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return x, net(x).argmax(1)


def test_a_gradient_view_gives_a_direction_where_the_model_has_no_gradient() -> None:
    """Rounded logits: PGD finds next to nothing on the model, on its mended view what it finds beneath."""
    net = Rounded()
    x, y = labelled(net)
    blind = evaluate(net, x, y, EPS, suite=QUICK)
    seeing = evaluate(net, x, y, EPS, suite=f"{QUICK}@mended")
    truth = evaluate(net.net, x, y, EPS, suite=QUICK)
    assert blind.robust_accuracy.value > 0.9
    assert seeing.robust_accuracy.value <= truth.robust_accuracy.value + 0.15
    found = seeing.adversarial
    with torch.no_grad():
        assert (net(torch.from_numpy(found["x"])).argmax(1) != torch.from_numpy(found["y"])).all()
    threat = ThreatModel.parse(EPS)
    assert threat.contains(torch.from_numpy(found["x"]), x[found["index"]]).all()


@pytest.mark.slow
def test_crossmax_is_as_robust_as_the_mean_of_its_members() -> None:
    """What transfer from the mean logit fools, attacks on views fool as well."""
    net = Ensemble("crossmax")
    x, y = labelled(net, 24)
    mean = Ensemble("logits")
    threat = ThreatModel.parse(EPS)
    moved = make("pgd", steps=20)(mean, x, Goal(y), threat, rng=RowRng(0, "t", torch.arange(len(x))))
    with torch.no_grad():
        left = (net(moved).argmax(1) == y).float().mean().item()
    suite = ",".join(f"pgd(steps=10)@{view}" for view in ("mean-logit", "members", "straight-through"))
    report = evaluate(net, x, y, EPS, suite=f"{suite},mora(steps=10)@stack")
    assert report.robust_accuracy.value <= left
    assert {stage.attack for stage in report.stages} >= {"pgd@mean-logit", "pgd@members", "mora@stack"}
    assert "masked-gradient" not in {
        flag.code for flag in evaluate(mean, x, y, EPS, suite=f"pgd(steps=10),{suite}").flags
    }


def test_an_ensembles_views_are_attacked_before_the_arms() -> None:
    """An image that the mean of the members' logits fools gets none of the longer attacks."""
    net = Ensemble("crossmax")
    x, y = labelled(net, 8)
    suite = "pgd(steps=1),apgd(loss=ce,steps=30)*,apgd(loss=margin,steps=10,restarts=1)@mean-logit?"
    report = evaluate(net, x, y, "linf:0.1", suite=suite)
    _, first, arm, view = report.stages
    assert report.robust_accuracy.value == 0
    assert first.fooled + view.fooled == len(x)
    assert arm.forwards == 0 < view.fooled


def test_views_of_an_ensemble_share_one_pass_of_its_members() -> None:
    """A query on a view costs one forward pass, and the logits of the search and of the ensemble come from it."""
    net = Ensemble("crossmax")
    passes = [0]
    net.members[0].register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    x, y = labelled(net, 8)
    model = InstrumentedModel(as_classifier(net), torch.device("cpu"))
    model.views = discover_views(model.model, x, False).views
    views = [view for view in model.views if view != "members" and model.shares_passes(view)]
    assert {"mean-logit", "straight-through"} <= {*views}
    assert model.shares_passes("members")
    attack = make("pgd", steps=4)
    queues = [AttackQueue(attack, view, "pgd", 0, attack.loop_options("linf"), False) for view in views]
    rows = Rows(x, Goal(y), ThreatModel.parse(EPS), RowRng(0, "t", torch.arange(8)), Goal(y))
    host = {name: np.zeros(8, np.int64) for name in ("age", "job", "position")} | {"ended": np.zeros(8, bool)}
    batches = [RowBatch(host, {"x": x}).with_state(queue.attack.init(rows)) for queue in queues]
    queries = [
        Query.of(queue, batch, rows, deterministic=True) for queue, batch in zip(queues, batches, strict=True)
    ]
    passes[0] = model.forwards = 0
    results = run_queries(queries, model)
    assert passes == [1]
    assert model.forwards == len(views) * len(x)
    for query, answer, own in results:
        torch.testing.assert_close(own, net(query.state["x"]).detach())
        view = model.views[query.queue.view][0]
        torch.testing.assert_close(answer.logits, view(query.state["x"]).detach())


def test_auto_costs_no_more_than_rapid_on_an_unmasked_net() -> None:
    """Same stages, same verdicts, same passes as `rapid`."""
    net = Small()
    x, y = labelled(net)
    rapid, auto = (evaluate(net, x, y, EPS, suite=suite, precision="fp32") for suite in ("rapid", "auto"))
    assert [stage.attack for stage in auto.stages] == [stage.attack for stage in rapid.stages]
    assert auto.verdicts == rapid.verdicts
    assert auto.cost.forwards == rapid.cost.forwards
    assert "masked-gradient" not in {flag.code for flag in auto.flags}


def test_a_score_attack_starts_from_the_point_that_a_gradient_view_found() -> None:
    """Square from the nearest point is there at once: few queries do what from stripes they do not."""
    net = Rounded()
    x, y = labelled(net, 24)
    led = "pgd(steps=2,step_size=0.3eps,random_start=false)@mended,square(queries=20,p_init=0.05,refine="
    refined, anew = (evaluate(net, x, y, "linf:0.02", suite=f"{led}{word})") for word in ("true", "false"))
    assert refined.robust_accuracy.value < anew.robust_accuracy.value


def test_attacks_on_views_that_a_model_lacks_are_left_out() -> None:
    net = Small()
    x, y = labelled(net)
    report = evaluate(net, x, y, EPS, suite=f"{QUICK}@mean-logit,{QUICK}")
    alone = evaluate(net, x, y, EPS, suite=QUICK)
    assert report.robust_accuracy == alone.robust_accuracy
    assert report.stages[1].forwards == 0
    assert "not-attacked" not in {flag.code for flag in report.flags}


def test_a_run_without_an_applicable_attack_is_flagged() -> None:
    """A suite of views that the model lacks attacks no image, and the flag names the reason."""
    net = Small()
    x, y = labelled(net)
    report = evaluate(net, x, y, EPS, suite=f"mora@stack,{QUICK}@members")
    assert report.robust_accuracy.value == 1
    (flag,) = (flag for flag in report.flags if flag.code == "not-attacked")
    assert (flag.level, flag.value) == ("warning", len(x))
    assert "no stack and no members" in flag.meaning


def test_attacks_of_other_packages_may_be_conditional_and_on_views() -> None:
    """AutoAttack's attacks are skipped on a view that the model lacks, as any other."""
    net = Small()
    x, y = labelled(net)
    suite = f"{QUICK},autoattack:apgd-ce(steps=3,restarts=1)@mended,autoattack:square(queries=20)?"
    report, alone = (evaluate(net, x, y, EPS, suite=text) for text in (suite, QUICK))
    assert report.robust_accuracy == alone.robust_accuracy
    assert [stage.fooled for stage in report.stages[2:]] == [0]
    seen = evaluate(Rounded(), x, y, EPS, suite="autoattack:apgd-ce(steps=5,restarts=1)@mended")
    assert seen.stages[1].fooled


def test_the_verdict_on_a_randomised_model_is_by_majority() -> None:
    """Three accuracies are told, and each fooling image is wrong in most fresh draws."""
    net = Noisy()
    x, y = labelled(net.net, 8)
    report = evaluate(net, x, y, EPS, suite=f"{QUICK},{QUICK}@averaged-mended")
    assert report.draws is not None
    assert report.draws.majority == report.robust_accuracy
    assert 0 <= report.draws.mean <= 1
    found = report.adversarial
    assert 0 < len(found["index"]) < len(x)
    moved, labels = torch.from_numpy(found["x"]), torch.from_numpy(found["y"])
    with torch.no_grad():
        wrong = np.mean([(net(moved).argmax(1) != labels).numpy() for _ in range(60)], 0)
    assert (wrong > 0.4).all()
    assert wrong.mean() > 0.55
    assert "randomised" in {flag.code for flag in report.flags}
    assert type(report).from_json(report.to_json()).draws == report.draws


class NoisyEnsemble(Ensemble):
    """A randomised ensemble that exports a deterministic view."""

    def stacked(self, x: torch.Tensor) -> torch.Tensor:
        return super().stacked(x + 0.05 * torch.randn_like(x))

    def views(self) -> dict[str, nn.Module]:
        return {"still": self.members[0]}


def test_views_of_a_randomised_model_average_over_draws() -> None:
    model, x = as_classifier(NoisyEnsemble("crossmax").eval()), labelled(Small())[0]
    drawn, steady = (
        discover_views(model, x, random=True).views,
        discover_views(as_classifier(Ensemble("crossmax")), x, False).views,
    )
    assert {"own", "averaged-mended", "averaged-mean-logit", "calm", "frozen"} <= drawn.keys()
    assert "averaged-own" not in drawn
    assert not any(name.startswith("averaged") for name in steady)
    instrumented = InstrumentedModel(model, torch.device("cpu"))
    instrumented.views = drawn
    passes = instrumented.passes("averaged-mean-logit")
    # The ensemble's, and that without its dice.
    assert sorted(passes) == [1, MEAN_DRAWS]
    torch.manual_seed(0)
    one = drawn["mean-logit"][passes.index(MEAN_DRAWS)]
    several = torch.stack([one(x) for _ in range(MEAN_DRAWS)]).mean(0)
    torch.manual_seed(0)
    torch.testing.assert_close(drawn["averaged-mean-logit"][passes.index(MEAN_DRAWS)](x), several)


class RandomMember(Ensemble):
    """One of two nets, drawn for each pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.members[int(torch.rand(()) < 0.5)](x)


def test_a_model_with_few_outcomes_has_an_averaged_view_for_every_seed() -> None:
    model, x = as_classifier(RandomMember("logits")), labelled(Small())[0]
    for seed in range(4):
        torch.manual_seed(seed)
        assert "averaged-mended" in discover_views(model, x, random=True).views


def test_a_score_attack_on_a_randomised_model_costs_no_backward_pass() -> None:
    net = Noisy()
    x, y = labelled(net.net)
    report = evaluate(net, x, y, EPS, suite=f"{QUICK}@top-k,square(queries=60)")
    _, absent, square = report.stages
    assert (absent.forwards, absent.backwards, square.backwards) == (0, 0, 0)
    assert square.fooled


@pytest.mark.slow
def test_a_suite_with_the_mean_over_draws_leaves_out_single_draws() -> None:
    x, y = labelled(Ensemble("crossmax"))
    suite = f"{QUICK}@mean-logit,{QUICK}@averaged-mean-logit,{QUICK}"
    for net, unused in ((NoisyEnsemble("crossmax"), 1), (Ensemble("crossmax"), 2)):
        report = evaluate(net, x, y, EPS, suite=suite)
        assert [not stage.forwards for stage in report.stages[1:3]] == [unused == 1, unused == 2]
    alone = evaluate(NoisyEnsemble("crossmax"), x, y, EPS, suite=f"{QUICK}@mean-logit")
    assert alone.stages[1].forwards


@pytest.mark.parametrize(
    ("share", "least", "most"), [(1.0, MIN_DRAWS, MIN_DRAWS), (0.0, MIN_DRAWS, MIN_DRAWS), (0.5, 30, MAX_DRAWS)]
)
def test_no_more_draws_are_made_once_the_majority_is_certain(share, least, most) -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)

    def answer(x: torch.Tensor) -> torch.Tensor:
        right = torch.rand(len(x), generator=generator) < share
        return torch.stack([right.float(), 0.5 * torch.ones(len(x)), torch.zeros(len(x))], 1)

    vote = majority_vote(answer, torch.zeros(40, 1, 2, 3), labels)
    assert least <= vote.forwards.float().mean() <= most
    torch.testing.assert_close(vote.right.mean(), torch.tensor(share, dtype=torch.float64), atol=0.08, rtol=0)
    if share in (0, 1):
        assert (vote.prediction == (1 - int(share))).all()


def test_the_reported_share_is_of_draws_other_than_those_that_found_the_success() -> None:
    """The share of draws that selected a point is biased; the reported share is of other draws."""
    draws = [0, 0, 0]

    def answer(x: torch.Tensor) -> torch.Tensor:
        right = []
        for row in (x[:, 0, 0, 0] * 4).int().tolist():
            draws[row] += 1
            # The first is wrong at first, and right twice in three from then on.
            right.append([draws[0] > MIN_DRAWS and draws[0] % 3 > 0, False, True][row])
        return torch.stack([torch.tensor(right).float(), torch.full((len(x),), 0.5)], 1)

    x = torch.tensor([0.0, 0.25, 0.5]).view(3, 1, 1, 1).expand(3, 1, 2, 5)
    labels, threat = torch.zeros(3, dtype=torch.int64), ThreatModel.parse("linf:0.1")
    random: Any = SimpleNamespace(random=True, logits_fp32=answer)
    verdict = judge(random, x, labels, x, threat)
    assert verdict.fooled.tolist() == [False, True, False]
    assert verdict.right[0] > 0.6
    assert verdict.right[1:].tolist() == [0.0, 1.0]
    assert draws[0] > 2 * MIN_DRAWS
    assert verdict.forwards.tolist() == draws == [draws[0], 2 * MIN_DRAWS, MIN_DRAWS]
