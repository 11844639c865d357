"""How the fastest execution configuration is chosen, with clocks that the tests set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from masked_defenses import AROUND, MaskedNet
from nets import Small
from torch import Tensor

from robustkit.engine.model import profiling, tuning
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import fastest_batch
from robustkit.engine.model.tuning import tune
from robustkit.models import as_classifier

SHAPE = (5, 3, 7, 9)


@pytest.mark.parametrize(
    ("seconds", "micro_batch", "chosen"),
    [
        (lambda n: 1.0, 64, 32),  # a launch costs the same whatever is in it
        (lambda n: n / 100, 64, 4),
        (lambda n: max(n, 16) / 100, 64, 16),
        (lambda n: 1.0, 10, 8),
        (lambda n: 1.0, 3, 3),  # what fits, below the size to start from
    ],
)
def test_batch_size_doubles_while_images_per_second_rise(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], micro_batch: int, chosen: int
) -> None:
    instrumented = InstrumentedModel(as_classifier(Small().eval()), torch.device("cpu"))
    instrumented.micro_batch = micro_batch
    monkeypatch.setattr(profiling, "timed_pass", lambda model, x: (seconds(len(x)), x))
    assert fastest_batch(instrumented, torch.rand(SHAPE), 4, 32) == chosen


def test_batch_that_runs_out_of_memory_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    instrumented = InstrumentedModel(as_classifier(Small().eval()), torch.device("cpu"))

    def timed(model: InstrumentedModel, x: Tensor) -> tuple[float, Tensor]:
        if len(x) > 8:
            raise torch.OutOfMemoryError
        return 1.0, x

    monkeypatch.setattr(profiling, "timed_pass", timed)
    assert fastest_batch(instrumented, torch.rand(SHAPE), 4, 32) == 8


def test_config_that_is_slow_for_two_images_is_not_tried_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    instrumented = InstrumentedModel(as_classifier(Small().eval()), torch.device("cpu"))
    seen: list[tuple[torch.dtype | None, int]] = []

    def timed(model: InstrumentedModel, x: Tensor) -> tuple[float, Tensor]:
        seen.append((instrumented.config.dtype, len(x)))
        return (5.0 if instrumented.config.dtype else 1.0), instrumented.uncounted(
            x.detach().requires_grad_()
        ).detach()

    monkeypatch.setattr(tuning, "timed_pass", timed)
    tune(instrumented, torch.rand(SHAPE), precision=True)
    assert instrumented.precision == "fp32"
    assert {n for dtype, n in seen if dtype is torch.bfloat16} == {2}
    assert {n for dtype, n in seen if dtype is None} == {2, len(torch.rand(SHAPE))}


def test_precision_that_the_net_does_not_support_is_rejected() -> None:
    """Its logits come from numpy, which has no bfloat16."""
    instrumented = InstrumentedModel(
        as_classifier(MaskedNet(Small(), AROUND["abroad"]).eval()), torch.device("cpu")
    )
    tune(instrumented, torch.rand(SHAPE), precision=True)
    assert instrumented.precision == "fp32"
