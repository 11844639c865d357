"""Whole runs on models of every form, from Python and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from callables import NoBackward, as_function, of_torch, on_arrays, shaped, viewing

from robustkit import craft, evaluate, train
from robustkit.cli import run
from robustkit.core.errors import UsageError
from robustkit.models import as_classifier
from robustkit.runs.evaluation_record import Report

FILE = str(Path(__file__).parents[1] / "callables.py")
SUITE = "pgd(steps=4),square(queries=20)"


def images(channels: int, n: int = 6) -> torch.Tensor:
    return (torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def archive(channels: int) -> str:
    """Write images as people have them, bytes (N H W C), and the net's own answers as labels."""
    x = images(channels)
    y = viewing(channels)(x).argmax(1)
    np.savez("data.npz", x=(x * 255).round().byte().permute(0, 2, 3, 1).numpy(), y=y.numpy())
    return "data.npz"


def evaluated(model: object, suite: str = SUITE) -> Report:
    x = images(1)
    return evaluate(model, x, viewing(1)(x).argmax(1), 0.06, suite=suite)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> Report:
    return evaluated(viewing())


def codes(report: Report) -> set[str]:
    return {flag.code for flag in report.flags}


@pytest.mark.parametrize("how", ["subtracts-in-place", "batch-of-5", "remembers-rows", "double"])
def test_verdicts_are_those_of_the_plain_net(how: str, plain: Report) -> None:
    report = evaluated(shaped(how))
    assert [verdict.robust for verdict in report.verdicts] == [verdict.robust for verdict in plain.verdicts]
    assert 0 < plain.robust_accuracy.value < 1


def test_an_exported_net_and_one_in_eval_mode_are_the_same(plain: Report) -> None:
    report = evaluated(of_torch("exported-for-4"))
    assert [verdict.robust for verdict in report.verdicts] == [verdict.robust for verdict in plain.verdicts]
    assert "training-mode" not in codes(report)


@pytest.mark.parametrize("how", ["by-numpy", "detached", "no-backward"])
def test_without_a_gradient_score_attacks_run_and_a_flag_is_raised(how: str) -> None:
    report = evaluated(as_function(how))
    assert "no-gradient" in codes(report)
    assert report.clean_accuracy.value == 1
    flag = next(flag for flag in report.flags if flag.code == "no-gradient")
    assert ("NotImplementedError: no backward pass" in flag.meaning) == (how == "no-backward")


def test_square_needs_no_gradient_of_a_function_of_arrays() -> None:
    report = evaluated(on_arrays, "square(queries=200)")
    assert report.robust_accuracy.value < 1
    assert report.cost.backwards == 0 or "zero-gradient" in codes(report)


def test_logits_that_are_not_finite_under_attack_raise_a_flag(plain: Report) -> None:
    net, clean = viewing(), images(1)

    def breaks(x: torch.Tensor) -> torch.Tensor:
        off = (255 * x - (255 * x).round()).abs().amax((1, 2, 3)) > 1e-3
        return torch.where(off[:, None], torch.inf, net(x))

    report = evaluate(breaks, clean, net(clean).argmax(1), 0.2, suite=SUITE)
    assert "non-finite" in codes(report)
    assert next(flag for flag in report.flags if flag.code == "unstable-loss").value is None


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_every_verb_accepts_uint8_images_and_a_net_that_uses_view(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", archive(channels)]
    threat = ["--threat", "linf:0.1"]
    model = f"{FILE}:viewing?channels={channels}"
    assert run(["evaluate", model, *data, *threat, "--suite", "fgsm", "--curve", "--no-html", "--out", "e"]) == 0
    assert run(["verify", "e", "--trust-code"]) == 0
    assert run(["doctor", model, *data, *threat]) == 0
    assert run(["craft", "--surrogate", model, *data, *threat, "--attack", "fgsm", "--out", "c"]) == 0
    assert run(["train", "standard", "--arch", model, *data, "--epochs", "1", "--out", "t"]) == 0
    assert run(["evaluate", "t/", "--trust-code", *data, *threat, "--suite", "fgsm", "--no-html"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_surrogate_without_a_backward_pass_is_refused() -> None:
    x = images(1)
    with pytest.raises(UsageError, match="has no gradient"):
        craft(lambda x: viewing()(NoBackward.apply(x)), x, [0] * 6, 0.1)
    made = craft(viewing(), x, [0] * 6, 0.1, attack="fgsm", targets=cast(Any, [on_arrays]))
    assert [target.model for target in made.targets] == ["python:on_arrays"]


def test_doctor_names_the_reason_for_a_missing_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", archive(1), "--threat", "linf:0.1"]
    assert run(["doctor", f"{FILE}:shaped?how=no-backward", *data, "--json"]) == 0
    assert "backward pass fails with NotImplementedError" in capsys.readouterr().out


def test_evaluate_works_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        x = images(1)
        y = as_classifier(viewing())(x).argmax(1)
        assert craft(viewing(), x, y, 0.1, attack="fgsm").n == 6
        record = train("standard", x, y, arch=f"{FILE}:viewing", epochs=1, out=tmp_path / "t")
    assert record.classes >= 2


def test_an_error_in_a_model_is_one_sentence_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robustkit.models.call_forms.MAX_SECONDS", 0.2)
    data = ["--data", archive(1), "--threat", "linf:0.1"]
    for command in (["evaluate"], ["doctor"], ["craft", "--surrogate"]):
        assert run([*command, f"{FILE}:breaking?how=key", *data]) == 2
        err = capsys.readouterr().err
        assert "failed with KeyError: 'size'" in err
        assert "callables.py:" in err
        assert "take images" not in err
    assert run(["evaluate", f"{FILE}:breaking?how=key", *data, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
