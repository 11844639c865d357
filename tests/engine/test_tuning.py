"""How a search runs its model: timed at the size of a step, weights converted once, rounding measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Small, labelled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import robustkit
from robustkit.core.threat import ThreatModel
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.model import rounding, tuning
from robustkit.engine.model.instrumented_model import ExecutionConfig, InstrumentedModel
from robustkit.engine.model.rounding import measured_rounding
from robustkit.engine.model.tuning import ConfigBuilder, tune
from robustkit.models import as_classifier

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BF16: dict[str, Any] = {"fold": True, "precision": "bf16", "layout": "channels_last", "converted": True}


class Convolutions(nn.Module):
    """Two convolutions; a constant in float32 is added between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu() + torch.ones(1)).mean((2, 3)))


class ChangesItself(Convolutions):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


class Random(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1e-3 * torch.randn_like(x))


def hooked() -> nn.Module:
    net = Convolutions()
    net.second.register_forward_hook(lambda part, given, out: out)
    return net


def instrumented(net: nn.Module) -> InstrumentedModel:
    return InstrumentedModel(as_classifier(net.eval().requires_grad_(False)), torch.device("cpu"))


class Counter(TorchDispatchMode):
    """Counts conversions between types."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_to_copy" in str(operation)
        return operation(*args, **(kwargs or {}))


def test_converted_weights_have_the_logits_of_autocast_without_a_conversion_in_each_pass() -> None:
    model = instrumented(Convolutions())
    builder = ConfigBuilder(model, X)
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    logits, conversions = [], []
    for converted in (False, True):
        config = builder.config(**{**BF16, "converted": converted})
        with model.using(config), Counter() as counter:
            logits.append(model.uncounted(X))
        conversions.append(counter.count)
    assert torch.equal(*logits)
    assert conversions[0] - conversions[1] == 6  # the weights and biases of three layers
    assert config.original is model.model
    assert config.in_float32.net is model.model
    assert all(torch.equal(value, weights[name]) for name, value in model.model.state_dict().items())


def clock(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[ExecutionConfig, int], float]) -> list[int]:
    """Let a pass take these seconds; return the list of the numbers of images that will be timed."""
    sizes = list[int]()

    def timed(model: InstrumentedModel, x: Tensor) -> tuple[float, Tensor]:
        sizes.append(len(x))
        return seconds(model.config, len(x)), model.uncounted(x)

    monkeypatch.setattr(tuning, "timed_pass", timed)
    return sizes


def faster_in_bf16(config: ExecutionConfig, images: int) -> float:
    return (0.5 if config.precision == "bf16" else 1.0) * images


@pytest.mark.parametrize(("net", "copied"), [(Convolutions, True), (ChangesItself, False), (hooked, False)])
def test_a_net_that_a_copy_would_not_follow_is_run_by_autocast(
    net: Callable[[], nn.Module], copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, faster_in_bf16)
    model = instrumented(net())
    tune(model, X, precision=True)
    assert model.precision == "bf16"
    assert (model.config.original is not None) == copied


def test_a_random_net_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, faster_in_bf16)
    model = instrumented(Random())
    model.random = True
    tune(model, X, precision=True)
    assert model.config.original is None


def test_the_choice_is_by_the_time_of_as_many_images_as_a_step_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(config: ExecutionConfig, images: int) -> float:
        return 1.0 if config.precision == "fp32" else 0.5 if images == 64 else 1.2

    sizes = clock(monkeypatch, seconds)
    model = instrumented(Convolutions())
    assert tune(model, X, precision=True, rows=64) > sum(sizes)  # and the images by which rounding is measured
    assert model.precision == "bf16"
    assert set(sizes) == {2, len(X), 64}


def test_few_images_exclude_a_config_that_is_much_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[str]()

    def seconds(config: ExecutionConfig, images: int) -> float:
        sizes.extend([config.precision] if images == 64 else [])
        return 1.0 if config.precision == "fp32" else 2.0

    clock(monkeypatch, seconds)
    tune(instrumented(Convolutions()), X, precision=True, rows=64)
    assert set(sizes) == {"fp32"}


def test_the_bound_on_rounding_is_measured_on_the_model() -> None:
    model = instrumented(Convolutions())
    builder = ConfigBuilder(model, X)
    bound, helps = measured_rounding(model, builder.config(**BF16), X, ThreatModel.parse("linf:0.1"))
    with model.using(builder.config(**BF16)):
        error = (model.uncounted(X) - model.model(X)).detach()
    error = (error.amax(1) - error.amin(1)) / model.model(X).detach().abs().amax(1)
    assert helps
    assert bound >= rounding.SAFETY_FACTOR * float(error.max()) > 0
    model.config = ExecutionConfig(model.model, "bf16", rounding=0.5)
    assert model.rounding == 0.5
    model.config = ExecutionConfig(model.model, "bf16", rounding=1e-9)
    assert model.rounding == 2**-6


def test_low_precision_that_moves_margins_too_far_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, faster_in_bf16)
    net = Convolutions()
    with torch.no_grad():
        net.head.weight[1:], net.head.bias[1:] = net.head.weight[0], net.head.bias[0] - 1e-4
    model = instrumented(net)
    monkeypatch.setattr(tuning, "MAX_SHIFT", float("inf"))
    tune(model, X, precision=True)
    assert model.precision == "fp32"


def test_the_rounding_is_recorded_and_kept_by_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, faster_in_bf16)
    monkeypatch.setattr(tuning, "measured_rounding", lambda *arguments: (0.125, True))
    net = Small()
    x, y = labelled(net, 4, (3, 7, 5))
    again = list[int]()

    def measured_again(*arguments: Any) -> tuple[float, bool]:
        again.append(1)
        return 1.0, True

    def stopped(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(BlockRunner, "_continuous_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            robustkit.evaluate(net, x, y, "linf:0.02", suite="pgd(steps=2)", out=tmp_path / "run")
    monkeypatch.setattr(tuning, "measured_rounding", measured_again)
    report = robustkit.evaluate(net, x, y, "linf:0.02", suite="pgd(steps=2)", out=tmp_path / "run")
    assert not again
    assert report.environment["precision"] == "bf16"
    assert report.environment["rounding"] == 0.125
    assert report.environment["trial_images"] > 0
