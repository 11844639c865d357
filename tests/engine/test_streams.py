"""Sets larger than memory: the results of arrays, and memory that does not grow with the images."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Small
from PIL import Image
from teams import as_threads

from robustkit.core.errors import RunError
from robustkit.core.threat import ThreatModel
from robustkit.crafting.run import run_craft
from robustkit.crafting.spec import CraftRequest
from robustkit.data import from_arrays, load_data
from robustkit.data.samples import Samples
from robustkit.data.sources import archive
from robustkit.engine.evaluation import scheduler
from robustkit.engine.evaluation.evaluate_worker import Outbox
from robustkit.engine.evaluation.results import Hashes
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.evaluation.scheduler import Scheduler
from robustkit.engine.evaluation.tasks import Data, Parcel
from robustkit.engine.evaluation.verify_run import verify_run
from robustkit.engine.evaluation.worker_images import WorkerImages
from robustkit.engine.model.loaded_models import gather
from robustkit.models import as_classifier
from robustkit.runs import run_folder
from robustkit.runs.ledger import Chunk, Ledger, Verdict
from robustkit.training.images import ImageSet

COUNT = 21
EPS = ThreatModel.parse("linf:8/255")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Images in two shards, with the labels that the net gives most of them."""
    place = tmp_path_factory.mktemp("shards")
    pixels = np.random.RandomState(0).randint(0, 256, (COUNT, 8, 6, 3)).astype(np.uint8)
    with torch.no_grad():
        labels = Small()(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).argmax(1).tolist()
    labels[0] = (labels[0] + 1) % 10
    for number, rows in enumerate((range(9), range(9, COUNT))):
        with tarfile.open(place / f"{number}.tar", "w") as archive:
            for row in rows:
                packed = io.BytesIO()
                Image.fromarray(pixels[row]).save(packed, "png")
                for kind, content in (("png", packed.getvalue()), ("cls", str(labels[row]).encode())):
                    member = tarfile.TarInfo(f"{row:02d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return load_data(f"webdataset:{place}", root=place)


@pytest.fixture(scope="module")
def arrays(shards: Samples) -> Samples:
    """The same in memory."""
    return from_arrays(shards.images(range(COUNT)), shards.labels)


@pytest.mark.parametrize("suite", ["pgd(steps=3)", "fgsm"])
def test_an_evaluation_of_shards_equals_that_of_arrays(
    shards: Samples, arrays: Samples, suite: str, tmp_path: Path
) -> None:
    model = as_classifier(Small())
    streamed = Evaluation(model, shards, EPS, suite, precision="fp32", batch_size=4).run(tmp_path / "r")
    whole = Evaluation(model, arrays, EPS, suite, precision="fp32", batch_size=4).run()
    assert streamed.verdicts == whole.verdicts
    assert streamed.clean_accuracy.value == pytest.approx(1 - 1 / COUNT)
    found = verify_run(tmp_path / "r", model=model, samples=shards, device=None)
    assert not found.bad
    assert found.checked == sum(stage.fooled for stage in streamed.stages[1:]) > 0


def test_workers_read_image_files_themselves(
    shards: Samples, arrays: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_threads(monkeypatch)
    sent, parcel = [], Scheduler.parcel

    def noted(driver: Scheduler, *which: Any, **options: Any) -> Parcel:
        sent.append(parcel(driver, *which, **options))
        return sent[-1]

    monkeypatch.setattr(Scheduler, "parcel", noted)
    plan = Evaluation(
        as_classifier(Small()), shards, EPS, "pgd(steps=3)", precision="fp32", batch_size=4, workers=2
    )
    whole = replace(plan, samples=arrays, workers=None).run()
    assert [v.robust for v in plan.run().verdicts] == [v.robust for v in whole.verdicts]
    assert {one.images is None for one in sent} == {True}
    monkeypatch.setattr(scheduler, "content_hash", lambda source, rows: "of other files")
    with pytest.raises(RunError, match="on a worker's machine differ from the driver's"):
        plan.run()


def test_crafting_on_shards_equals_crafting_on_arrays(
    shards: Samples, arrays: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_MAP_FROM", 1)
    found = []
    for samples, out in ((shards, tmp_path / "r"), (arrays, None)):
        surrogate, target = (gather([Small(seed=seed)], samples, CPU) for seed in (0, 1))
        plan = CraftRequest(surrogate, samples, EPS, "i-fgsm(steps=2)", batch_size=4)
        found.append(run_craft(plan, out, target, png=tmp_path / ("png" if out else "other")))
    streamed, whole = found
    assert streamed.adversarial is not None
    assert whole.adversarial is not None
    assert isinstance(streamed.adversarial["x"], np.memmap)
    assert (streamed.adversarial["x"] == whole.adversarial["x"]).all()
    assert streamed.targets[0].predictions == whole.targets[0].predictions
    assert streamed.png == whole.png or (streamed.png and whole.png and streamed.png.success == whole.png.success)


def test_training_reads_shards_into_memory(shards: Samples, arrays: Samples) -> None:
    assert torch.equal(ImageSet.read(shards).pixels, ImageSet.read(arrays).pixels)


def test_a_large_x_is_mapped_copy_on_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.RandomState(0).rand(3, 1, 2, 2).astype(np.float32)
    rows = run_folder.Adversarials(
        np.arange(3), np.zeros(3, np.int64), (1, 2, 2), lambda: (row.tobytes() for row in x)
    )
    run_folder.write_adversarial(tmp_path, rows)
    small = run_folder.read_adversarial(tmp_path)["x"]
    monkeypatch.setattr(archive, "_MAP_FROM", 1)
    large = run_folder.read_adversarial(tmp_path)["x"]
    assert not isinstance(small, np.memmap)
    assert isinstance(large, np.memmap)
    for found in (small, large):
        assert (found == x).all()
        found[:] = 0
    assert (run_folder.read_adversarial(tmp_path)["x"] == x).all()


def test_stored_hashes_are_returned_unchanged() -> None:
    hashes = Hashes(3)
    hashes[1] = "00ff" * 16
    assert [hashes[0], hashes[1]] == ["0" * 64, "00ff" * 16]


def test_a_ledger_returns_the_rows_of_a_chunk_in_image_order(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l", "run") as ledger:
        for number, positions in enumerate(([5, 1], [4, 0, 3])):
            rows = [
                Verdict(index, 0, 1, 0.5, index != 3, "", bytes([index]) if index != 3 else None)
                for index in positions
            ]
            ledger.write(Chunk(1, number, 1, 1, 0.1, rows))
        assert [[v.position for v in chunk.verdicts] for chunk in ledger.chunks()] == [[5, 1], [4, 0, 3]]
        assert list(ledger.adversarials()) == [bytes([index]) for index in (0, 1, 4, 5)]
        assert list(ledger.fooled()) == [(index, 0, 1) for index in (0, 1, 4, 5)]
        assert ledger.image(1, 4) == bytes([4])
        query = "SELECT * FROM verdicts WHERE stage = 1 AND chunk = 1 ORDER BY rowid"
        (plan,) = ledger._db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert "rows_of_chunk" in plan[-1]


def test_a_worker_frees_images_that_have_a_verdict() -> None:
    first = np.zeros((1, 1, 2, 2), np.float32)
    source = WorkerImages(Data("arrays", np.zeros(5, np.int64), first, None, np.arange(5)))
    source.add(np.array([3, 4]), np.repeat(first, 2, 0))
    Outbox(source).write(Chunk(1, 0, 1, 1, 0.1, [Verdict(3, 0, 0, 0.5, False, "")]))
    assert list(source.kept) == [4]
