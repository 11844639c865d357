"""The size at which images are read and attacked: the query's, else the weights', else the source's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import functional

from robustkit import as_classifier, evaluate, load_data, load_model
from robustkit.core.errors import UsageError
from robustkit.core.preprocess import Preprocess
from robustkit.core.threat import ThreatModel
from robustkit.data.decoding import _fit
from robustkit.diagnostics.doctor import examine
from robustkit.reporting.terminal.evaluation import notes

TIMM = "timm:test_resnet.r160_in1k?pretrained=false&num_classes=2"


@pytest.fixture
def folder(tmp_path):
    """Pictures of 24 x 32 pixels, in two classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{number}.png")
    return f"folder:{tmp_path / 'val'}"


@pytest.mark.parametrize(
    ("query", "preprocess"),
    [
        ("", Preprocess((160, 160), 168, "bilinear")),
        ("&size=160", Preprocess((160, 160), 168, "bilinear")),
        ("&size=32", Preprocess((32, 32), 32, "bilinear")),
        ("&size=24,32", Preprocess((24, 32), 24, "bilinear")),
    ],
)
def test_the_query_sets_the_size_of_image_files(folder, query, preprocess):
    model = load_model(TIMM + query)
    assert model.preprocess == preprocess
    assert load_data(folder, preprocess=model.preprocess).images([0]).shape[2:] == preprocess.size


def test_without_a_query_the_weights_set_the_size_and_then_the_source(tmp_path):
    net = load_model("torchvision:squeezenet1_1?pretrained=false&num_classes=3").net
    save_file(net.state_dict(), tmp_path / "w.safetensors", {"size": "40,48"})
    string = f"torchvision:squeezenet1_1@{tmp_path}/w.safetensors"
    model = load_model(string)
    assert (model.size, model.preprocess) == ((40, 48), Preprocess((40, 48), 40, "bilinear"))
    assert load_model(f"{string}?size=64").preprocess == Preprocess((64, 64), 64, "bilinear")
    save_file(net.state_dict(), tmp_path / "w.safetensors", {"size": "large"})
    with pytest.raises(UsageError, match=r"metadata of .*size=large is no image size"):
        load_model(string)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (7, 90), (41, 41), (24, 32)])
def test_an_image_of_any_shape_covers_the_crop(height, width):
    image = Image.fromarray(np.full((height, width, 3), 255, np.uint8))
    for size, resize in (((24, 32), 24), ((32, 24), 27), ((16, 16), 18), ((40, 40), 40), ((5, 4), 6)):
        fitted = _fit(image, Preprocess(size, resize))
        assert (fitted.height, fitted.width) == size
        assert np.asarray(fitted).min() == 255  # nothing is padded
        if resize >= max(size):
            theirs = functional.center_crop(functional.resize(image, resize), list(size))
            assert fitted.tobytes() == theirs.tobytes()


def net(x):
    return torch.stack((x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))), 1)


def run(folder, size):
    samples = load_data(folder, preprocess=Preprocess(size, min(size)))
    return evaluate(net, samples, samples.labels, "linf:1/255", suite="fgsm")


def test_enlarged_image_files_raise_a_flag(folder):
    report = run(folder, (48, 48))
    assert report.environment["pixels"] == {
        "attacked": [48, 48],
        "net": [48, 48],
        "files": 4,
        "enlarged": 4,
        "times": 2.0,
    }
    (flag,) = [flag for flag in report.flags if flag.code == "enlarged-images"]
    assert (flag.level, flag.value) == ("warning", 2.0)
    assert any("enlarged to 48 x 48 pixels before the attack: 4 of 4" in line for line in notes(report))
    samples = load_data(folder, preprocess=Preprocess((48, 48), 48))
    found = examine(as_classifier(net), samples, ThreatModel.parse("linf:1/255"), torch.device("cpu"))
    assert "enlarged-images" in [flag.code for flag in found.flags]


def test_image_files_at_their_own_size_raise_no_flag(folder):
    report = run(folder, (24, 32))
    assert report.environment["pixels"]["attacked"] == [24, 32]
    assert report.environment["pixels"]["enlarged"] == 0
    assert "enlarged-images" not in [flag.code for flag in report.flags]
    assert notes(report) == []


def test_arrays_are_attacked_at_their_own_size_and_enlarged_inside():
    model = load_model("robustkit:digits-cnn?size=16,12")
    report = evaluate(model, torch.rand(3, 1, 5, 7), torch.tensor([0, 1, 2]), "linf:0.1", suite="fgsm")
    assert report.environment["pixels"] == {"attacked": [5, 7], "net": [16, 12]}
    assert "enlarged-images" not in [flag.code for flag in report.flags]
    assert any(
        "attacked at 5 x 7 pixels and enlarged to 16 x 12 inside the model" in line for line in notes(report)
    )
