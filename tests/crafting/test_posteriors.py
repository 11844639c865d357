"""Posteriors as surrogates: crafting on stored samples, counts, streaming and resuming."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import net, write_members, write_posterior

import robustkit
from robustkit import ThreatModel, UsageError, evaluate
from robustkit.attack_api import Surrogates, compose
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.crafting.ensemble import Ensemble, Storage
from robustkit.data import from_arrays
from robustkit.engine.model.loaded_models import gather
from robustkit.engine.progress import Progress
from robustkit.registry import parse_attack
from robustkit.reporting.html import craft as craft_page
from robustkit.reporting.terminal.transfer import show

EPS, CPU = "linf:0.2", torch.device("cpu")
# Some of these folders name nets of the tests' own code.
craft, load_model = partial(robustkit.craft, trust_code=True), partial(robustkit.load_model, trust_code=True)
RESNET, SMALL = "robustkit:cifar-resnet20?num_classes=4&in_channels=1", "nets:small?channels=1&classes=4"
X = torch.rand(11, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = net(3)(X).argmax(1)
DATA = from_arrays(X, Y)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("runs")
    norm = {"mean": [0.5], "std": [0.5]}
    return {
        "a": write_posterior(place / "a", [net(seed) for seed in range(5)], **norm),
        "b": write_posterior(place / "b", [net(0, f"{SMALL}&seed={seed}") for seed in range(3)], arch=SMALL),
        "resnet": write_posterior(place / "resnet", [net(seed, RESNET) for seed in range(2)], arch=RESNET),
        "members": write_members(
            place / "members", [net(0, f"{SMALL}&seed={seed}") for seed in (4, 5, 6)], arch=SMALL
        ),
    }


def ensemble(
    strings: list[str], *, loaded: bool = True, held: bool = True, combine: str = "gradients"
) -> Ensemble:
    return Ensemble(
        gather(strings, DATA, CPU, keep=lambda total: loaded, trust_code=True), CPU, Storage(loaded, held), combine
    )


def expected(groups: list[list[str]], attack: str, combine: str = "gradients", seed: int = 0) -> torch.Tensor:
    """The attack on nets that are all in memory, each loaded by itself."""

    class Nets:
        def __init__(self, nets: list[torch.nn.Module]) -> None:
            self.nets = nets

        def __len__(self) -> int:
            return len(self.nets)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError

        def sample(self, number: int) -> torch.nn.Module:
            return self.nets[number]

    members = [Nets(list(map(load_model, group))) if len(group) > 1 else load_model(group[0]) for group in groups]
    rng = RowRng(seed, "craft", torch.arange(len(X)))
    whole = compose(parse_attack(attack, "linf"))
    return whole(Surrogates(members, combine), X, Goal(Y), ThreatModel.parse(EPS), rng=rng)


@pytest.mark.parametrize(
    ("attack", "streaming", "combine"),
    [
        ("mi-fgsm(steps=4)", True, "logits"),
        ("mi-fgsm(steps=4)+light(samples=2)", False, "gradients"),
        ("i-fgsm(steps=2)+full", True, "gradients"),
        ("i-fgsm(steps=2)+full", False, "logits"),
        ("cwa(steps=3,order=antithetic)", False, "gradients"),
        ("pgd(steps=3)+di+ti", False, "logits"),
    ],
)
def test_crafting_on_posteriors_equals_the_attack_on_loaded_nets(
    runs: dict[str, str], attack: str, streaming: bool, combine: str
) -> None:
    """Swapped into one net, loaded or streamed: the same images as with all nets in memory."""
    strings = [runs["a"], runs["b"], "robustkit:digits-cnn?num_classes=4&pretrained=false"]
    record = craft(strings, X, Y, EPS, attack=attack, combine=combine, batch_size=4, streaming=streaming)
    groups = [[f"{runs['a']}#{k}" for k in range(5)], [f"{runs['b']}#{k}" for k in range(3)], strings[2:]]
    found = torch.from_numpy(record.adversarial["x"])
    same = (found - expected(groups, attack, combine)).abs() < 1e-4
    # Sums round by the batch: a gradient near 0 may turn its sign.
    assert same.float().mean() > 0.99


def test_gradients_per_image_of_posteriors(runs: dict[str, str]) -> None:
    def spent(attack: str, *strings: str, **words: Any) -> float:
        return craft(list(strings), X[:3], Y[:3], EPS, attack=attack, batch_size=2, **words).gradients_per_image

    assert spent("i-fgsm(steps=4)", runs["a"]) == 4
    assert spent("i-fgsm(steps=4)+light(samples=2)", runs["a"]) == 8
    for streaming in (False, True):
        assert spent("i-fgsm(steps=2)+full", runs["a"], runs["b"], streaming=streaming) == 2 * (5 + 3)
    assert spent("cwa(steps=4)", runs["a"], runs["b"]) == 4 * 2 * 2
    assert spent("i-fgsm(steps=4)+full", runs["members"]) == 12


class RecordedMessages(Progress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize(
    ("attack", "warned"),
    [("i-fgsm(steps=4)", True), ("i-fgsm(steps=5)", False), ("i-fgsm(steps=3)+light(samples=2)", False)],
)
def test_too_few_steps_for_all_samples_raise_a_flag(runs: dict[str, str], attack: str, warned: bool) -> None:
    heard = RecordedMessages()
    craft([runs["a"], runs["b"]], X[:2], Y[:2], EPS, attack=attack, progress=heard)
    assert any("did not reach all 5 nets of a run folder" in text for text in heard.messages) == warned


def test_score_attacks_on_a_single_net_print_no_warning(runs: dict[str, str]) -> None:
    heard = RecordedMessages()
    craft(
        ["robustkit:digits-cnn?num_classes=4&pretrained=false"],
        X[:2],
        Y[:2],
        EPS,
        attack="square(queries=2)",
        progress=heard,
    )
    assert heard.messages == []


@pytest.mark.parametrize("attack", ["mi-fgsm(steps=4)", "cwa(steps=2)+light(samples=2)"])
def test_images_are_independent_of_the_batch_size(runs: dict[str, str], attack: str) -> None:
    found = [craft([runs["a"]], X, Y, EPS, attack=attack, batch_size=size).adversarial["x"] for size in (1, 4, 11)]
    for other in found[1:]:
        assert (abs(other - found[0]) < 1e-5).mean() > 0.99


def test_light_attacks_use_the_members_of_a_trained_ensemble(runs: dict[str, str]) -> None:
    record = craft([runs["members"]], X, Y, EPS, attack="i-fgsm(steps=4)", combine="logits")
    groups = [[f"{runs['members']}#{k}" for k in range(3)]]
    found = torch.from_numpy(record.adversarial["x"])
    assert ((found - expected(groups, "i-fgsm(steps=4)", "logits")).abs() < 1e-5).float().mean() > 0.99
    whole = craft([runs["members"]], X, Y, EPS, attack="i-fgsm(steps=4)+full", combine="logits")
    alone = craft(
        [f"{runs['members']}#{k}" for k in range(3)], X, Y, EPS, attack="i-fgsm(steps=4)", combine="logits"
    )
    assert (abs(whole.adversarial["x"] - alone.adversarial["x"]) < 1e-5).mean() > 0.99


@pytest.mark.parametrize("technique", ["sgm", "ghost+di+light(samples=2)", "ghost+full"])
def test_techniques_on_residual_blocks_work_on_posteriors(runs: dict[str, str], technique: str) -> None:
    x, y = X[:3], Y[:3]
    plain = craft([runs["resnet"]], x, y, EPS, attack="mi-fgsm(steps=2)")
    record = craft([runs["resnet"]], x, y, EPS, attack=f"mi-fgsm(steps=2)+{technique}")
    assert ThreatModel.parse(EPS).contains(torch.from_numpy(record.adversarial["x"]), x).all()
    assert (record.adversarial["x"] != plain.adversarial["x"]).any()


def test_samples_of_a_posterior_share_one_resident_net(runs: dict[str, str]) -> None:
    """However many samples there are, one net's weights are there to be asked; more are only mapped."""
    (one,) = gather([runs["a"]], DATA, CPU)
    (alone,) = gather([f"{runs['a']}#0"], DATA, CPU)
    assert (one.count, alone.count) == (5, 1)
    assert one.parameters == alone.parameters
    assert one.graph == alone.graph
    models = ensemble([runs["a"]])
    members: Sequence[Any] = models.surrogates().members
    with models.in_eval_mode():
        places = {id(members[0].sample(number).place) for number in range(5)}
    assert len(places) == 1


def test_streaming_keeps_one_net_in_memory(runs: dict[str, str]) -> None:
    import gc
    import weakref

    models = ensemble([runs["a"], runs["b"]], loaded=False, held=False)
    members: Sequence[Any] = models.surrogates().members
    seen = []
    for member in (members[0], members[1], members[0]):
        for number in (0, 2):
            with member.sample(number).resident() as instrumented:
                seen.append(weakref.ref(instrumented.model.net))
                instrumented(X)
    gc.collect()
    assert len({id(one()) for one in seen if one() is not None}) == 1
    assert models.counts == (6 * len(X), 0)


def test_a_killed_run_resumes(runs: dict[str, str], tmp_path: Path) -> None:
    from robustkit.engine.progress import Progress

    class Stop(Progress):
        def advance(self, done: float, robust: int) -> None:
            if done >= 8:
                raise KeyboardInterrupt

    words: dict[str, Any] = {"attack": "mi-fgsm(steps=3)", "batch_size": 4}
    whole = craft([runs["a"]], X, Y, EPS, **words)
    with pytest.raises(KeyboardInterrupt):
        craft([runs["a"]], X, Y, EPS, out=tmp_path, progress=Stop(), **words)
    again = craft([runs["a"]], X, Y, EPS, out=tmp_path, **words)
    assert again.run_id == whole.run_id
    assert (again.adversarial["x"] == whole.adversarial["x"]).all()
    assert json.loads((tmp_path / "transfer.json").read_text())["surrogates"][0]["model"] == runs["a"]


def test_a_posterior_as_target_predicts_by_its_mean(runs: dict[str, str]) -> None:
    record = craft([f"{runs['b']}#0"], X, Y, EPS, attack="fgsm", targets=[runs["a"], runs["members"]])
    found = torch.from_numpy(record.adversarial["x"])
    for judged, string in zip(record.targets, (runs["a"], runs["members"]), strict=True):
        assert judged.predictions["adversarial"] == load_model(string)(found).argmax(1).tolist()
    with pytest.raises(UsageError, match="given twice"):
        craft([runs["a"], runs["a"]], X, Y, EPS)


def test_the_training_cost_is_printed_with_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = write_posterior(tmp_path / "p", [net(seed) for seed in range(2)], cost={"flops": 4_340_000_000})
    other = "robustkit:digits-cnn?num_classes=4&pretrained=false"
    record = craft([f"{trained}#1", other], X[:2], Y[:2], EPS, attack="fgsm")
    assert record.environment["training_flops"] == [4_340_000_000, None]
    show(record, Console())
    assert "\ntraining cost: p/#1 4.34 gigaflop\n" in capsys.readouterr().out
    assert "p/#1 4.34 gigaflop" in craft_page.page(record, None)
    show(craft([other], X[:2], Y[:2], EPS, attack="fgsm"), Console())
    assert "trained for" not in capsys.readouterr().out


def test_a_posterior_is_evaluated_as_its_mean(runs: dict[str, str]) -> None:
    for name in ("b", "members"):
        model = load_model(runs[name])
        report = evaluate(model, X, model(X).argmax(1), "linf:0.9", suite="pgd(steps=20)")
        assert report.clean_accuracy.value == 1.0
        assert report.robust_accuracy.value < 1.0
