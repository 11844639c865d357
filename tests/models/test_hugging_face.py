"""Classifiers of transformers and timm from folders and the hub's cache: the numbers of the libraries."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robustkit.core.errors import UsageError
from robustkit.models import load_model
from robustkit.models.sources.image_processor import ImageSettings, PreparedImages

CLASSES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("a net")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    config.id2label = {0: "cat", 1: "dog", 2: "fox", 3: "owl"}
    transformers.ResNetForImageClassification(config).save_pretrained(path)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 14, "width": 18},
        "resample": 2,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


@pytest.mark.parametrize("size", [(14, 18), (28, 40)])
def test_a_folder_of_transformers_gives_its_logits_with_its_preprocessing(folder, size):
    import transformers

    model = load_model(f"hf:{folder}")
    net = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randint(0, 256, (5, 3, *size), generator=torch.Generator().manual_seed(1)) / 255
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=True)
    prepared = processor(list((images * 255).round().to(torch.uint8)), return_tensors="pt")
    # The processor rounds resized images to 256 values.
    exact = size == (14, 18)
    torch.testing.assert_close(model(images), net(**prepared).logits, rtol=1e-4, atol=1e-5 if exact else 2e-2)
    assert (model.in_channels, model.num_classes, model.class_names) == (3, CLASSES, ("cat", "dog", "fox", "owl"))
    assert model.preprocess.size == (14, 18)
    assert load_model(model.string).fingerprint == model.fingerprint
    (gradient,) = torch.autograd.grad(model(images.requires_grad_())[:, 0].sum(), images)
    assert gradient.abs().sum() > 0


def test_weights_of_a_folder_may_be_replaced(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    bias = next(name for name in state if name.endswith("classifier.1.bias"))
    save_file({**state, bias: state[bias] + 1}, tmp_path / "w.safetensors", {"format": "pt"})
    images = torch.rand(2, 3, 14, 18)
    changed = load_model(f"hf:{folder}@{tmp_path}/w.safetensors")(images)
    torch.testing.assert_close(changed, load_model(f"hf:{folder}")(images) + 1)
    assert load_model(f"hf:{folder}?pretrained=false&num_classes=7")(images).shape == (2, 7)


def test_what_is_no_classifier_is_refused(folder, tmp_path):
    headless = tmp_path / "headless"
    shutil.copytree(folder, headless)
    state = load_file(headless / "model.safetensors")
    kept = {name: value for name, value in state.items() if "classifier" not in name}
    save_file(kept, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="no trained weights for 'classifier"):
        load_model(f"hf:{headless}")
    config = json.loads((headless / "config.json").read_text())
    code = {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (headless / "config.json").write_text(json.dumps(code))
    (headless / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(UsageError, match="is no image classifier that transformers loads"):
        load_model(f"hf:{headless}")
    with pytest.raises(UsageError, match="there is no folder '/none'"):
        load_model("hf:/none")
    with pytest.raises(UsageError, match="determine its classes"):
        load_model(f"hf:{folder}?num_classes=3")


def test_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="needs transformers: pip install transformers"):
        load_model("hf:microsoft/resnet-18")


class Processor:
    def __init__(self, **settings):
        defaults = {
            "do_resize": True,
            "do_normalize": True,
            "image_mean": [0.5],
            "image_std": [0.25],
            "resample": 3,
        }
        vars(self).update({**defaults, **settings})


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"size": {"height": 8, "width": 9}}, ((0.5,), (0.25,), None, (8, 9))),
        (
            {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": {"height": 12, "width": 10}},
            ((0.5,), (0.25,), 16, (12, 10)),
        ),
        ({"size": {"shortest_edge": 14}, "crop_pct": 0.875}, ((0.5,), (0.25,), 16, (14, 14))),
        ({"size": {"shortest_edge": 384}, "crop_pct": 1.0}, ((0.5,), (0.25,), None, (384, 384))),
        ({"size": {"shortest_edge": 14}}, ((0.5,), (0.25,), 14, (14, 14))),
        ({"do_resize": False, "do_normalize": False}, (None, None, None, None)),
        ({"do_resize": False, "do_rescale": False}, ((0.5 / 255,), (0.25 / 255,), None, None)),
        (
            {"do_resize": False, "do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True},
            ((0.5,), (0.5,), None, None),
        ),
    ],
)
def test_settings_of_image_processors_are_read(settings, wanted):
    found = ImageSettings.read(Processor(**settings))
    mean, std, side, size = wanted
    assert (found.side, found.size) == (side, size)
    for value, number in ((found.mean, mean), (found.std, std)):
        assert value == (None if number is None else pytest.approx(number))


def test_the_centre_of_a_resized_image_is_cropped():
    settings = ImageSettings(None, None, 8, (6, 5), "bilinear")
    net = PreparedImages(nn.Identity(), settings, lambda net, images: images)
    images = torch.rand(5, 3, 16, 20)
    small = nn.functional.interpolate(images, (8, 10), mode="bilinear", antialias=True)
    torch.testing.assert_close(net(images), small[:, :, 1:7, 2:7])
    assert net(torch.rand(5, 3, 6, 5)).shape == (5, 3, 6, 5)


@pytest.fixture
def timm_folder(tmp_path):
    import timm

    net = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    config = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "num_classes": CLASSES}
    body = {"architecture": "test_resnet", "num_classes": CLASSES, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(body))
    return net, folder


def check_timm(net, string):
    model = load_model(string)
    images = torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    torch.testing.assert_close(model(images), net((images - mean) / std))
    assert load_model(model.string).fingerprint == model.fingerprint


def test_a_folder_of_timm_gives_its_logits_with_its_normalisation(timm_folder):
    net, folder = timm_folder
    check_timm(net, f"timm:local-dir:{folder}")


@pytest.mark.parametrize("prefix", ["hf-hub", "timm:hf-hub"])
def test_a_net_of_the_hub_is_read_from_its_cache(timm_folder, tmp_path, monkeypatch, prefix):
    net, folder = timm_folder
    cached = tmp_path / "hub" / "models--owner--net"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("robustkit.models.sources.network.reachable", lambda url: False)
    check_timm(net, f"{prefix}:owner/net")
    with pytest.raises(UsageError, match="'hf-hub:owner/other' could not be downloaded"):
        load_model(f"{prefix}:owner/other")
