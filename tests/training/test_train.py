"""The loop: a resumed run equals an uninterrupted one bit for bit, two processes equal one; files, refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from robustkit import RunError, UsageError, load_data, load_model, train
from robustkit.registry import Info
from robustkit.runs.training_record import Trained
from robustkit.training import loop
from robustkit.training.method import Batch, Method, Plan
from robustkit.training.progress import TrainProgress

SHORT: dict[str, Any] = {
    "limit": 48,
    "epochs": 3,
    "batch_size": 16,
    "lr": 0.1,
    "test": load_data("digits:test").head(40),
}
SAMPLING = "csgld(cycles=1,samples_per_cycle=2,noise_epochs=2,temperature=1)"


class DropoutNet(nn.Module):
    """A net with batch norm and dropout, whose random numbers torch draws."""

    def __init__(self, num_classes: int = 10, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        )
        self.head = nn.Linear(36 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class InputDropoutNet(DropoutNet):
    """The same with dropout in front of it."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.body.insert(0, nn.Dropout(0.5))


DROPPING = f"{Path(__file__)}:DropoutNet"


class StopAfterSteps(TrainProgress):
    """Stops a run after some steps, as a signal would."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.messages: list[str] = []

    def say(self, text: str) -> None:
        self.messages.append(text)

    def step(self, done: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


def weights(folder: Path) -> bytes:
    return next(folder.glob("*.safetensors")).read_bytes()


@pytest.mark.parametrize(
    ("method", "more", "after"),
    [
        ("standard", {"ema": 0.9, "members": 2}, 3),
        ("fasten(baseline=0)", {"members": 3, "augment": "crop-flip"}, 8),
        ("dverge+at(baseline=0.4,steps=2,adversarial_steps=2)", {"members": 2, "arch": DROPPING}, 5),
        (SAMPLING, {}, 4),
        (SAMPLING, {"arch": DROPPING, "augment": "crop"}, 8),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: dict[str, Any], after: int
) -> None:
    """A checkpoint after every step: cut within an epoch, at its end, and before the last step."""
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    whole = train(method, out=tmp_path / "whole", **SHORT, **more)
    with pytest.raises(KeyboardInterrupt):
        train(method, out=tmp_path / "cut", progress=StopAfterSteps(after), **SHORT, **more)
    watch = StopAfterSteps(-1)
    again = train(method, out=tmp_path / "cut", progress=watch, **SHORT, **more)
    # Whoever is told of a step is told before the checkpoint that follows it is written.
    assert f"{after - 1} of 9 steps" in watch.messages[0]
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    assert again.hashes == whole.hashes
    assert again.accuracy == whole.accuracy
    assert [facts["loss"] for facts in again.history] == [facts["loss"] for facts in whole.history]
    assert {**again.cost, "seconds": 0} == {**whole.cost, "seconds": 0}
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = train("standard", out=tmp_path / "run", **SHORT)
    watch = StopAfterSteps(1)
    assert train("standard", out=tmp_path / "run", progress=watch, **SHORT) == first
    assert "finished" in watch.messages[0]
    with pytest.raises(UsageError, match="differs in arch, seed"):
        train("standard", out=tmp_path / "run", seed=1, **SHORT)


@pytest.mark.slow
def test_two_processes_train_the_net_of_one(tmp_path: Path) -> None:
    """The same images in each step, half of them each; a net without batch norm."""
    one = train("standard(momentum=0)", out=tmp_path / "one", **SHORT)
    two = train("standard(momentum=0)", out=tmp_path / "two", devices=2, **SHORT)
    assert one.run_id == two.run_id
    assert {**one.cost, "seconds": 0} == {**two.cost, "seconds": 0}
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert two.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], rel=1e-5)


def test_the_run_folder_loads_as_the_trained_model(tmp_path: Path) -> None:
    record = train("standard", out=tmp_path / "run", **{**SHORT, "epochs": 12})
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    data = SHORT["test"]
    images, labels = data.images(range(len(data))), torch.from_numpy(data.labels)
    model = load_model(f"{tmp_path / 'run'}/")
    with torch.no_grad():
        logits = model(images)
        same = load_model(f"robustkit:digits-cnn@{tmp_path / 'run' / 'model.safetensors'}")(images)
    assert record.accuracy is not None
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(record.accuracy["value"])
    assert torch.equal(logits, same)
    assert record.accuracy["value"] == pytest.approx(record.history[-1]["test_accuracy"])
    assert record.accuracy["n"] == len(data)
    assert record.cost["forwards"] == record.cost["backwards"] == 12 * 48


def test_samples_are_states_of_the_run(tmp_path: Path) -> None:
    record = train(SAMPLING, out=tmp_path / "run", **SHORT)
    assert [facts["step"] for facts in record.samples] == [6, 9]
    assert [facts["epoch"] for facts in record.samples] == [2, 3]
    assert not (tmp_path / "run" / "kept").exists()
    data = SHORT["test"]
    images, labels = data.images(range(len(data))), torch.from_numpy(data.labels)
    for number, facts in enumerate(record.samples):
        with torch.no_grad():
            found = load_model(f"{tmp_path / 'run'}/#{number}")(images).argmax(1) == labels
        assert float(found.float().mean()) == pytest.approx(facts["accuracy"])
    with torch.no_grad():
        mean = load_model(f"{tmp_path / 'run'}/")(images).argmax(1) == labels
    assert record.accuracy is not None
    assert float(mean.float().mean()) == pytest.approx(record.accuracy["value"])


def test_members_start_from_their_own_weights_and_are_written_together(tmp_path: Path) -> None:
    record = train("standard", out=tmp_path / "run", members=2, **SHORT)
    alone = train("standard", out=tmp_path / "alone", **SHORT)
    state, single = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    assert {name.partition(".")[0] for name in state} == {"0", "1"}
    # The first member is the net of a run with one: side by side changes nothing.
    assert all(torch.equal(state[f"0.{name}"], tensor) for name, tensor in single.items())
    assert not torch.equal(state["0.conv1.weight"], state["1.conv1.weight"])
    assert record.members == len(record.member_accuracy) == 2
    assert record.member_accuracy[0] == pytest.approx(alone.accuracy["value"])
    assert record.cost["forwards"] == 2 * alone.cost["forwards"]


def test_the_average_of_the_weights_is_written(tmp_path: Path) -> None:
    plain = train("standard", out=tmp_path / "plain", **SHORT)
    slow = train("standard", out=tmp_path / "slow", ema=0.9999, **SHORT)
    untrained = load_model(slow.arch).net.state_dict()
    found = load_file(tmp_path / "slow" / "model.safetensors")
    assert plain.run_id != slow.run_id
    assert all((found[name] - tensor).abs().max() < 1e-3 for name, tensor in untrained.items())


def test_a_run_may_start_from_the_weights_of_another(tmp_path: Path) -> None:
    first = train("standard", out=tmp_path / "first", **SHORT)
    second = train("standard", arch=f"{tmp_path / 'first'}/", out=tmp_path / "second", **{**SHORT, "lr": 1e-9})
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert second.arch == first.arch
    assert second.mean == first.mean


def test_training_changes_no_global_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train("standard", out=tmp_path / "run", arch=DROPPING, **SHORT)
    assert torch.equal(torch.get_rng_state(), before)


def test_arrays_with_any_number_of_classes_and_channels_are_accepted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 12, 9, 3), dtype=np.uint8), np.arange(40) % 5
    record = train("standard", x, y, arch="robustkit:cifar-resnet20", epochs=1, batch_size=8, out=tmp_path / "run")
    assert record.classes == 5
    assert record.accuracy is None
    assert load_model(f"{tmp_path / 'run'}/")(torch.rand(2, 3, 12, 9)).shape == (2, 5)


@dataclass(frozen=True)
class InfiniteLoss(Method):
    """Returns a loss that is not finite."""

    info = Info("method", "exploding")

    def backward(self, nets: Any, batch: Batch, plan: Plan) -> torch.Tensor:
        Method.backward(self, nets, batch, plan)
        return torch.tensor(torch.inf)


def test_divergence_raises_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the training has diverged"):
        train(InfiniteLoss(), out=tmp_path / "run", members=1, **SHORT)
    assert not (tmp_path / "run" / "model.json").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_out_of_memory_raises_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(session: loop.TrainingSession) -> None:
        raise error

    monkeypatch.setattr(loop.TrainingSession, "run", run)
    with pytest.raises(RunError, match="out of memory in training; give a smaller --batch-size"):
        train("standard", out=tmp_path / "run", **SHORT)


def test_a_net_that_breaks_in_its_last_step_is_not_written(tmp_path: Path) -> None:
    """The loss of that step was finite yet, and nobody looks at test images."""
    short = {**SHORT, "lr": 1e38, "batch_size": 48, "epochs": 1, "test": None}
    short["data"] = load_data("digits:train").head(48)
    with pytest.raises(RunError, match="the weights have NaN or infinite values"):
        train("standard(warmup=0,momentum=0,weight_decay=1000000)", out=tmp_path / "run", **short)
    assert not (tmp_path / "run" / "model.json").exists()


def test_a_net_that_overflows_on_the_test_images_has_diverged(tmp_path: Path) -> None:
    for method in ("standard", SAMPLING):
        for _ in range(2):
            with pytest.raises(RunError, match="diverged"):
                train(method, out=tmp_path / method[:4], **{**SHORT, "lr": 1e30, "batch_size": 48, "epochs": 4})


def test_missing_states_are_reported(tmp_path: Path) -> None:
    train(SAMPLING, out=tmp_path, **SHORT)
    for name in ("model.json", "posterior.safetensors"):
        (tmp_path / name).unlink()
    with pytest.raises(RunError, match="lacks some of 2 states"):
        train(SAMPLING, out=tmp_path, **SHORT)


def test_a_run_interrupted_while_it_drew_samples_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in front of batch norms makes their running statistics random."""

    def cut(*parts: Any) -> None:
        raise KeyboardInterrupt

    late = DROPPING.replace("DropoutNet", "InputDropoutNet")
    train("swag(draws=2)", out=tmp_path / "whole", arch=late, **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", cut)
        with pytest.raises(KeyboardInterrupt):
            train("swag(draws=2)", out=tmp_path / "cut", arch=late, **SHORT)
    train("swag(draws=2)", out=tmp_path / "cut", arch=late, **SHORT)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


@pytest.mark.slow
def test_processes_gather_the_stored_perturbations(tmp_path: Path) -> None:
    """Each image's signs are made by one process and read by another, in the next epoch."""
    one, two = (
        train("fasten(baseline=0,layer=4)", out=tmp_path / str(devices), members=2, devices=devices, **SHORT)
        for devices in (1, 2)
    )
    assert two.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], rel=1e-3)
    memories = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["memory"] for name in "12"]
    assert float((memories[0] == memories[1]).float().mean()) > 0.98


@pytest.mark.slow
def test_drawn_samples_count_once_on_several_processes(tmp_path: Path) -> None:
    """One process alone takes their running statistics."""
    one, two = (
        train("swag(draws=2)", out=tmp_path / str(devices), arch=DROPPING, devices=devices, **SHORT)
        for devices in (1, 2)
    )
    assert one.cost["forwards"] == two.cost["forwards"] == (3 + 2) * 48


def test_running_statistics_do_not_depend_on_the_order_of_the_data(tmp_path: Path) -> None:
    """Two classes, dark and light, one after the other: a batch of one kind has next to no variance."""
    x = np.repeat(np.array([10, 240], np.uint8), 32)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "sorted.npz", x=x, y=np.repeat([0, 1], 32))
    train(
        "swag(draws=1,scale=0)",
        str(tmp_path / "sorted.npz"),
        arch="robustkit:cifar-resnet20?mean=0&std=1",
        out=tmp_path / "run",
        epochs=2,
        batch_size=32,
        lr=1e-6,
    )
    state = load_model(f"{tmp_path / 'run'}/").net.state_dict()
    weight, variance = state["conv1.weight"], state["bn1.running_var"]
    expected = torch.stack(
        [
            torch.nn.functional.conv2d(torch.full((1, 1, 8, 8), value), weight, padding=1)[0]
            for value in (10 / 255, 240 / 255)
        ]
    ).transpose(0, 1)
    torch.testing.assert_close(variance, expected.flatten(1).var(1, correction=0), rtol=0.2, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0."),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"lr": -1.0}, "lr must be above 0, got -1."),
        ({"lr": float("inf")}, "lr must be a finite number, got inf."),
        ({"arch": torch.nn.Flatten()}, "arch must be a model string such as ./net.py:factory, so"),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"method": 3}, "method 3: write one of robustkit list methods"),
        ({"ema": 1.5}, "ema must be at least 0 and below 1, got 1.5."),
        ({"precision": "fp16"}, "fp16"),
        ({"augment": "crap"}, "Did you mean 'crop'"),
        ({"devices": 3}, "not a multiple of the 3 processes"),
        ({"arch": "robustkit:digits-cnn?defense=jpeg:75"}, "a defense is not trained"),
        ({"arch": "robustkit:digits-cnn?num_classes=4"}, "write num_classes=10"),
        ({"method": SAMPLING, "ema": 0.9}, "leave --ema out"),
        ({"method": SAMPLING, "members": 2}, "trains one net"),
        ({"method": "standard(schedule=cosin)"}, "Did you mean 'cosine'"),
        ({"method": "standart"}, "Did you mean 'standard'"),
        ({"method": "dverge(layer=9)", "members": 2}, "layer 9: the net has layers 1 to 4"),
        ({"method": "fasten(layer=convl)", "members": 2}, "Known: conv1, conv2, conv3, linear"),
        ({"data": "cifar.npz"}, "cifar.npz"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        train(**{"method": "standard", "out": tmp_path / "run", **SHORT, **more})
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_or_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("standard", out=tmp_path / "run", progress=StopAfterSteps(4), **SHORT)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04rubbish")
    with pytest.raises(UsageError, match="delete it to start again"):
        train("standard", out=tmp_path / "run", **SHORT)
    record = train("standard", out=tmp_path / "run", overwrite=True, **SHORT)
    assert Trained.from_json(json.loads(json.dumps(record.to_json()))) == record
    with pytest.raises(UsageError, match="format 2"):
        Trained.from_json({**record.to_json(), "format": 2})
