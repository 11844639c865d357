"""Images that workers craft are those of one process, bit by bit, also if workers die; so is a matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Small, labelled
from teams import Died, Watch, as_threads, in_worker

from robustkit import UsageError, craft
from robustkit.core.threat import ThreatModel
from robustkit.crafting import batches
from robustkit.crafting.matrix import MatrixRequest
from robustkit.data import from_arrays
from robustkit.engine.model.loaded_models import gather
from robustkit.engine.progress import Progress
from robustkit.runs.craft_record import Craft, Matrix

# Draws of an image's own, of all images', and others mixed in.
ATTACK = "mi-fgsm(steps=2)+di+admix(mixes=1,scales=2)"
THREAT = "linf:0.05"
N = 14


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    as_threads(monkeypatch)


def run(workers: int | None, **settings: Any) -> Craft:
    x, y = labelled(Small(), N, (3, 6, 8))
    nets = [Small(seed=0), Small(seed=1)]
    said = {"attack": ATTACK, "batch_size": 4, "targets": [Small(seed=2)], **settings}
    return craft(nets, x, y, THREAT, workers=workers, **said)


def assert_same(one: Craft, other: Craft) -> None:
    assert one.run_id == other.run_id
    assert np.array_equal(one.adversarial["x"], other.adversarial["x"])
    assert one.gradients_per_image == other.gradients_per_image
    for mine, yours in zip([*one.surrogates, *one.targets], [*other.surrogates, *other.targets], strict=True):
        assert mine.predictions == yours.predictions
    assert one.forecast == other.forecast
    assert [point.success for point in one.budgets or ()] == [point.success for point in other.budgets or ()]


@pytest.fixture(scope="module")
def alone() -> Craft:
    # What is not held all at once is run as it is: no time goes into finding out how to run it fastest.
    return run(None, streaming=True)


@pytest.mark.parametrize("workers", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_workers_crafts_the_images_of_one_process(workers: int, alone: Craft) -> None:
    many = run(workers, streaming=True)
    assert_same(alone, many)
    assert not np.array_equal(many.adversarial["x"], labelled(Small(), N, (3, 6, 8))[0].numpy())


@pytest.mark.slow
def test_workers_craft_target_classes_forecasts_and_budgets() -> None:
    asked = {"targeted": "least-likely", "forecast": True, "budgets": [4], "attack": "mi-fgsm(steps=2)"}
    asked["streaming"] = True
    assert_same(run(None, **asked), run(2, **asked))


def dying(work: Callable[..., Any], times: int, after: int = 0) -> Callable[..., Any]:
    """Have work die so often, when a worker does it."""
    calls = []

    def made(*arguments: object) -> Any:
        if in_worker():
            calls.append(1)
            if after < len(calls) <= after + times:
                raise Died
        return work(*arguments)

    return made


def test_images_of_a_dead_worker_are_crafted_by_others(alone: Craft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches.Crafter, "_chunk", dying(batches.Crafter._chunk, 2, after=1))
    watch = Watch()
    assert_same(alone, run(2, streaming=True, progress=watch))
    assert sum("has died" in line for line in watch.said) == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 3), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, None), (None, 2)))],
)
def test_an_interrupted_craft_run_resumes_with_any_number_of_workers(
    before: int | None, after: int | None, alone: Craft, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(before, out=tmp_path, streaming=True, progress=Watch(3))
    watch = Watch()
    assert_same(alone, run(after, out=tmp_path, streaming=True, progress=watch))
    assert any("resuming" in line for line in watch.said)


@pytest.mark.slow
def test_a_surrogate_that_cannot_be_sent_is_an_error_in_a_sentence() -> None:
    x, y = labelled(Small(), 4, (3, 6, 8))
    net = Small()
    with pytest.raises(UsageError, match=r"cannot be sent to workers .* or leave --workers out"):
        craft([lambda images: net(images)], x, y, THREAT, attack="fgsm", workers=2)
    with pytest.raises(UsageError, match="workers must be from 1 to 1024, got 0"):
        run(0)


def matrix(out: Path, workers: int | None) -> Matrix:
    x, y = labelled(Small(), 6, (3, 6, 8))
    samples = from_arrays(x, y)
    nets = gather([Small(seed=seed) for seed in range(3)], samples, torch.device("cpu"))
    place = torch.device("cpu")
    grid = MatrixRequest(nets, [], samples, ThreatModel.parse(THREAT), "fgsm", None, 0, place, 4, workers=workers)
    return grid.run(out, Progress(), lambda name: Progress())


@pytest.mark.parametrize("workers", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_matrix_with_workers_equals_that_of_one_process(workers: int, tmp_path: Path) -> None:
    one, many = matrix(tmp_path / "one", None), matrix(tmp_path / "many", workers)
    assert one.success == many.success
    assert one.gradients_per_image == many.gradients_per_image
    for place in one.folders:
        pair = [np.load(tmp_path / name / place / "adversarial.npz")["x"] for name in ("one", "many")]
        assert np.array_equal(*pair)
    assert matrix(tmp_path / "many", 3).success == one.success
