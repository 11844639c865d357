"""How the meter chooses to run a model, by clocks that the tests set."""

from __future__ import annotations

import pytest
import torch
from gauntlet import AROUND, Behind
from nets import Small
from torch import Tensor

from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import as_classifier

SHAPE = (5, 3, 7, 9)


@pytest.mark.parametrize(
    ("seconds", "piece", "chosen"),
    [
        (lambda n: 1.0, 64, 32),  # a launch costs the same whatever is in it
        (lambda n: n / 100, 64, 4),
        (lambda n: max(n, 16) / 100, 64, 16),
        (lambda n: 1.0, 10, 8),
        (lambda n: 1.0, 3, 2),
    ],
)
def test_the_batch_doubles_while_that_is_faster(seconds: object, piece: int, chosen: int) -> None:
    instrumented = InstrumentedModel(as_classifier(Small().eval()), torch.device("cpu"))
    instrumented.piece = piece
    instrumented._timed = lambda x: (seconds(len(x)), x)  # type: ignore[method-assign, operator]
    assert instrumented.widest(torch.rand(SHAPE), 4, 32) == chosen


def test_a_batch_that_does_not_fit_is_not_chosen() -> None:
    instrumented = InstrumentedModel(as_classifier(Small().eval()), torch.device("cpu"))

    def timed(x: Tensor) -> tuple[float, Tensor]:
        if len(x) > 8:
            raise torch.OutOfMemoryError
        return 1.0, x

    instrumented._timed = timed  # type: ignore[method-assign]
    assert instrumented.widest(torch.rand(SHAPE), 4, 32) == 8


def test_a_way_that_is_hopeless_for_two_images_is_not_tried_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    instrumented = InstrumentedModel(as_classifier(Small().eval()), torch.device("cpu"))
    seen: list[tuple[torch.dtype | None, int]] = []

    def timed(x: Tensor) -> tuple[float, Tensor]:
        seen.append((instrumented.way.dtype, len(x)))
        return (5.0 if instrumented.way.dtype else 1.0), instrumented._net(x.detach().requires_grad_()).detach()

    monkeypatch.setattr(instrumented, "_timed", timed)
    instrumented.tune(torch.rand(SHAPE), precision=True)
    assert instrumented.precision == "fp32"
    assert {n for dtype, n in seen if dtype is torch.bfloat16} == {2}
    assert {n for dtype, n in seen if dtype is None} == {2, len(torch.rand(SHAPE))}


def test_a_precision_that_the_net_cannot_have_is_left_alone() -> None:
    """Its logits come from numpy, which has no bfloat16."""
    instrumented = InstrumentedModel(as_classifier(Behind(Small(), AROUND["abroad"]).eval()), torch.device("cpu"))
    instrumented.tune(torch.rand(SHAPE), precision=True)
    assert instrumented.precision == "fp32"
