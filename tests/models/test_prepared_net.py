"""How a net is called with images, and how errors inside it are reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from callables import (
    BLIND,
    HABITS,
    Breaking,
    Viewing,
    of_torch,
    shaped,
    viewing,
)
from torch import nn

from robustkit import craft, evaluate
from robustkit.core.errors import ModelError, RunError, UsageError
from robustkit.core.isolation import evaluation_mode
from robustkit.core.threat import ThreatModel
from robustkit.data import from_arrays
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.tuning import tune
from robustkit.models import as_classifier

GREY = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def truth(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return viewing(x.shape[1])(x) if len(x) else torch.empty(0, 10)


@pytest.mark.parametrize("how", HABITS)
@pytest.mark.parametrize("rows", [7, 1, 0])
def test_every_calling_convention_gives_the_logits_and_keeps_the_images(how: str, rows: int) -> None:
    model, x = as_classifier(shaped(how)), GREY[:rows]
    for images in (x.clone(), x.clone().requires_grad_(), GREY[:3]):
        logits = model(images)
        assert logits.shape == (len(images), 10)
        assert logits.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(logits.detach().float(), truth(images.detach()), atol=0.05, rtol=0.05)
        assert torch.equal(images.detach(), GREY[: len(images)])
        if images.requires_grad and how not in BLIND and rows:
            (slope,) = torch.autograd.grad(logits.sum(), images)
            assert slope.isfinite().all()
            assert slope.any()


@pytest.mark.parametrize("how", ["exported", "exported-for-4", "inside-exported", "traced", "frozen"])
def test_nets_made_by_torchs_export_tools_are_called(how: str) -> None:
    model = as_classifier(of_torch(how))
    for rows in (1, 4, 7):
        torch.testing.assert_close(model(GREY[:rows]).detach(), truth(GREY[:rows]))
    with evaluation_mode(model) as was_training:
        assert not was_training or how in ("traced", "inside-exported")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("laid", ["standard", "channels-last", "of-bytes", "sliced"])
def test_images_in_any_layout_reach_a_net_that_uses_view(channels: int, laid: str) -> None:
    images = torch.rand(5, 8, 8, channels, generator=torch.Generator().manual_seed(1))
    if laid == "of-bytes":
        levels = (images * 255).byte().numpy()
        x = from_arrays(levels, np.zeros(5, np.int64)).images(range(5))
        assert x.stride() == torch.empty(x.shape).stride()
    else:
        x = images.permute(0, 3, 1, 2)
        x = {"standard": x.contiguous(), "channels-last": x, "sliced": torch.cat([x, x], 2)[:, :, ::2]}[laid]
    model = as_classifier(viewing(channels))
    torch.testing.assert_close(model(x).detach(), truth(x.clone(memory_format=torch.contiguous_format)))


def test_compiled_and_parallel_nets_are_unwrapped() -> None:
    net = viewing()
    assert as_classifier(torch.compile(net)).net is net
    compiled: Any = torch.compile(net)
    assert as_classifier(nn.DataParallel(compiled)).fingerprint == as_classifier(net).fingerprint


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("key", "KeyError: 'size'"),
        ("attribute", "AttributeError: 'Breaking' object has no attribute 'shape_of_things'"),
        ("assertion", "AssertionError: pixels of that size"),
        ("silent", "AssertionError: assert x.min() > 2"),
        ("recursion", "RecursionError: maximum recursion depth exceeded"),
        ("stop", "StopIteration: next(iter([]))"),
        ("two-lines", "RuntimeError: the first line ("),
        ("other", "TypeError: Viewing.forward() takes 2 positional arguments but 3 were given"),
    ],
)
def test_an_error_inside_the_net_is_reported_with_its_location(
    how: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustkit.models.call_forms.MAX_SECONDS", 0.05)
    with pytest.raises(ModelError) as caught:
        as_classifier(Breaking(how))(GREY)
    message = str(caught.value)
    assert f"model 'python:Breaking' failed with {sentence}" in message
    assert "callables.py:" in message
    assert "does not take" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("net", "taken"),
    [
        (viewing(3), (3, 8, 8)),
        (viewing(1, side=28), (1, 28, 28)),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), (1, 28, 28)),
        (nn.Sequential(nn.Flatten(), nn.Linear(13 * 64, 4)), (13, 8, 8)),
    ],
)
def test_a_wrong_shape_is_reported_with_one_that_works(net: nn.Module, taken: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="does not take images of shape") as caught:
        as_classifier(net)(GREY)
    assert f"(1, 8, 8) but of {taken}: " in str(caught.value)


def test_nets_without_values_are_refused() -> None:
    with pytest.raises(UsageError, match="is on the device 'meta'"):
        as_classifier(Viewing().to("meta"))
    with pytest.raises(UsageError, match=r"has no values in '1\.weight' yet"):
        as_classifier(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))


@pytest.mark.parametrize("switch", [torch.inference_mode, torch.no_grad])
def test_verbs_run_under_any_gradient_mode_of_the_caller(switch: type) -> None:
    with switch():
        report = evaluate(viewing(), GREY, truth(GREY).argmax(1), ("linf", 0.1), suite="pgd(steps=3)")
        assert torch.is_inference_mode_enabled() == (switch is torch.inference_mode)
        assert not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    plain = evaluate(viewing(), GREY, truth(GREY).argmax(1), "linf:0.1", suite="pgd(steps=3)")
    assert report.verdicts == plain.verdicts
    assert not {"no-gradient", "zero-gradient"} & {flag.code for flag in report.flags}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"batch_size": "64"}, "batch_size must be a whole number, got '64'"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"time_limit": "10"}, "time_limit must be a number, got '10'"),
        ({"suite": 3}, "suite must be a string, an attack, or a list of them, got 3"),
        ({"curve": "yes"}, "curve must be True or False, got 'yes'"),
        ({"threat": [1, 2, 3]}, "write NORM:EPS"),
        ({"threat": float("nan")}, "eps 'nan' is not a number"),
        ({"suite": None}, "suite must be a string, an attack, or a list of them, got None"),
        ({"out": 3}, "out must be a path, as a string or a Path, got 3"),
        ({"out": " "}, "out must be a path, as a string or a Path, got ' '"),
        ({"out": "a\0b"}, "is none that a file can have"),
        ({"out": "~nobody-of-this-name/x"}, "begins with ~ and no user's name"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("(", r"\(")):
        evaluate(viewing(), GREY, [0] * 7, **{"threat": 0.1, **words})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"weights": "1"}, "weights must be a list of numbers, got '1'"),
        ({"targets": 3}, "models must be model strings, torch.nn.Modules or functions .* got int"),
    ],
)
def test_arguments_of_craft_of_a_wrong_type_are_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        craft(viewing(), GREY, [0] * 7, 0.1, **words)


def test_a_threat_may_be_a_number_or_a_pair() -> None:
    assert str(ThreatModel.of(8 / 255)) == "linf:8/255"
    assert str(ThreatModel.of(("l2", np.float32(0.5)))) == "l2:0.5"
    assert ThreatModel.of(("l2", "1/2")) == ThreatModel.parse("l2:1/2")
    assert ThreatModel.of(0.03) == ThreatModel.parse("linf:0.03")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda logits: logits.to(torch.complex64), "returned complex numbers"),
        (lambda logits: logits[:, : 10 - 5 * bool(logits.shape[0] > 1)], "returned 5 logits per image, and 10 in"),
    ],
)
def test_outputs_that_are_not_logits_are_reported(
    answer: Callable[[torch.Tensor], torch.Tensor], sentence: str
) -> None:
    model = as_classifier(lambda x: answer(viewing()(x)))
    with pytest.raises(UsageError, match=sentence):
        [model(GREY[:rows]) for rows in (1, 7)]


def test_sparse_outputs_are_read() -> None:
    torch.testing.assert_close(as_classifier(lambda x: viewing()(x).to_sparse())(GREY).detach(), truth(GREY))


def test_a_net_that_disables_gradients_does_not_disable_them_elsewhere() -> None:
    net = viewing()

    def answer(x: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(False)
        return net(x)

    assert not as_classifier(answer)(GREY.clone().requires_grad_()).requires_grad
    assert torch.is_grad_enabled()


def test_a_class_instead_of_a_net_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Viewing is a class: give an instance of it, Viewing\(\.\.\.\)"):
        as_classifier(Viewing)


def test_trials_of_a_traced_net_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Normed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](self[1](self[0](x)).view(-1, 4 * 8 * 8))

    net = Normed(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(256, 10)).eval()
    tune(InstrumentedModel(as_classifier(net), torch.device("cpu")), GREY, precision=False)
    assert capfd.readouterr().err == ""


def test_hard_labels_are_refused() -> None:
    with pytest.raises((RunError, UsageError), match=r"return logits of shape"):
        evaluate(lambda x: viewing()(x).argmax(1), GREY, [0] * 7, 0.1, suite="square(queries=5)")
