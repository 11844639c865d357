"""The nets of the zoo: shapes, sizes and published weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from robustkit.core.errors import UsageError
from robustkit.data import load_data
from robustkit.models import load_model
from robustkit.models.zoo.catalog import lookup

SHARED = Path(__file__).parents[2].parent / "shared" / "models" / "cifar10"


def build(name, **kwargs):
    entry = lookup(name)
    module, _, factory = entry.factory.partition(":")
    return getattr(import_module(module), factory)(**entry.kwargs, **kwargs)


@pytest.mark.parametrize(
    "name",
    [
        *("digits-cnn", "cifar-resnet20", "cifar-resnet56", "preact-resnet18", "wrn-10-1", "wrn-16-2"),
        *("cifar-preresnet20", "cifar-preresnet110", "cifar-vgg", "cifar-mobilenet"),
    ],
)
def test_nets_accept_any_batch_channels_height_and_width(name):
    net = build(name, num_classes=6, in_channels=2).eval()
    assert net(torch.rand(5, 2, 7, 9)).shape == (5, 6)


def test_mnist_cnn_takes_28_pixels():
    assert build("mnist-cnn", num_classes=6, in_channels=2)(torch.rand(5, 2, 28, 28)).shape == (5, 6)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar-resnet20", 0.27),
        ("cifar-resnet32", 0.46),
        ("cifar-resnet44", 0.66),
        ("cifar-resnet56", 0.85),
        ("cifar-preresnet20", 0.27),
        ("cifar-preresnet110", 1.73),
        ("preact-resnet18", 11.17),
        ("wrn-28-10", 36.48),
        ("wrn-34-10", 46.16),
        ("wrn-70-16", 266.80),
        ("mnist-cnn", 0.31),
    ],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        net = build(name)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


def test_the_shortcut_pads_channels_on_both_sides():
    from robustkit.models.zoo.cifar_resnet import BasicBlock

    block = BasicBlock(2, 6, stride=2).eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(3, 2, 5, 7)
    out = block(x)
    assert out.shape == (3, 6, 3, 4)
    assert torch.equal(out[:, 2:4], x[:, :, ::2, ::2])
    assert not out[:, [0, 1, 4, 5]].any()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("digit-cnn", "Did you mean 'digits-cnn'"),
        ("wrn-29-10", "4 more than a multiple of 6"),
        ("wrn-4-10", "DEPTH must be"),
    ],
)
def test_unknown_names_are_refused(name, sentence):
    with pytest.raises(UsageError, match=sentence):
        lookup(name)


def test_the_default_model_is_trained():
    model = load_model("robustkit:digits-cnn")
    assert model.string == "robustkit:digits-cnn"
    assert model.num_classes == 10
    test = load_data("digits:test")
    with torch.no_grad():
        right = model(test.images(range(len(test.labels)))).argmax(1) == torch.from_numpy(test.labels)
    assert right.float().mean() >= 0.97


def test_the_default_model_loads_untrained():
    plain = load_model("robustkit:digits-cnn?pretrained=false&num_classes=3&in_channels=2")
    assert plain(torch.rand(4, 2, 5, 6)).shape == (4, 3)
    with pytest.raises(UsageError, match=r"write num_classes=10|pretrained=false"):
        load_model("robustkit:digits-cnn?num_classes=3")


def test_untrained_nets_are_seeded_and_do_not_use_the_global_generator():
    before = torch.get_rng_state()
    first = load_model("robustkit:cifar-resnet20")
    torch.rand(3)
    again = load_model("robustkit:cifar-resnet20")
    other = load_model("robustkit:cifar-resnet20", seed=1)
    torch.set_rng_state(before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    load_model("robustkit:cifar-resnet20")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real weights in {SHARED}")
@pytest.mark.parametrize(
    ("file", "depth", "mean"),
    [
        ("resnet20", 20, 0.485),
        ("resnet32", 32, 0.485),
        ("resnet44", 44, 0.485),
        ("resnet56", 56, 0.485),
        ("resnet20-at", 20, 0.4914),
        ("resnet32-at", 32, 0.4914),
    ],
)
def test_published_weights_load_unchanged(file, depth, mean):
    model = load_model(f"robustkit:cifar-resnet{depth}@{SHARED / file}.safetensors")
    assert model.mean is not None
    assert model.mean.flatten()[0].item() == pytest.approx(mean)
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).isfinite().all()
