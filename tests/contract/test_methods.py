"""What every method of training must do, parametrised over the registry: a new file needs no edit here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
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
from robustkit.posterior import Posterior
from robustkit.registry import make_method
from robustkit.runs.training_record import Trained
from robustkit.testing.methods import (
    IMAGES,
    PLAN,
    SHAPE,
    check_backward,
    check_resumes,
    check_run,
    prepared,
    toy,
    train_briefly,
)
from robustkit.training.loop import take_step
from robustkit.training.method import Batch, Method, Plan
from robustkit.training.posterior_method import PosteriorMethod
from robustkit.training.wrapping_method import WrappingMethod

# Fields that fit so short a run, where the defaults do not.
FIELDS: dict[str, dict[str, Any]] = {
    "csgld": {"cycles": 2, "samples_per_cycle": 2, "noise_epochs": 1},
    "csghmc": {"cycles": 2, "samples_per_cycle": 2, "noise_epochs": 1},
    "sgld": {"snapshots": 3, "burn_in": 0.5},
    "psgld": {"snapshots": 3, "burn_in": 0.7},
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
    """The method with fewer steps than its defaults where those are slow."""
    return make_method(name, **{**FIELDS.get(name, {}), **fields})


def states(method: Method, plan: Plan = PLAN) -> Iterator[list[dict[str, Tensor]]]:
    """Yield the state of a net after each step of the method's hooks, then the samples that they produce."""
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
            take_step(method, optimizers, step, plan)
        memory[rows] = known
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        if isinstance(method, PosteriorMethod) and method.keeps(step, plan):
            kept.append(state)
        yield [state]
    yield (
        [dict(sample) for sample in method.samples(iter(kept), plan)]
        if isinstance(method, PosteriorMethod)
        else []
    )


def outcome(method: Method) -> list[dict[str, Tensor]]:
    """Return the last state and the samples that the method's hooks produce from a net."""
    return [state for step in list(states(method))[-2:] for state in step]


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
            self[name] = folder, train_briefly(small(name), folder)
            return self[name]

    return Made()


@pytest.mark.parametrize("name", METHODS)
def test_a_run_writes_the_files_of_the_contract(name: str, runs: dict[str, tuple[Path, Trained]]) -> None:
    folder, record = runs[name]
    method = small(name)
    check_run(method, record, folder)
    assert [one["rate"] for one in record.history] == [
        method.rate((epoch + 1) * PLAN.steps_per_epoch - 1, PLAN) for epoch in range(PLAN.epochs)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_folder_loads_as_a_model(name: str, runs: dict[str, tuple[Path, Trained]]) -> None:
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
def test_recorded_steps_of_samples_are_those_kept(name: str, runs: dict[str, tuple[Path, Trained]]) -> None:
    """Facts of a state of the run say when it was; a drawn one was at no step."""
    _, record = runs[name]
    method = small(name)
    if not isinstance(method, PosteriorMethod):
        assert not record.samples
        return
    kept = [step + 1 for step in range(PLAN.steps) if method.keeps(step, PLAN)]
    assert kept
    recorded = [facts["step"] for facts in record.samples]
    assert recorded == (kept if type(method).samples is PosteriorMethod.samples else [None] * len(recorded))
    for facts in record.samples:
        if facts["step"] is not None:
            assert facts["rate"] == method.rate(facts["step"] - 1, PLAN)
            assert facts["epoch"] == (facts["step"] - 1) // PLAN.steps_per_epoch + 1


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(
    name: str, runs: dict[str, tuple[Path, Trained]], tmp_path: Path
) -> None:
    """C5: cut within an epoch it ends in the same bytes; the caller's generators stay where they were."""
    check_resumes(small(name), runs[name][1], tmp_path)


@pytest.mark.parametrize("name", ["standard", "csgld"])
def test_another_seed_gives_other_weights(
    name: str, runs: dict[str, tuple[Path, Trained]], tmp_path: Path
) -> None:
    assert train_briefly(small(name), tmp_path, seed=1).hashes != runs[name][1].hashes


@pytest.mark.parametrize("name", METHODS)
def test_backward_sets_gradients_and_changes_no_weights(name: str) -> None:
    check_backward(small(name))


def only_changes_defaults(name: str) -> bool:
    """Whether a method is another one with other defaults."""
    kind = registry.find("method", name)
    own = [value for word, value in vars(kind).items() if callable(value) and not word.startswith("__")]
    return hasattr(kind.__base__, "info") and not own


@pytest.mark.parametrize("name", [name for name in METHODS if not only_changes_defaults(name)])
def test_every_field_changes_the_result(name: str) -> None:
    """A field that changes nothing is no field. Running statistics are the loop's; see the next test."""
    method: Any = small(name)
    # Samples and probes wait for their time, and three cycles fit six epochs.
    epochs = 6 if isinstance(method, PosteriorMethod | WrappingMethod) else 2
    plan = dataclasses.replace(PLAN, epochs=epochs)
    plain = list(states(method, plan))
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
        changed.check_plan(dataclasses.replace(plan, members=max(method.min_members, 1)))
        # The first step that differs is enough.
        differs = any(not same(*step) for step in zip(states(changed, plan), plain, strict=False))
        assert differs, f"{name}: {field.name}={other} is the same as {value}"


@pytest.mark.parametrize("name", [name for name in METHODS if isinstance(make_method(name), PosteriorMethod)])
def test_the_batch_norm_policy_sets_the_running_statistics(
    name: str, runs: dict[str, tuple[Path, Trained]], tmp_path: Path
) -> None:
    """The weights are the same, the running statistics are those on the training images or not."""
    default: Any = small(name)
    other = "keep" if default.batch_norm == "re-estimate" else "re-estimate"
    train_briefly(small(name, batch_norm=other), tmp_path)
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
def test_temperature_0_equals_the_noise_free_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C4, bitwise; and heat moves it."""
    method = small(name, temperature=1.0)
    cold, warm = outcome(small(name, temperature=0.0)), outcome(method)
    monkeypatch.setattr(type(method), "noisy", lambda self, step, plan: False)
    assert same(cold, outcome(method))
    assert not same(cold, warm)


@pytest.mark.parametrize("name", METHODS)
def test_several_members_are_trained_or_refused(name: str, tmp_path: Path) -> None:
    method = small(name)
    if not method.ensembles:
        with pytest.raises(UsageError, match=f"{name} trains one net"):
            train_briefly(method, tmp_path, members=2)
        return
    # So small a rate leaves the initial weights, which are those of each member's own seed.
    record = train_briefly(method, tmp_path, members=2, epochs=2, lr=1e-6)
    assert record.members == len(record.member_accuracy) == 2
    first, second = (load_model(f"{tmp_path}/#{number}", trust_code=True).net.state_dict() for number in (0, 1))
    head = next(weight for weight in first if weight.endswith("head.weight"))
    assert (first[head] - second[head]).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_default_options_train_an_accurate_net_on_digits(name: str, tmp_path: Path) -> None:
    """Every sample and every member knows them; the contract gives each method 3 minutes on 2 cores."""
    record = train(name, "digits:train", out=tmp_path)
    assert record.accuracy is not None
    assert record.accuracy["value"] > KNOWN.get(name, 0.95)
    alone = [facts["accuracy"] for facts in record.samples] or record.member_accuracy
    assert min(alone) > 0.85
    assert record.cost["seconds"] < 180


@pytest.mark.parametrize("name", METHODS)
def test_the_default_size_passes_check_plan(name: str) -> None:
    method = make_method(name)
    for samples in (200, 1437, 50_000, 1_281_167):
        size = method.default_size(samples)
        method.check_plan(
            Plan(samples, 10, min(size.batch_size, samples), size.epochs, size.lr, size.members or 1, seed=0)
        )
