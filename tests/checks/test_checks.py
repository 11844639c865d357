"""An unmasked net raises no flag and each fault raises its own, in either order in one process."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import FAULTS, Small, Wrapped, labelled

from robustkit import evaluate, load_data
from robustkit.checks import gradients
from robustkit.checks.probe import Probe
from robustkit.cli import run
from robustkit.core.errors import RunError, UsageError
from robustkit.core.flags import Flag
from robustkit.core.threat import ThreatModel
from robustkit.data import from_arrays
from robustkit.data.samples import Samples
from robustkit.diagnostics.doctor import Diagnosis, examine
from robustkit.models import as_classifier
from robustkit.runs.report_parts import Rate, Stage

NETS = str(Path(__file__).parents[1] / "nets.py")
THREATS = ("linf:0.15", "l2:1", "l1:4")

# The flag that each fault must raise, and words that its text must have.
OWN = {
    "softmax": ("probabilities", "sum to 1"),
    "log-softmax": ("non-positive-outputs", "log-probabilities"),
    "cold": ("saturated-softmax", "softmax exactly 1"),
    "rounded-input": ("zero-gradient", "exactly zero"),
    "rounded-logits": ("zero-gradient", "cannot change"),
    "detached": ("survives-any-eps", "masked"),
    "straight-through": ("wrong-gradient", "finite differences"),
    "flipped-gradient": ("wrong-gradient", "finite differences"),
    "root": ("broken-gradient", "infinite or NaN"),
    "torch-noise": ("randomised", "source: torch)"),
    "numpy-noise": ("randomised", "source: numpy)"),
    "random-noise": ("randomised", "source: random)"),
    "batch-mean": ("batch-dependent", "evaluated alone"),
    "dynamic": ("test-time-optimisation", "inside one forward pass"),
}


def digits() -> Samples:
    return load_data("digits:test").head(48)


def diagnosis(net: torch.nn.Module, threat: str = "linf:0.15", samples: Samples | None = None) -> Diagnosis:
    samples = samples or digits()
    return examine(as_classifier(net), samples, ThreatModel.parse(threat), torch.device("cpu"))


def codes(net: torch.nn.Module, threat: str = "linf:0.15", samples: Samples | None = None) -> set[str]:
    return {flag.code for flag in diagnosis(net.eval(), threat, samples).flags}


def two_classes() -> Samples:
    """Images of two classes."""
    return from_arrays(digits().images(range(24)), digits().labels[:24] % 2)


@pytest.mark.parametrize("threat", THREATS)
def test_an_unmasked_net_raises_no_flag(threat: str) -> None:
    assert codes(Wrapped("none"), threat) == set()
    net = Small(1)
    assert diagnosis(net, threat, from_arrays(*labelled(net, 48, (1, 9, 7)))).flags == []


@pytest.mark.parametrize("fault", OWN)
@pytest.mark.parametrize("threat", THREATS)
def test_each_fault_raises_its_own_flag(fault: str, threat: str) -> None:
    flags = {flag.code: flag for flag in diagnosis(Wrapped(fault).eval(), threat).flags}
    code, words = OWN[fault]
    assert code in flags
    assert words in flags[code].meaning
    assert flags[code].remedy
    assert flags[code].level == ("info" if code == "non-positive-outputs" else "warning")


@pytest.mark.parametrize("fault", ["softmax", "torch-noise", "numpy-noise", "random-noise"])
def test_a_fault_raises_no_flag_of_another_fault(fault: str) -> None:
    """Finite differences and short attacks of these fail for the reason that their own flag names."""
    found = codes(Wrapped(fault))
    assert OWN[fault][0] in found
    assert not found & {"wrong-gradient", "not-converged"}


def test_unseeded_random_draws_raise_no_wrong_gradient_flag() -> None:
    own, net = torch.Generator(), Wrapped("none")
    noisy = as_classifier(lambda x: net(x + 0.1 * torch.randn(x.shape, generator=own)))
    flags = examine(noisy, digits(), ThreatModel.parse("linf:0.15"), torch.device("cpu")).flags
    assert not {flag.code for flag in flags} & {"wrong-gradient", "not-converged"}
    assert "none of the generators" in flags[0].meaning


@pytest.mark.slow
def test_flags_are_independent_of_the_order_of_checked_models() -> None:
    unmasked = Wrapped("none")
    for fault in OWN:
        assert OWN[fault][0] in codes(Wrapped(fault))
        assert codes(unmasked) == set()


def test_every_fault_is_tested() -> None:
    assert set(FAULTS) == {*OWN, "none", "two-classes", "one-off"}


def test_training_mode_and_few_classes() -> None:
    net = Wrapped("none").train()
    assert {flag.code for flag in diagnosis(net).flags} == {"training-mode"}
    assert net.training
    two = from_arrays(digits().images(range(8)), torch.zeros(8, dtype=torch.long))
    suite = "autoattack:apgd-t(steps=2)"
    report = evaluate(Wrapped("two-classes").eval(), two, None, "linf:0.05", suite=suite)
    assert "few-classes" not in {flag.code for flag in report.flags}  # nobody asked for nine targets
    report = evaluate(Wrapped("two-classes").eval(), two, None, "linf:0.05", suite="autoattack:fab-t(steps=2)")
    assert "few-classes" in {flag.code for flag in report.flags}


def test_submodules_in_training_mode_are_flagged() -> None:
    class Stubborn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop = Wrapped("none"), torch.nn.Dropout(0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(self.drop.train()(x))

    net = Stubborn().eval()
    flags = {flag.code: flag for flag in diagnosis(net).flags}
    assert {"training-mode", "randomised"} <= set(flags)
    assert flags["training-mode"].value == 1
    report = evaluate(net, digits(), None, "linf:0.1", suite="fgsm")
    assert "training-mode" in {flag.code for flag in report.flags}
    assert not net.drop.training


def test_doctor_refuses_the_input_that_evaluate_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    net = Wrapped("none").eval()
    with pytest.raises(RunError, match="NaN"):
        diagnosis(as_classifier(lambda x: net(x) * torch.nan))
    with pytest.raises(UsageError, match="label 10 at index 0"):
        diagnosis(net, samples=from_arrays(digits().images(range(4)), torch.full((4,), 10)))
    with pytest.raises(UsageError, match="every image"):
        diagnosis(net, "l2:9")
    assert run(["doctor", "--data", "digits:test"]) == 2
    assert "without a model" in capsys.readouterr().err


def test_doctor_names_few_classes_and_chance(capsys: pytest.CaptureFixture[str]) -> None:
    assert "few-classes" in codes(Wrapped("two-classes"), samples=two_classes())
    wrong = f"{NETS}:wrapped?fault=one-off"
    assert run(["doctor", wrong, "--data", "digits:test"]) == 0
    out = capsys.readouterr().out
    assert "chance-accuracy: 0 is the clean accuracy on 64 images: every image is misclassified" in out
    assert "gradients were checked only on the 0 images that the model classifies correctly" in out


def test_float16_overflow_and_dim_images() -> None:
    assert "float16-overflow" in codes(Wrapped("cold"))
    dim = from_arrays(digits().images(range(24)) / 255, digits().labels[:24])
    assert "dim-images" in {flag.code for flag in diagnosis(Wrapped("none").eval(), samples=dim).flags}


def test_a_randomised_net_is_not_flagged_if_the_suite_averages_over_draws() -> None:
    suite = "autoattack:apgd-ce(steps=2,eot_iter=2)"
    report = evaluate(Wrapped("torch-noise").eval(), digits(), None, "linf:0.1", suite=suite)
    assert "randomised" not in {flag.code for flag in report.flags}


def test_diagnosis_changes_no_state() -> None:
    net = Wrapped("torch-noise").train()
    weight = net.get_parameter("net.net.conv1.weight")
    weight.grad = torch.ones_like(weight)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    modes = [module.training for module in net.modules()]
    gradient_functions = torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward
    diagnosis(net)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert modes == [module.training for module in net.modules()]
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert weight.grad.eq(1).all()
    assert gradient_functions == (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


def test_a_score_attack_that_beats_gradient_attacks_raises_a_flag() -> None:
    from robustkit.checks.strength import scores_beat_gradients

    def stages(*fooled: int) -> list[Stage]:
        left, result = 1000, []
        for number, count in enumerate(fooled):
            left -= count
            result.append(Stage(f"stage{number}", Rate.of(left, 1000), count, 9, 0, 0.0))
        return result

    access = ["", "gradient", "score"]
    flag = scores_beat_gradients(stages(50, 400, 20), access)
    assert (flag.level, flag.value) == ("warning", 20)
    flag = scores_beat_gradients(stages(50, 400, 1), access)
    assert (flag.level, flag.value) == ("ok", 1)
    assert scores_beat_gradients(stages(50, 20), ["", "score"]).level == "not measured"
    assert scores_beat_gradients(stages(50, 20, 400), ["", "score", "gradient"]).level == "not measured"
    without_passes = [replace(stage, forwards=0) for stage in stages(50, 400, 0)]
    assert scores_beat_gradients(without_passes, access).level == "not measured"


@pytest.mark.slow
def test_square_fools_a_masked_net_in_a_run() -> None:
    """Gradients see nothing, scores do: the run's own result raises the flag."""
    suite = "autoattack:apgd-ce(steps=5),autoattack:square(queries=300)"
    report = evaluate(Wrapped("rounded-input").eval(), digits(), None, "linf:0.15", suite=suite)
    assert {"zero-gradient", "score-beats-gradient"} <= {flag.code for flag in report.flags}


@pytest.mark.parametrize("fault", ["softmax", "flipped-gradient"])
def test_doctor_prints_the_flags_on_the_command_line(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", f"{NETS}:wrapped?fault={fault}", "--data", "digits:test"]) == 0
    out = capsys.readouterr().out
    assert f"{OWN[fault][0]}: " in out
    assert OWN[fault][1] in out


def test_doctor_on_an_unmasked_net(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "robustkit:digits-cnn"]) == 0
    assert "no flag raised" in capsys.readouterr().out
    assert run(["doctor", "robustkit:digits-cnn", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["flags"], body["n"], body["classes"]) == ([], 200, 10)


@pytest.mark.slow
def test_doctor_on_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [trial["false"] for trial in body["closed_form"]] == [0, 0, 0]
    assert all(0 < trial["expected"] < trial["images"] for trial in body["closed_form"])
    assert body["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert run(["doctor"]) == 0
    assert "all verdicts true" in capsys.readouterr().out


def test_fail_under(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--limit", "12", "--suite", "fgsm", "--no-html"]
    assert run([*command, "--fail-under", "0.1"]) == 0
    assert run([*command, "--fail-under", "1"]) == 1
    assert "is below --fail-under 100.0 %" in capsys.readouterr().err
    assert run([*command, "--fail-under", "45"]) == 2
    assert run([*command, "--confident", "--fail-under", "0.1"]) in (0, 1)
    coarse = [*command, "robustkit:digits-cnn?defense=bit-depth:3", "--fail-under", "0.1", "--out", "coarse"]
    capsys.readouterr()
    assert run(coarse) == 0
    assert "but flags put it in doubt: " in capsys.readouterr().err
    assert run([*coarse, "--fail-on-flag", "--json"]) == 1
    printed = capsys.readouterr()
    assert not json.loads(printed.out)["gate"]["passed"]
    assert "is raised, and --fail-on-flag was given" in printed.err


def test_a_gradient_that_is_not_finite_does_not_stop_the_run() -> None:
    """Pixels at 0 have none; the others lead as far as the bare net's do."""
    images, suite = digits().head(24), "apgd(steps=20)"
    bare, broken = (
        evaluate(Wrapped(fault).eval(), images, None, "linf:0.1", suite=suite) for fault in ("none", "root")
    )
    assert bare.robust_accuracy.value < bare.clean_accuracy.value - 0.1
    assert abs(broken.robust_accuracy.value - bare.robust_accuracy.value) < 0.15


def at_pooling_ties(channels: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A net with max pooling and an image of flat areas, where many units are exactly at a kink."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        layers: list[torch.nn.Module] = []
        for inside, outside in ((channels, 6), (6, 8)):
            convolution = torch.nn.Conv2d(inside, outside, 3, padding=1)
            layers += [convolution, torch.nn.Tanh(), torch.nn.MaxPool2d(2)]
        net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(96, 5))
    x = torch.zeros(1, channels, 12, 16)
    x[:, :, 4:7, 5:9] = 0.8
    return net.eval(), x


def gradient_flag(net: torch.nn.Module, x: torch.Tensor) -> Flag:
    with torch.no_grad():
        labels = net(x).argmax(1)
    probe = Probe(as_classifier(net), x, labels, ThreatModel.parse("linf:0.1"))
    return gradients.disagrees(probe)


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_at_points_without_a_derivative_raise_no_flag(channels: int) -> None:
    flag = gradient_flag(*at_pooling_ties(channels))
    assert not flag.raised
    assert flag.value is not None


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e6])
def test_the_scale_of_the_logits_raises_no_wrong_gradient_flag(scale: float) -> None:
    net, x = at_pooling_ties(3)
    assert not gradient_flag(torch.nn.Sequential(net, Scaled(scale)).eval(), x).raised


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_precision_of_a_net_raises_no_wrong_gradient_flag(dtype: torch.dtype) -> None:
    net, x = at_pooling_ties(3)
    assert not gradient_flag(torch.nn.Sequential(Cast(dtype), net.to(dtype)).eval(), x).raised


@pytest.mark.parametrize("fault", ["detached", "twice", "short", "rounded", "negated"])
def test_one_image_is_enough_to_find_a_wrong_gradient(fault: str) -> None:
    net, x = at_pooling_ties(3)
    flag = gradient_flag(WrongGradient(net, fault).eval(), x)
    assert (flag.code, flag.raised) == ("wrong-gradient", True)


class Scaled(torch.nn.Module):
    """A factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


class Cast(torch.nn.Module):
    """Another precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


class WrongGradient(torch.nn.Module):
    """A net whose input has a gradient that is not the function's."""

    def __init__(self, net: torch.nn.Module, fault: str) -> None:
        super().__init__()
        self.net, self.fault = net, fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        still = x.detach()
        if self.fault == "detached":
            x = torch.cat([x[:, :, :6], still[:, :, 6:]], 2)
        elif self.fault == "rounded":
            x = x + (8 * still).round() / 8 - still
        else:
            factor = {"twice": 2.0, "short": 0.5, "negated": -1.0}[self.fault]
            x = factor * x + (1 - factor) * still
        return self.net(x)
