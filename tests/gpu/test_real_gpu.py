"""On a real GPU: the verdicts of the CPU, full precision, memory that runs out, equal runs, shared devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gpu_memory import Wide

import robustkit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
MODEL = "robustkit:digits-cnn"


def evaluated(device: str = "cuda", suite: str = "pgd(steps=10)", n: int = 32, **options: Any) -> Any:
    data, model = robustkit.load_data("digits:test").head(n), robustkit.load_model(MODEL)
    options = {"precision": "fp32"} | options
    return robustkit.evaluate(model, data, threat="linf:0.15", suite=suite, device=device, **options)


def assert_same_verdicts(one: Any, other: Any) -> None:
    """Verdicts are equal, but for an image on the boundary, where rounding decides."""
    for found, expected in zip(one.verdicts, other.verdicts, strict=True):
        near = min(abs(found.margin), abs(expected.margin)) < 1e-3
        assert found.robust == expected.robust or near


@pytest.mark.parametrize("suite", ["pgd(steps=10,restarts=2)", "rapid"])
def test_verdicts_are_those_of_the_cpu(suite: str) -> None:
    assert_same_verdicts(evaluated("cuda", suite), evaluated("cpu", suite))


def test_craft_success_is_that_of_the_cpu() -> None:
    data = robustkit.load_data("digits:test").head(32)
    options: dict[str, Any] = {"threat": "linf:0.1", "attack": "mi-fgsm(steps=5)"}
    found, expected = (
        robustkit.craft([MODEL], data, device=device, **options).adversarial for device in ("cuda", "cpu")
    )
    # The sign of a gradient that is nearly zero may be the other one.
    assert np.mean(np.abs(found["x"] - expected["x"]) > 1e-4) < 0.02


def test_dverge_has_the_loss_of_the_cpu(tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit": 64, "epochs": 1, "precision": "fp32"}
    found, expected = (
        robustkit.train("dverge", "digits:train", out=tmp_path / device, device=device, **options).history[-1][
            "loss"
        ]
        for device in ("cuda", "cpu")
    )
    assert found == pytest.approx(expected, rel=0.02)  # training leaves torch's setting of TF32


def test_verdicts_have_full_precision_where_torch_allows_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluated("cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert_same_verdicts(evaluated("cuda"), expected)


def test_a_run_goes_on_when_memory_is_out() -> None:
    """64 images keep about 130 MiB for the backward pass; 48 MiB are left, which `mem_get_info` does not know."""
    net = Wide()
    x = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net(x).argmax(1)

    def evaluated_wide() -> Any:
        return robustkit.evaluate(net, x, y, "linf:1e-4", suite="pgd(steps=2)", device="cuda", precision="fp32")

    expected = evaluated_wide()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + (48 << 20)) / total)
    try:
        found = evaluated_wide()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.environment["images_at_once"] < 64 <= expected.environment["images_at_once"]
    assert_same_verdicts(found, expected)


def test_deterministic_runs_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    one, other = (evaluated("cuda", "pgd(steps=10),square(queries=50)", deterministic=True) for _ in range(2))
    assert [(v.robust, v.attack, v.margin) for v in one.verdicts] == [
        (v.robust, v.attack, v.margin) for v in other.verdicts
    ]


def test_workers_that_share_a_gpu_give_the_verdicts_of_one(tmp_path: Path) -> None:
    one, two = (evaluated("cuda", workers=count, out=tmp_path / str(count)) for count in (1, 2))
    assert_same_verdicts(two, one)
