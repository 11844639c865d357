"""Craft runs: images, counts, success on targets, streaming, interruptions and errors."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Small, labelled
from safetensors.torch import save_file
from torch import nn

from robustkit import RunError, ThreatModel, UsageError, craft, load_model
from robustkit.attack_api.surrogates import COMBINATIONS
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.crafting.ensemble import Ensemble, Storage
from robustkit.crafting.image_store import ResumableCrafter
from robustkit.crafting.run import run_craft
from robustkit.crafting.spec import CraftRequest
from robustkit.data import from_arrays
from robustkit.engine.model import loaded_models
from robustkit.engine.model.loaded_models import gather
from robustkit.engine.progress import Progress
from robustkit.models.zoo.cifar_resnet import CifarResNet
from robustkit.runs.craft_record import Craft
from robustkit.runs.run_folder import LEDGER, TRANSFER, read_adversarial

SHAPE = (3, 6, 8)
CPU = torch.device("cpu")
EPS = "linf:0.06"


class DoubleNet(nn.Module):
    """A small net in float64, so that no gradient sign depends on the batch size."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = Small(seed=seed).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.double())


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return labelled(Small(), 21, SHAPE)


def test_the_record_holds_spec_costs_and_success(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = data
    before = x.clone()
    members, target = [Small(seed=1).train(), Small(seed=2)], Small()
    record = craft(members, x, y, EPS, attack="mi-fgsm(steps=7)", targets=[target], combine="logits")
    assert record.n == 21
    assert record.gradients_per_image == 14
    found = record.adversarial
    assert found is not None
    assert found["index"].tolist() == list(range(21))
    assert (found["y"] == y.numpy()).all()
    x_adv = torch.from_numpy(found["x"])
    assert ThreatModel.parse(EPS).contains(x_adv, x).all()
    (judged,) = record.targets
    with torch.no_grad():
        expected = (target(x_adv).argmax(1) != y).float().mean()
    assert judged.success == pytest.approx(float(expected))
    assert (judged.n, judged.clean_accuracy) == (21, 1.0)
    assert judged.noise is not None
    assert judged.transplant is not None
    assert len(record.surrogates) == 2
    # nothing of the caller's has changed
    assert members[0].training
    assert all(p.requires_grad and p.grad is None for net in (*members, target) for p in net.parameters())
    assert torch.equal(x, before)


def test_running_statistics_are_unchanged(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Trials that choose how to run a net are not to train it."""
    x, y = data
    net = nn.Sequential(nn.BatchNorm2d(3), Small()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    craft([net], x, y, EPS, attack="fgsm")
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_gradients_are_those_of_an_independent_counter(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = data
    net, seen = Small(seed=1), {"": 0}

    def count(module: nn.Module, into: object, out: tuple[torch.Tensor, ...]) -> None:
        seen[[*seen][-1]] += len(out[0])

    net.body[0].register_full_backward_hook(count)

    class Begin(Progress):
        # What chooses the layout before, and judges behind, is no part of the attack.
        def stage(self, name: str, images: int, robust: int, n: int) -> None:
            seen[name] = 0

    members = [net, Small(seed=2)]
    record = craft(members, x, y, EPS, attack="i-fgsm(steps=3)", batch_size=8, progress=Begin())
    assert seen["i-fgsm"] == 3 * 21
    assert record.gradients_per_image * 21 == 2 * seen["i-fgsm"]


@pytest.mark.parametrize("attack", ["mi-fgsm(steps=4)", "pgd(steps=3)"])
def test_images_are_independent_of_the_batch_size(attack: str, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = data
    found = [
        craft([DoubleNet(1), DoubleNet(2)], x, y, EPS, attack=attack, batch_size=size, combine="gradients")
        for size in (1, 7, 64)
    ]
    images = [record.adversarial["x"].tobytes() for record in found if record.adversarial]
    assert images[0] == images[1] == images[2]
    assert len({record.run_id for record in found}) == 1


@pytest.mark.parametrize("choice", ["next", "random", "least-likely"])
def test_targeted_crafting_records_goals_and_success(choice: str, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = data
    found = [
        craft(
            [DoubleNet(1)], x, y, "linf:0.5", attack="mi-fgsm(steps=5)", targeted=choice, batch_size=size, seed=3
        )
        for size in (5, 21)
    ]
    goals = found[0].goals
    assert goals == found[1].goals
    assert goals is not None
    assert all(goal != label and 0 <= goal < 10 for goal, label in zip(goals, y.tolist(), strict=True))
    if choice == "next":
        assert goals == ((y + 1) % 10).tolist()
    if choice == "least-likely":
        logits = DoubleNet(1)(x).detach()
        lowest = logits.scatter(1, y[:, None], torch.inf).argmin(1)
        assert goals == lowest.tolist()
    said = found[0].surrogates[0].predictions["adversarial"]
    reached = found[0].surrogates[0].fooled(y.tolist(), goals)
    assert [hit for hit in reached if hit is not None] == [
        word == goal for word, goal, hit in zip(said, goals, reached, strict=True) if hit is not None
    ]


@pytest.mark.parametrize("norm", ["linf:0.05", "l2:0.7", "l1:5"])
def test_noise_floors_have_the_norm_of_the_threat(norm: str) -> None:
    from robustkit.crafting.judging import TargetEvaluator

    threat = ThreatModel.parse(norm)
    x = torch.full((5, *SHAPE), 0.5)
    evaluator = TargetEvaluator(from_arrays(x, torch.zeros(5, dtype=torch.long)), threat, None, 0, CPU)
    noise = evaluator.noise(np.array([1, 3]), x[:2])
    assert torch.allclose(threat.distance(noise, x[:2]), torch.tensor(float(threat.eps)).double(), rtol=1e-4)
    assert torch.equal(noise[1:], evaluator.noise(np.array([3]), x[:1]))  # whatever else is in the batch
    adversarial = torch.stack([x[0] + 0.001 * number for number in range(5)]).numpy()
    swapped = evaluator.transplant(adversarial, np.array([0, 4]), x[:2])
    assert torch.allclose(swapped - 0.5, torch.tensor([0.001, 0.0]).view(2, 1, 1, 1).expand(2, *SHAPE), atol=1e-6)


@pytest.mark.slow
def test_the_forecast_leaves_each_surrogate_out(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = data
    members = [DoubleNet(seed) for seed in (1, 2, 3)]
    record = craft(members, x, y, EPS, forecast=True)
    assert record.forecast is not None
    for left in range(3):
        others = [net for number, net in enumerate(members) if number != left]
        alone = craft(others, x, y, EPS, targets=[members[left]])
        assert record.forecast.left_out[left] == alone.targets[0].rate
    assert record.forecast.gradients_per_image == 3 * 2 * 20
    assert record.gradients_per_image == 3 * 20


@pytest.mark.slow
def test_budgets_are_met(data: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    x, y = data
    members, target = [DoubleNet(1), DoubleNet(2)], DoubleNet(0)
    record = craft(members, x, y, EPS, attack="mi-fgsm(step_size=0.2)", targets=[target], budgets=[1, 5, 20, 41])
    assert record.budgets is not None
    assert [point.steps for point in record.budgets] == [None, 2, 10, 20]
    assert [point.gradients_per_image for point in record.budgets] == [None, 4, 20, 40]
    assert [point.step_size for point in record.budgets] == [None, 0.5, 0.2, 0.2]
    assert record.budgets[2].success == [record.targets[0].rate]
    with pytest.raises(UsageError, match="--target"):
        craft(members, x, y, EPS, budgets=[5])
    for attack in ("square(queries=5)", "fgsm", "fgsm+di"):
        with pytest.raises(UsageError, match=rf"^{re.escape(attack.partition('(')[0])} has no number of steps"):
            craft(members, x, y, EPS, attack=attack, targets=[target], budgets=[5], out=tmp_path / "none")
        assert not (tmp_path / "none").exists()  # said before anything is crafted


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("mi-fgsm(steps=3,step_size=0.1eps)", "of eps is all that 3 steps of 0.1eps can change"),
        ("mi-fgsm(steps=10,step_size=0.0018px)", "of eps is all that 10 steps of 0.0018px can change"),
        ("mi-fgsm(steps=3)", None),
        ("mi-fgsm(steps=10)+di", None),
        ("mi-fgsm(steps=2,step_size=0.5)", None),
        ("cwa(steps=2)", None),
        ("fgsm", None),
        ("square(queries=3)", None),
    ],
)
def test_steps_that_cannot_reach_eps_raise_a_flag(
    attack: str, said: str | None, data: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = data
    record = craft([DoubleNet(1)], x[:3], y[:3], EPS, attack=attack)
    assert [flag.meaning for flag in record.flags if flag.code == "steps-fall-short"] == ([said] if said else [])
    assert Craft.from_json(record.to_json()) == record
    assert ("flags" in record.to_json()) == bool(record.flags)
    if said:
        change = np.abs(record.adversarial["x"] - x[:3].numpy()).max() / 0.06
        assert change == pytest.approx(0.3, abs=1e-4)


def test_one_model_is_a_list_of_one(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A net is callable and may be iterable too, layer by layer, as a string is letter by letter."""
    x, y = data[0][:3, :1, :, :6], data[1][:3]
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 10))
    for model in (net, "robustkit:digits-cnn"):
        alone = craft(model, x, y, EPS, attack="fgsm", targets=model)
        listed = craft([model], x, y, EPS, attack="fgsm", targets=[model])
        assert alone.run_id == listed.run_id
        assert [one.model for one in alone.targets] == [one.model for one in listed.targets]
    layers = nn.ModuleList([net, nn.Sequential(nn.Flatten(), nn.Linear(36, 10))])
    assert len(craft(layers, x, y, EPS, attack="fgsm").surrogates) == 2


def test_a_net_from_python_is_kept_while_others_are_freed(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = data[0][:3, :1], data[1][:3]
    net, string = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), "robustkit:digits-cnn"
    found = [craft([net, string], x, y, EPS, attack="fgsm", streaming=streaming) for streaming in (True, False)]
    assert np.abs(found[0].adversarial["x"] - found[1].adversarial["x"]).max() < 1e-6


@pytest.mark.slow
def test_nets_loaded_from_strings_are_freed_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python as from the command line: `streaming=None` goes by the memory there is."""
    samples = from_arrays(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    string = "robustkit:digits-cnn"
    for free, streaming, held in ((10**12, None, True), (0, None, False), (0, False, True), (10**12, True, False)):
        monkeypatch.setattr(loaded_models, "free_memory", lambda device, free=free: free)
        found, judges = loaded_models.gather_both([string], [f"{string}?mean=0.4"], samples, CPU, streaming)
        assert (found[0].model is not None) == held
        assert judges[0].model is None or (free and held)


def test_nets_of_one_architecture_run_as_one_batched_net(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = data
    found = gather([Small(seed=1), Small(seed=2), Small(seed=3)], from_arrays(x, y), CPU)
    ensemble = Ensemble(found, CPU, Storage(True, True), "gradients")
    ensemble.tune(x, lambda configs: json.dumps({**json.loads(configs), "together": True}), hooked=False)
    alone = Ensemble(found, CPU, Storage(True, True), "gradients")
    assert ensemble.surrogates().together is not None
    rng = RowRng(0, "test", torch.arange(len(x)))
    for one, other in ((ensemble, alone), (alone, ensemble)):
        gradient = one.surrogates().gradient(x, Goal(y), "ce", rng)
        assert torch.allclose(gradient, other.surrogates().gradient(x, Goal(y), "ce", rng), atol=1e-4)
    assert ensemble.counts == alone.counts == (2 * 63, 2 * 63)


@pytest.mark.slow
def test_streaming_holds_two_nets_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty nets of ResNet-56's size: what is alive in tensors is counted at every load."""
    strings = []
    for seed in range(20):
        torch.manual_seed(seed)
        save_file(CifarResNet(depth=56).state_dict(), tmp_path / f"{seed}.safetensors")
        strings.append(f"robustkit:cifar-resnet56@{tmp_path / f'{seed}.safetensors'}")
    alive: list[weakref.ref[Any]] = []
    most = [0]

    def watched(string: str, **options: Any) -> Any:
        model = load_model(string, **options)
        alive.append(weakref.ref(model))
        bytes_alive = sum(
            sum(parameter.nbytes for parameter in net.parameters()) for ref in alive if (net := ref()) is not None
        )
        most[0] = max(most[0], bytes_alive)
        return model

    monkeypatch.setattr(loaded_models, "load_model", watched)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    record = craft(strings, x, [1, 2], "linf:8/255", attack="i-fgsm(steps=1)", streaming=True)
    assert record.gradients_per_image == 20
    assert not record.environment["loaded"]
    one = sum(parameter.nbytes for parameter in CifarResNet(depth=56).parameters())
    assert one <= most[0] <= 2 * one
    assert len(alive) >= 60  # looked at, asked for a gradient, judged


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_streaming_gives_the_same_images(
    combine: str, tmp_path: Path, data: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = data
    members, attack = [DoubleNet(1), DoubleNet(2)], "mi-fgsm(steps=4)"
    found = [
        craft(members, x[:9], y[:9], EPS, attack=attack, combine=combine, streaming=streaming).adversarial
        for streaming in (True, False)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert (found[0]["x"] == found[1]["x"]).mean() > 0.999


@pytest.mark.slow
def test_an_interrupted_craft_run_resumes(tmp_path: Path, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = data
    members, target = [DoubleNet(1), DoubleNet(2)], DoubleNet(0)

    def work(out: Path, progress: Progress | None = None, **more: Any) -> Any:
        return craft(members, x, y, EPS, targets=[target], batch_size=4, out=out, progress=progress, **more)

    whole = work(tmp_path / "whole")

    class Stop(Progress):
        calls = 0

        def advance(self, done: float, robust: int) -> None:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "stopped", Stop())
    assert not (tmp_path / "stopped" / TRANSFER).exists()
    said: list[str] = []

    class Listen(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    resumed = work(tmp_path / "stopped", Listen())
    assert "12 of 21 images done" in said[0]
    for name in ("adversarial.npz", "spec.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert resumed.targets == whole.targets
    # the same again is the stored result; another target or a forecast adds to it without crafting anew
    before = (tmp_path / "whole" / LEDGER).read_bytes()
    assert work(tmp_path / "whole", Listen()).to_json() == whole.to_json()
    assert "finished before" in said[-1]
    assert (tmp_path / "whole" / LEDGER).read_bytes() == before
    more = craft(members, x, y, EPS, targets=[DoubleNet(5)], out=tmp_path / "whole", forecast=True, budgets=[8])
    assert [one.fingerprint for one in more.targets][:1] == [whole.targets[0].fingerprint]
    assert len(more.targets) == 2
    assert more.forecast is not None
    # a target from Python cannot be loaded again by its string: its place at the budget stays empty
    assert [rate is None for rate in more.budgets[0].success] == [True, False]
    with pytest.raises(UsageError, match="differs in seed"):
        work(tmp_path / "whole", seed=1)
    shutil.copytree(tmp_path / "whole", tmp_path / "bad")
    content = bytearray((tmp_path / "bad" / "adversarial.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bad" / "adversarial.npz").write_bytes(content)
    with pytest.raises(RunError, match="has changed since the run"):
        work(tmp_path / "bad")
    assert len(read_adversarial(tmp_path / "whole")["x"]) == 21


def test_out_of_memory_halves_the_batch(
    data: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = data
    plan = CraftRequest(gather([DoubleNet(1)], from_arrays(x, y), CPU), from_arrays(x, y), ThreatModel.parse(EPS))
    expected = run_craft(plan)
    original = ResumableCrafter._chunk

    def tight(self: Any, stage: int, attack: Any, surrogates: Any, goals: Any, at: np.ndarray, images: Any) -> Any:
        if len(at) > 6:
            raise MemoryError
        return original(self, stage, attack, surrogates, goals, at, images)

    monkeypatch.setattr(ResumableCrafter, "_chunk", tight)
    found = run_craft(plan)
    assert found.adversarial is not None
    assert expected.adversarial is not None
    assert (found.adversarial["x"] == expected.adversarial["x"]).all()


class NanGradient(Small):
    """Its gradient is NaN for some images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dark = (x.detach().mean((1, 2, 3)) < 0.45)[:, None]
        return torch.where(dark, torch.nan, 1.0) * super().forward(x)


def test_images_that_are_not_finite_are_replaced_by_the_clean_ones() -> None:
    x, y = labelled(Small(), 6, SHAPE)
    x[3] = 0.1
    record = craft([NanGradient()], x, y, EPS, attack="mi-fgsm")
    assert record.adversarial is not None
    assert (record.adversarial["x"][3] == x[3].numpy()).all()
    assert np.isfinite(record.adversarial["x"]).all()
