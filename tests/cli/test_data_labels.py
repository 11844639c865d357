"""Image folders on the command line: mismatched labels, classes by name, images that change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from robustkit.cli import run
from robustkit.data import load_data

NET = """
import torch
from robustkit.models import load_model
class Grey(torch.nn.Module):
    num_classes = 10
    def __init__(self):
        super().__init__()
        self.net = load_model("robustkit:digits-cnn").net
    def forward(self, x):
        return self.net(x.mean(1, keepdim=True))
"""
CRAFT = ("craft", "--surrogate", "./net.py:Grey", "--threat", "linf:0.02", "--attack", "fgsm", "--json")


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty digits in folders named 1 to 10, and a net that is right about them."""
    monkeypatch.chdir(tmp_path)
    samples = load_data("digits:test").head(30)
    for number, image in enumerate(samples.images(range(30))):
        folder = tmp_path / "set" / str(samples.labels[number] + 1)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image[0] * 255).round().byte().numpy()
        Image.fromarray(pixels).convert("RGB").save(folder / f"{number}.png")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "set"


def crafted(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[dict[str, Any], str]:
    assert run([*CRAFT, *more]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_mismatched_labels_are_flagged_and_can_be_mapped(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, printed = crafted(capsys, "--data", "folder:set")
    codes = [flag["code"] for flag in record["flags"]]
    assert codes == ["class-order", "chance-accuracy", "labels-renumbered"]
    assert "sorted as text, as torchvision's ImageFolder does (1, 10, 2, ...)" in printed
    record, printed = crafted(capsys, "--data", "folder:set?classes=1,2,3,4,5,6,7,8,9,10")
    assert record["surrogates"][0]["clean_accuracy"] > 0.9
    assert not record.get("flags")
    assert "warning" not in printed
    assert run(["doctor", "./net.py:Grey", "--data", "folder:set", "--threat", "linf:0.02"]) == 0
    assert "chance-accuracy: " in capsys.readouterr().out


@pytest.mark.slow
def test_changed_images_give_another_run_id(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "folder:set?classes=1,2,3,4,5,6,7,8,9,10")
    first, _ = crafted(capsys, *data)
    again, printed = crafted(capsys, *data)
    assert again["run_id"] == first["run_id"]
    assert "was finished before" in printed
    file = next((digits / "3").iterdir())
    with Image.open(file) as image:
        changed = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changed.save(file)
    assert crafted(capsys, *data)[0]["run_id"] != first["run_id"]
    assert run([*CRAFT, *data, "--out", f"runs/craft-{first['run_id']}"]) == 2
    assert "which differs in data" in capsys.readouterr().err


def test_evaluation_matches_labels_by_the_class_names_of_training(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = ("--arch", "robustkit:cifar-resnet20", "--epochs", "1", "--batch-size", "10")
    assert run(["train", "standard", "--data", "folder:set", *arch, "--out", "trained"]) == 0
    names = json.loads(Path("trained/model.json").read_text())["class_names"]
    assert names == ["1", "10", "2", "3", "4", "5", "6", "7", "8", "9"]
    few_classes = digits.parent / "few"
    few_classes.mkdir()
    (digits / "3").rename(few_classes / "3")
    (digits / "9").rename(few_classes / "9")
    capsys.readouterr()
    assert run([*CRAFT[:1], "--surrogate", "trained/", *CRAFT[3:], "--data", "folder:few"]) == 0
    printed = capsys.readouterr()
    assert "note: the 2 classes of the data are matched by name to the model's 10" in printed.err
    assert set(json.loads(printed.out)["labels"]) == {3, 9}
