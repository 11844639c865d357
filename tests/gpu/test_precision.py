"""Float32 verdicts have full precision whatever torch is set to; TF32 is a precision of a search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_gpu import simulated_gpu
from torch import Tensor, nn

import robustkit
from robustkit.core.determinism import deterministic_operations
from robustkit.core.float32 import float32_operations, float32_settings
from robustkit.engine.model.instrumented_model import ExecutionConfig, InstrumentedModel
from robustkit.models import as_classifier

backends: Any = torch.backends
conv, matmul = backends.cudnn.conv, backends.cuda.matmul
FULL, ROUNDED = ("ieee", "ieee"), ("tf32", "tf32")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Set torch back to its defaults, which let cuDNN use TF32."""
    yield
    backends.fp32_precision = "none"
    conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("highest")


def old_interface() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True


def new_interface() -> None:
    conv.fp32_precision, matmul.fp32_precision = "tf32", "tf32"


def all_backends() -> None:
    backends.fp32_precision = "tf32"


def now() -> tuple[str, str]:
    return tuple(float32_settings().values())  # type: ignore[return-value]


def default() -> None:
    pass


@pytest.mark.parametrize("choose", [default, old_interface, new_interface, all_backends])
def test_full_precision_is_set_inside_and_the_setting_of_the_user_is_restored(choose: Callable[[], None]) -> None:
    choose()
    before = now()
    assert before[0] == "tf32"
    with float32_operations("ieee"):
        assert now() == FULL
        with float32_operations("tf32"):
            assert now() == ROUNDED
        assert now() == FULL
    assert now() == before


def test_code_of_a_model_may_read_the_older_interface_inside() -> None:
    with float32_operations("ieee"), torch.backends.cudnn.flags(enabled=False):
        assert not torch.backends.cuda.matmul.allow_tf32


class RoundsInTf32(nn.Module):
    """A linear net that computes as a GPU does: in 10 bits unless full precision is set; it notes what is set."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 5, generator=torch.Generator().manual_seed(0)))
        self.seen = set[tuple[tuple[str, str], bool]]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((now(), torch.is_grad_enabled()))
        if now() == FULL:
            return x.flatten(1) @ self.weight
        return (x.flatten(1) * 1024).round() / 1024 @ self.weight


def evaluated(**options: Any) -> Any:
    net, x = RoundsInTf32(), torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = (x.flatten(1) @ net.weight).argmax(1)
    suite = "pgd(steps=2),autoattack:apgd-ce(steps=2)"
    report = robustkit.evaluate(net, x, y, "linf:0.01", suite=suite, **options)
    return net, x, y, report


def test_verdicts_and_verification_do_not_depend_on_tf32(tmp_path: Path) -> None:
    conv.fp32_precision = "ieee"
    expected = evaluated(device="cpu", precision="fp32")[3]
    old_interface()
    net, x, y, report = evaluated(device="cpu", precision="fp32", out=tmp_path / "run", curve=True)
    assert [verdict.margin for verdict in report.verdicts] == [verdict.margin for verdict in expected.verdicts]
    assert not robustkit.verify(tmp_path / "run", net, x, y).bad
    robustkit.craft([net], x, y, "linf:0.01", attack="mi-fgsm(steps=2)", targets=[net, nn.Sequential(net)][1:])
    assert {settings for settings, _ in net.seen} == {FULL}
    assert now() == ROUNDED


def test_tf32_is_a_precision_of_the_search_with_a_bound_on_its_rounding() -> None:
    with simulated_gpu():
        net, *_, report = evaluated(device="cuda", precision="tf32")
    assert (ROUNDED, True) in net.seen  # the search
    assert (FULL, False) in net.seen  # the verdicts
    assert report.environment["precision"] == "tf32"
    assert report.environment["kernels"]["float32"] == {"convolutions": "ieee", "matrix_products": "ieee"}
    model = InstrumentedModel(as_classifier(net), torch.device("cpu"), "tf32")
    assert model.rounding == 2**-8
    with model.using(ExecutionConfig(model.model)):
        assert model.rounding == 0


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(robustkit.UsageError, match="'tf32' needs an NVIDIA GPU of 2020 or later, not cpu"):
        evaluated(device="cpu", precision="tf32")


class NotesDeterminism(nn.Module):
    """A linear net that notes how torch chooses kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))
        self.seen = set[tuple[bool, bool]]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))
        return x.flatten(1) @ self.weight


def test_deterministic_kernels_in_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    data = robustkit.load_data("digits:test").head(4)
    evaluated, crafted = NotesDeterminism(), NotesDeterminism()
    robustkit.evaluate(evaluated, data, threat="linf:0.1", suite="pgd(steps=1)", deterministic=True)
    robustkit.craft([crafted], data, threat="linf:0.1", attack="mi-fgsm(steps=1)", deterministic=True)
    assert evaluated.seen == {(True, True)}
    assert (True, True) in crafted.seen
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_a_started_gpu_without_its_setting_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with simulated_gpu(), pytest.raises(robustkit.UsageError, match="set this environment variable before Python"):
        with deterministic_operations(True, torch.device("cuda")):
            pass


def test_verdict_passes_use_deterministic_convolutions() -> None:
    net = NotesDeterminism()
    InstrumentedModel(as_classifier(net), torch.device("cpu")).logits_fp32(torch.rand(2, 1, 8, 8))
    assert net.seen == {(False, True)}
