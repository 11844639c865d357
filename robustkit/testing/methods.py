"""What every training method must do, each check a function that raises AssertionError."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from robustkit.api.train import train
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.data import from_arrays
from robustkit.data.samples import Samples
from robustkit.models import load_model
from robustkit.registry import from_record
from robustkit.runs.training_record import Trained
from robustkit.testing import normed_net
from robustkit.testing.normed_net import CLASSES, Normed
from robustkit.training import loop
from robustkit.training.method import Batch, Method, Plan
from robustkit.training.posterior_method import PosteriorMethod
from robustkit.training.progress import TrainProgress
from robustkit.training.wrapping_method import WrappingMethod

SHAPE = (3, 7, 9)
IMAGES = 48
PLAN = Plan(samples=IMAGES, classes=CLASSES, batch_size=16, epochs=4, lr=0.05)


def check_method(method: Any) -> None:
    """Check that a training method keeps the contract of methods, in seconds.

    `backward` gives finite gradients to all parameters and leaves weights, modes and hooks as they were. A run of
    12 steps on 48 small images lowers the loss, writes a folder that can be loaded as a model, and ends in the
    same bytes when it is interrupted and resumed; the caller's random generators stay as they were.

    Args:
        method: an object or class under `@method(...)`. Give one with less effort than the defaults where those
            take long.

    Raises:
        AssertionError: if it does not keep the contract; the message says what it did.
        UsageError: if it is no training method.
    """
    method = method() if isinstance(method, type) and issubclass(method, Method) else method
    if not isinstance(method, Method):
        raise UsageError(f"{method!r:.80} is no robustkit.training.method.Method.")
    check_backward(method)
    with TemporaryDirectory() as folder:
        record = train_briefly(method, Path(folder) / "run")
        check_run(method, record, Path(folder) / "run")
        check_resumes(method, record, Path(folder) / "resumed")


def prepared(method: Method) -> nn.Module:
    """Return a net as the method trains it."""
    if isinstance(method, WrappingMethod):
        return method.wrap(Normed(), torch.zeros(1, *SHAPE), None, None)
    return Normed()


def toy(seed: int, count: int = IMAGES) -> Samples:
    """Return images whose classes differ by brightness and by a corner."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    x = torch.rand(count, *SHAPE, generator=generator) * 0.5 + labels[:, None, None, None] * 0.1
    x[labels == 2, :, :3, :3] = 0
    return from_arrays((x * 255).round() / 255, labels)


def train_briefly(
    method: Method, folder: Path, *, seed: int = 0, progress: TrainProgress | None = None, **plan: Any
) -> Trained:
    """Train `Normed` on `toy` images, or continue that run."""
    plan = {"epochs": PLAN.epochs, "batch_size": PLAN.batch_size, "lr": PLAN.lr, **plan}
    arch = f"{normed_net.__file__}:normed"
    return train(method, toy(0), test=toy(1, 40), arch=arch, seed=seed, out=folder, progress=progress, **plan)


class Interrupt(TrainProgress):
    """Stops a run after a step, as Ctrl-C does, with a checkpoint of the step before."""

    def __init__(self, stop_step: int) -> None:
        """Stop after the step of this number."""
        self.stop_step = stop_step

    def step(self, done: int) -> None:
        """Let the loop write a checkpoint at the step before, and raise KeyboardInterrupt at that step."""
        if done == self.stop_step - 1:
            loop.SAVE_EVERY = 0.0
        if done == self.stop_step:
            raise KeyboardInterrupt


def check_run(method: Method, record: Trained, folder: Path) -> None:
    """Check the record and the files of a run of `train_briefly`."""
    name, posterior = method.info.name, isinstance(method, PosteriorMethod)
    stored = json.loads((folder / "model.json").read_text())
    assert stored == json.loads(json.dumps(record.to_json())), (
        f"{name}: model.json is not the record that train returns"
    )
    again = from_record("method", stored["method"], trust_code=True)
    assert again == method, f"{name}: its record in model.json makes {again}, not {method}"
    losses = [epoch["loss"] for epoch in record.history]
    assert len(losses) == PLAN.epochs, f"{name}: {len(losses)} epochs in the history, not {PLAN.epochs}"
    assert losses[0] > losses[-1], f"{name}: its loss went from {losses[0]:.4g} to {losses[-1]:.4g}"
    assert record.accuracy is not None, f"{name}: no accuracy"
    accuracy = record.accuracy["value"]
    assert accuracy > 1.5 / CLASSES, f"{name}: accuracy {accuracy:.3g} with {CLASSES} classes"
    passes = PLAN.steps * PLAN.batch_size * record.members
    assert record.cost["backwards"] >= passes, (
        f"{name}: {record.cost['backwards']} backward passes of {passes} images"
    )
    files = {path.name for path in folder.iterdir()}
    assert files >= {"model.json", "metrics.jsonl"}, f"{name}: wrote {sorted(files)}"
    assert not {"samples", "kept"} & files, f"{name}: left unfinished samples"
    assert ("posterior.safetensors" in files) == posterior, f"{name}: wrote {sorted(files)}"
    assert ("model.safetensors" in files) != posterior, f"{name}: wrote {sorted(files)}"
    test = toy(1, 40)
    with torch.no_grad():
        logits = load_model(f"{folder}/", trust_code=True)(test.images(np.arange(40)))
    assert logits.shape == (40, CLASSES), f"{name}: its folder is a model of logits {tuple(logits.shape)}"


def check_resumes(method: Method, record: Trained, folder: Path) -> None:
    """Check that a run that is interrupted within an epoch and resumed ends in the same bytes.

    The caller's generators stay where they were.
    """
    name = method.info.name
    torch.manual_seed(9)
    before = _generators()
    # The checkpoint is of the first step of the second half, which is within an epoch.
    stop = PLAN.epochs // 2 * PLAN.steps_per_epoch + 2
    with mock.patch.object(loop, "SAVE_EVERY", math.inf):
        try:
            train_briefly(method, folder, progress=Interrupt(stop))
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError(f"{name}: the run ended before step {stop}")
    hashes = train_briefly(method, folder).hashes
    assert hashes == record.hashes, f"{name}: a run that was interrupted and resumed wrote other weights"
    assert _generators() == before, f"{name}: training moved the caller's random generators"


def check_backward(method: Method) -> None:
    """Check that `backward` gives gradients and leaves weights, modes and hooks as they were.

    All weights have a gradient; of a method that wraps its nets and trains part after part, in one of the steps.
    """
    name = method.info.name
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
        assert loss.isfinite(), f"{name}: its loss is {loss.item()}"
        assert not loss.requires_grad, f"{name}: backward returned a loss with a graph: detach it"
        moved = [weight for weight in whole.parameters() if weight.grad is not None]
        finite = all(weight.grad.isfinite().all() for weight in moved if weight.grad is not None)
        assert finite, f"{name}: gradients are NaN or infinite"
        complete = isinstance(method, WrappingMethod) or len(moved) == len(weights)
        assert complete, f"{name}: {len(weights) - len(moved)} of {len(weights)} parameters have no gradient"
        reached |= set(moved)
        same = all(torch.equal(old, new) for old, new in zip(weights, whole.parameters(), strict=True))
        assert same, f"{name}: backward changed the weights; leave that to the optimizer"
        assert all(part.training for part in whole.modules()), f"{name}: backward left a module in eval mode"
        hooks = any(part._forward_hooks or part._forward_pre_hooks for part in whole.modules())
        assert not hooks, f"{name}: backward left hooks on the nets"
    assert reached == set(whole.parameters()), f"{name}: some parameters had no gradient in any step"


def _generators() -> tuple[object, ...]:
    return torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
