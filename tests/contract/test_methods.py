"""What every method of training must do, parametrised over the registry: a new file needs no edit here."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustkit import load_model, registry, train
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.step_size import StepSize
from robustkit.data import from_arrays
from robustkit.data.samples import Samples
from robustkit.posterior import Posterior
from robustkit.registry import make_again, make_method
from robustkit.runs.training_record import Trained
from robustkit.training import loop
from robustkit.training.loop import take_step
from robustkit.training.method import Batch, Method, Plan
from robustkit.training.posterior_method import PosteriorMethod
from robustkit.training.progress import TrainProgress
from robustkit.training.wrapping_method import WrappingMethod

SHAPE = (3, 7, 9)
CLASSES = 4
IMAGES = 48
PLAN = Plan(samples=IMAGES, classes=CLASSES, batch_size=16, epochs=6, lr=0.05)

# Fields that fit so short a run, where the defaults do not.
FIELDS: dict[str, dict[str, Any]] = {
    "csgld": {"cycles": 2, "samples_per_cycle": 2, "noise_epochs": 1},
    "csghmc": {"cycles": 2, "samples_per_cycle": 2, "noise_epochs": 1},
    "sgld": {"snapshots": 3, "burn_in": 0.5},
    "psgld": {"snapshots": 3, "burn_in": 0.5},
    "lgv": {"collect_epochs": 2, "snapshots_per_epoch": 2},
    "mba": {"collect_epochs": 2, "snapshots": 5, "draws": 3, "collect_rate": 0.5},
    "swag": {"draws": 3, "rank": 2},
    "dverge": {"steps": 2, "adversarial": 1.0, "adversarial_steps": 2, "clean": 0.5, "baseline": 0.0},
    "dverge+at": {"steps": 2, "adversarial_steps": 2, "clean": 0.5, "baseline": 0.0},
    "fasten": {"baseline": 0.0},
    "pgd-at": {"steps": 2},
    "free-at": {"repeats": 3},
    "mart": {"steps": 2, "threat": "linf:0.01"},
    "ibp": {"threat": "linf:0.001"},
    "trades": {"steps": 2, "threat": "linf:0.01"},
    "trs": {"steps": 2, "scale": 0.1},
    "adp": {"volume": 0.2, "entropy": 0.2},
    "multires": {
        **{"resolutions": "7+3", "noise": 0.1, "jitter": 1, "contrast": "", "colour": ""},
        **{"layers": "body.1", "attack": "pgd", "steps": 1, "threat": "linf:0.01", "probing": 0.7},
    },
}
# Words that a field may have besides its default.
WORDS = {
    "schedule": "steps",
    "batch_norm": "re-estimate",
    "layer": "1",
    "draw": "member",
    "statistics": "separate",
    "threat": "linf:0.1",
    "preset": "paper",
    "resolutions": "7",
    "contrast": "0.1:2",
    "colour": "0.1:0.2",
    "layers": "body.0",
    "stem": "inflated",
    "attack": "fgsm",
}

# What is to be known of the digits, where a method pays for robustness with it.
KNOWN = {"multires": 0.85}

METHODS = sorted(registry.catalog("method"))


def small(name: str, **fields: Any) -> Method:
    """The method, with less effort than its defaults where those take long."""
    return make_method(name, **{**FIELDS.get(name, {}), **fields})


class Normed(nn.Module):
    """A small net with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def normed() -> nn.Module:
    """The factory for model strings."""
    return Normed()


def prepared(method: Method) -> nn.Module:
    """A net as the method trains it."""
    if isinstance(method, WrappingMethod):
        return method.wrap(Normed(), torch.zeros(1, *SHAPE), None, None)
    return Normed()


def toy(seed: int, count: int = IMAGES) -> Samples:
    """Images whose classes differ by brightness and by a corner."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    x = torch.rand(count, *SHAPE, generator=generator) * 0.5 + labels[:, None, None, None] * 0.1
    x[labels == 2, :, :3, :3] = 0
    return from_arrays((x * 255).round() / 255, labels)


def run(
    method: Method, folder: Path, *, seed: int = 0, progress: TrainProgress | None = None, **plan: Any
) -> Trained:
    plan = {"epochs": PLAN.epochs, "batch_size": PLAN.batch_size, "lr": PLAN.lr, **plan}
    return train(
        method,
        toy(0),
        test=toy(1, 40),
        arch=f"{__file__}:normed",
        seed=seed,
        out=folder,
        progress=progress,
        **plan,
    )


def outcome(method: Method, plan: Plan = PLAN) -> list[dict[str, Tensor]]:
    """What a method makes of a net by its hooks alone: the last state, and its samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [prepared(method) for _ in range(2 if method.ensembles else 1)]
    net, plan = nets[0], dataclasses.replace(plan, members=len(nets))
    optimizers = [method.optimizer(net.parameters(), plan) for net in nets]
    images = toy(0)
    x, y = images.images(np.arange(IMAGES)), torch.from_numpy(images.labels)
    kept = []
    memory = torch.zeros(IMAGES, len(nets), *SHAPE, dtype=torch.int8)
    for step in range(plan.steps):
        rows = torch.arange(plan.batch_size) + step % plan.steps_per_epoch * plan.batch_size
        other = (rows * 5 + step) % IMAGES
        rng = RowRng(plan.seed, "method", rows, step=step)
        known = memory[rows]
        batch = Batch(x[rows], y[rows], rng, step, x[other], y[other], known)
        for _ in range(method.batch_needs.repeats):
            for optimizer in optimizers:
                optimizer.zero_grad()
            method.backward(nets, batch, plan)
            for optimizer in optimizers:
                take_step(method, optimizer, step, plan)
        memory[rows] = known
        if isinstance(method, PosteriorMethod) and method.keeps(step, plan):
            kept.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return [net.state_dict(), *(method.samples(iter(kept), plan) if isinstance(method, PosteriorMethod) else [])]


def same(one: list[dict[str, Tensor]], two: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Trained]]:
    """A finished run of each method, made when it is first asked for."""

    class Made(dict[str, tuple[Path, Trained]]):
        def __missing__(self, name: str) -> tuple[Path, Trained]:
            folder = tmp_path_factory.mktemp(name) / "run"
            self[name] = folder, run(small(name), folder)
            return self[name]

    return Made()


@pytest.mark.parametrize("name", METHODS)
def test_a_run_leaves_what_the_contract_says(name: str, runs: dict[str, tuple[Path, Trained]]) -> None:
    folder, record = runs[name]
    method = small(name)
    stored = json.loads((folder / "model.json").read_text())
    assert stored == json.loads(json.dumps(record.to_json()))
    assert make_again("method", stored["method"]) == method
    assert len(record.history) == PLAN.epochs
    assert record.history[0]["loss"] > record.history[-1]["loss"]
    assert [one["rate"] for one in record.history] == [
        method.rate((epoch + 1) * PLAN.steps_per_epoch - 1, PLAN) for epoch in range(PLAN.epochs)
    ]
    assert record.accuracy is not None
    assert record.accuracy["value"] > 1.5 / CLASSES
    assert record.cost["backwards"] >= PLAN.steps * PLAN.batch_size * record.members
    assert {path.name for path in folder.iterdir()} >= {"model.json", "metrics.jsonl"}
    assert not {"samples", "kept"} & {path.name for path in folder.iterdir()}
    assert (folder / "posterior.safetensors").is_file() == isinstance(method, PosteriorMethod)
    assert (folder / "model.safetensors").is_file() != isinstance(method, PosteriorMethod)


@pytest.mark.parametrize("name", METHODS)
def test_a_folder_is_a_model(name: str, runs: dict[str, tuple[Path, Trained]]) -> None:
    """C7: and each stored sample reproduces its recorded accuracy and loss."""
    folder, record = runs[name]
    test = toy(1, 40)
    x, y = test.images(np.arange(40)), torch.from_numpy(test.labels)

    def judged(string: str) -> tuple[float, float]:
        with torch.no_grad():
            scores = load_model(string, trust_code=True)(x).log_softmax(1)
        hits = (scores.argmax(1) == y).double().mean()
        return float(hits), float(nn.functional.nll_loss(scores, y))

    assert record.accuracy is not None
    # Of a net that draws, the record is that of draws by the images' content.
    drawn = "?noise=content" if isinstance(small(name), WrappingMethod) else ""
    assert judged(f"{folder}/{drawn}")[0] == pytest.approx(record.accuracy["value"])
    for number, facts in enumerate(record.samples):
        assert judged(f"{folder}/#{number}") == pytest.approx((facts["accuracy"], facts["loss"]), abs=1e-5)
    if record.samples:
        assert len(Posterior.open(folder)) == len(record.samples)


@pytest.mark.parametrize("name", METHODS)
def test_steps_of_samples_are_those_kept(name: str, runs: dict[str, tuple[Path, Trained]]) -> None:
    """Facts of a state of the run say when it was; a drawn one was at no step."""
    _, record = runs[name]
    method = small(name)
    if not isinstance(method, PosteriorMethod):
        assert not record.samples
        return
    kept = [step + 1 for step in range(PLAN.steps) if method.keeps(step, PLAN)]
    assert kept
    said = [facts["step"] for facts in record.samples]
    assert said == (kept if type(method).samples is PosteriorMethod.samples else [None] * len(said))
    for facts in record.samples:
        if facts["step"] is not None:
            assert facts["rate"] == method.rate(facts["step"] - 1, PLAN)
            assert facts["epoch"] == (facts["step"] - 1) // PLAN.steps_per_epoch + 1


class Cut(TrainProgress):
    """Stops a run after a step, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, done: int) -> None:
        if done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_run(
    name: str, runs: dict[str, tuple[Path, Trained]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C5: cut within an epoch it ends in the same bytes; the caller's generators stay where they were."""
    _, record = runs[name]
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    torch.manual_seed(9)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(KeyboardInterrupt):
        run(small(name), tmp_path, progress=Cut(PLAN.steps // 2 + 1))
    assert run(small(name), tmp_path).hashes == record.hashes
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("name", ["standard", "csgld"])
def test_another_seed_is_another_run(name: str, runs: dict[str, tuple[Path, Trained]], tmp_path: Path) -> None:
    assert run(small(name), tmp_path, seed=1).hashes != runs[name][1].hashes


@pytest.mark.parametrize("name", METHODS)
def test_backward_gives_gradients_and_leaves_the_net(name: str) -> None:
    """Weights, modes and hooks are as they were; the loss is a finite number without a graph.

    All weights have a gradient; of a method that wraps its nets and trains part after part, in one of the steps.
    """
    method = small(name)
    nets = [prepared(method).train() for _ in range(method.min_members)]
    whole = nn.ModuleList(nets)
    weights = [weight.detach().clone() for weight in whole.parameters()]
    images = toy(0)
    rows = torch.arange(12)
    memory = torch.zeros(12, len(nets), *SHAPE, dtype=torch.int8)
    reached: set[nn.Parameter] = set()
    for step in (0, PLAN.steps - 1):
        whole.zero_grad()
        rng = RowRng(0, "method", rows, step=step)
        x, y = images.images(np.arange(12)), torch.from_numpy(images.labels[:12])
        loss = method.backward(nets, Batch(x, y, rng, step, x.flip(0), y.flip(0), memory), PLAN)
        assert loss.isfinite()
        assert not loss.requires_grad
        moved = [weight for weight in whole.parameters() if weight.grad is not None]
        assert all(weight.grad.isfinite().all() for weight in moved)  # type: ignore[union-attr]
        assert isinstance(method, WrappingMethod) or len(moved) == len(weights)
        reached |= set(moved)
        assert all(torch.equal(old, new) for old, new in zip(weights, whole.parameters(), strict=True))
        assert all(part.training for part in whole.modules())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in whole.modules())
    assert reached == set(whole.parameters())


def is_another(name: str) -> bool:
    """Whether a method is another one with other defaults."""
    kind = registry.find("method", name)
    own = [value for word, value in vars(kind).items() if callable(value) and not word.startswith("__")]
    return hasattr(kind.__base__, "info") and not own


@pytest.mark.parametrize("name", [name for name in METHODS if not is_another(name)])
def test_every_field_counts(name: str) -> None:
    """A field that changes nothing is no field. Running statistics are the loop's; see the next test."""
    method = small(name)
    # Two epochs show a difference where neither samples nor probes wait for their time.
    plan = PLAN if isinstance(method, PosteriorMethod | WrappingMethod) else dataclasses.replace(PLAN, epochs=2)
    plain = outcome(method, plan)
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "batch_norm":
            continue
        if isinstance(value, str):
            other: Any = WORDS[field.name]
        elif isinstance(value, StepSize):
            other = f"{2 * value.number}eps"
        elif isinstance(value, bool):
            other = not value
        elif isinstance(value, int):
            other = value + 1
        else:
            other = (value + 1) / 2 if value < 1 else value / 2
        changed = small(name, **{field.name: other})
        changed.check_plan(dataclasses.replace(PLAN, members=max(method.min_members, 1)))
        assert not same(outcome(changed, plan), plain), f"{name}: {field.name}={other} is the same as {value}"


@pytest.mark.parametrize("name", [name for name in METHODS if isinstance(make_method(name), PosteriorMethod)])
def test_the_policy_for_batch_norms_is_carried_out(
    name: str, runs: dict[str, tuple[Path, Trained]], tmp_path: Path
) -> None:
    """The weights are the same, the running statistics are those on the training images or not."""
    other = "keep" if small(name).batch_norm == "re-estimate" else "re-estimate"
    run(small(name, batch_norm=other), tmp_path)
    one, two = Posterior.open(runs[name][0]), Posterior.open(tmp_path)
    assert len(one) == len(two)
    for number in range(len(one)):
        first, second = one.state(number), two.state(number)
        assert torch.equal(first["head.weight"], second["head.weight"])
        assert not torch.equal(first["body.1.running_mean"], second["body.1.running_mean"])
        assert all((state["body.1.running_var"] >= 0).all() for state in (first, second))
    with pytest.raises(UsageError, match="no batch_norm 'kept'"):
        small(name, batch_norm="kept").check_plan(PLAN)


HEATED = [name for name in METHODS if hasattr(make_method(name), "temperature")]


@pytest.mark.parametrize("name", HEATED)
def test_at_temperature_0_it_is_its_noise_free_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C4, bitwise; and heat moves it."""
    method = small(name, temperature=1.0)
    cold, warm = outcome(small(name, temperature=0.0)), outcome(method)
    monkeypatch.setattr(type(method), "noisy", lambda self, step, plan: False)
    assert same(cold, outcome(method))
    assert not same(cold, warm)


@pytest.mark.parametrize("name", METHODS)
def test_members_are_trained_or_refused(name: str, tmp_path: Path) -> None:
    method = small(name)
    if not method.ensembles:
        with pytest.raises(UsageError, match=f"{name} trains one net"):
            run(method, tmp_path, members=2)
        return
    record = run(method, tmp_path, members=2)
    assert record.members == len(record.member_accuracy) == 2
    first, second = (load_model(f"{tmp_path}/#{number}", trust_code=True).net.state_dict() for number in (0, 1))
    head = next(weight for weight in first if weight.endswith("head.weight"))
    assert not torch.equal(first[head], second[head])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_defaults_learn_the_digits(name: str, tmp_path: Path) -> None:
    """Every sample and every member knows them; the contract gives each method 3 minutes on 2 cores."""
    record = train(name, "digits:train", out=tmp_path)
    assert record.accuracy is not None
    assert record.accuracy["value"] > KNOWN.get(name, 0.95)
    alone = [facts["accuracy"] for facts in record.samples] or record.member_accuracy
    assert min(alone) > 0.85
    assert record.cost["seconds"] < 180


@pytest.mark.parametrize("name", METHODS)
def test_the_usual_size_can_be_carried_out(name: str) -> None:
    method = make_method(name)
    for samples in (200, 1437, 50_000, 1_281_167):
        size = method.default_size(samples)
        method.check_plan(
            Plan(samples, 10, min(size.batch_size, samples), size.epochs, size.lr, size.members or 1, seed=0)
        )
