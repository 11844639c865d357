"""`corrupt`: accuracies counted by hand, the record, resuming, the page."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import robustkit
from robustkit.cli import run
from robustkit.core.errors import UsageError
from robustkit.data.corruptions.names import NAMES
from robustkit.data.corruptions.samples import corrupted
from robustkit.engine.progress import Progress
from robustkit.runs.corruption_record import Corruptions

NET = "robustkit:digits-cnn"


def test_accuracies_are_those_counted_by_hand() -> None:
    data, model = robustkit.load_data("digits:test").head(30), robustkit.load_model(NET)
    record = robustkit.corrupt(model, data, corruptions=["fog", "contrast"], severities=[5, 2])
    assert list(record.accuracy) == ["fog", "contrast"]
    labels = torch.from_numpy(data.labels)
    values = []
    for name, rates in record.accuracy.items():
        for severity, rate in zip((2, 5), rates, strict=True):
            x = corrupted(data, name, severity).images(range(30))
            values.append(float((model(x).argmax(1) == labels).float().mean()))
            assert rate.value == pytest.approx(values[-1])
    assert record.mean.value == pytest.approx(np.mean(values))
    assert record.mean.low < record.mean.value < record.mean.high
    assert record.cost.forwards == 5 * 30
    assert Corruptions.from_json(json.loads(json.dumps(record.to_json()))) == record


class Killed(Progress):
    """Ends the run when the third stage begins."""

    stages = 0

    def stage(self, name: str, images: int, robust: int, n: int) -> None:
        self.stages += 1
        if self.stages == 4:
            raise KeyboardInterrupt


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    data = robustkit.load_data("digits:test").head(20)
    corrupt = partial(robustkit.corrupt, NET, data, corruptions=["fog", "snow"], severities=[1, 5])
    with pytest.raises(KeyboardInterrupt):
        corrupt(out=tmp_path / "k", progress=Killed())
    resumed = corrupt(out=tmp_path / "k")
    whole = corrupt()
    assert resumed.accuracy == whole.accuracy
    assert resumed.clean == whole.clean
    assert resumed.cost.forwards == 2 * 20
    assert corrupt(out=tmp_path / "k") == resumed


def test_the_command_writes_table_record_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "k"
    words = ["corrupt", "--limit", "12", "--corruptions", "fog,jpeg_compression", "--severities", "1,4"]
    assert run([*words, "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "jpeg compression" in shown
    assert "mean corruption error" in shown
    assert "clean accuracy" in shown
    page = (folder / "corruptions.html").read_text()
    assert "<h1>How accurate is digits-cnn on corrupted images?</h1>" in page
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == shown.splitlines()[:4]
    for verb in (["verify", str(folder)], ["export", str(folder), "--csv", str(tmp_path / "v.csv")]):
        assert run(verb) == 2
        assert "holds accuracies on corrupted images" in capsys.readouterr().err


def test_mean_error_of_imagenet_c_is_relative_to_alexnet() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 1000).float()

    x, y = torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    record = robustkit.corrupt(Constant(), x, y)
    assert list(record.accuracy) == list(NAMES)
    alexnet = np.array(
        [
            *(0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816),
            *(0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
        ]
    )
    (chance,) = (flag for flag in record.flags if flag.code == "chance-accuracy")
    assert "1000 classes" in chance.meaning
    assert record.relative_error == pytest.approx(np.mean(0.5 / alexnet))


def test_a_folder_of_corrupted_images_has_no_clean_accuracy(tmp_path: Path) -> None:
    clean = robustkit.load_data("digits:test").head(6)
    fog = [corrupted(clean, "fog", severity).images(range(6)) for severity in range(1, 6)]
    stored = (torch.cat(fog) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "fog.npy", stored)
    np.save(tmp_path / "labels.npy", np.tile(clean.labels, 5))
    ready = robustkit.corrupt(NET, robustkit.load_data(f"cifar-c:{tmp_path}"), corruptions=["fog"])
    own = robustkit.corrupt(NET, clean, corruptions=["fog"])
    assert ready.clean is None
    assert ready.accuracy == own.accuracy


def test_wrong_options_are_refused() -> None:
    data = robustkit.load_data("digits:test").head(2)
    with pytest.raises(UsageError, match="Did you mean 'fog'"):
        robustkit.corrupt(NET, data, corruptions=["fogg"])
    with pytest.raises(UsageError, match="no severity 6"):
        robustkit.corrupt(NET, data, severities=[6])
