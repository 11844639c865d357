"""From a model string or a callable to a classifier, and every error on the way."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robustkit.core.errors import UsageError
from robustkit.core.preprocess import Preprocess
from robustkit.models import Classifier, as_classifier, load_model
from robustkit.models.sources.network import reachable

DIGITS = "robustkit:digits-cnn"
IMAGES = torch.rand(5, 3, 7, 9, generator=torch.Generator().manual_seed(0))

CODE = """
import helper
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, scale):
        super().__init__()
        self.linear = nn.Linear(3, num_classes)
        self.scale = scale

    def forward(self, x):
        return self.linear(x.mean((2, 3))) * self.scale


def build(num_classes=4, scale=1.0):
    return Net(num_classes, scale)


def means():
    return lambda x: x.mean((2, 3))


def needs(depth):
    return None


def fails():
    raise OSError("no such luck.\\nsecond line")


number = 3
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "helper.py").write_text("")
    path = tmp_path / "net.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def state():
    return dict(load_model(f"{DIGITS}?pretrained=false", seed=3).net.state_dict())


@dataclasses.dataclass
class Output:
    loss: float
    scores: torch.Tensor


Named = collections.namedtuple("Named", "features logits")


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x.mean((2, 3)))


# The classifier itself


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: [None, z],
        lambda z: {"features": 2 * z, "logits": z},
        lambda z: Named(2 * z, z),
        lambda z: Output(0.5, z),
        lambda z: z.bfloat16(),
    ],
)
def test_logits_are_found_in_whatever_the_net_returns(wrap):
    logits = as_classifier(Wrapped(wrap))(IMAGES)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, IMAGES.mean((2, 3)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("wrap", "sentence"),
    [
        (lambda z: None, "returned a NoneType without a tensor"),
        (lambda z: 3.0, "returned a float without a tensor"),
        (lambda z: ("a", "b"), "returned a tuple without a tensor"),
        (lambda z: z[None], r"returned shape \(1, 5, 3\)"),
        (lambda z: z[:2], r"returned shape \(2, 3\)"),
    ],
)
def test_outputs_that_are_not_logits_are_refused(wrap, sentence):
    with pytest.raises(UsageError, match=sentence):
        as_classifier(Wrapped(wrap))(IMAGES)


def test_normalisation_and_resizing_are_inside_and_differentiable():
    seen = []

    def net(x):
        seen.append(x)
        return x.mean((2, 3))

    model = Classifier(net, string="", identity={}, mean=(0.1, 0.2, 0.3), std=(0.5,), size=(4, 6))
    x = IMAGES.clone().requires_grad_()
    model(x).sum().backward()
    assert seen[0].shape == (5, 3, 4, 6)
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    expected = (IMAGES.mean((2, 3)) - torch.tensor([0.1, 0.2, 0.3])) / 0.5
    torch.testing.assert_close(model(IMAGES), expected, rtol=0, atol=0.2)
    assert not model.state_dict()


def test_normalisation_of_grayscale_takes_one_number():
    model = Classifier(Wrapped(lambda z: z.repeat(1, 2)), string="", identity={}, mean=(0.5,), std=(0.5,))
    torch.testing.assert_close(model(torch.full((2, 1, 3, 4), 0.75)), torch.full((2, 2), 0.5))


def test_a_mean_for_other_channels_is_an_error_at_load_or_at_the_first_forward(code):
    with pytest.raises(UsageError, match="1 channels but its mean or std has 3 numbers"):
        load_model(f"{DIGITS}?mean=0,0,0")
    model = load_model(f"{code}:build?mean=0.5,0.5")
    with pytest.raises(UsageError, match="has 2 numbers as mean but the images have 3 channels"):
        model(IMAGES)


def test_images_of_another_shape_are_named():
    with pytest.raises(UsageError, match=r"does not take images of shape \(3, 7, 9\)"):
        load_model(DIGITS)(IMAGES)
    with pytest.raises(UsageError, match="write size=N"):
        load_model("robustkit:mnist-cnn")(IMAGES[:, :1])
    assert load_model("robustkit:mnist-cnn?size=28")(IMAGES[:, :1]).shape == (5, 10)


def test_out_of_memory_errors_are_passed_on():
    def net(x):
        raise RuntimeError("out of memory: tried to allocate a tensor of size 3")

    with pytest.raises(RuntimeError, match="out of memory"):
        as_classifier(net)(IMAGES)


# as_classifier


def test_as_classifier_keeps_the_mode_and_returns_a_classifier_unchanged():
    net = nn.Sequential(nn.Flatten(), nn.Linear(189, 4))
    for mode in (True, False):
        net.train(mode)
        model = as_classifier(net)
        assert model.training == net.training == mode
    assert as_classifier(model) is model
    assert model.string == "python:Sequential"
    assert model.preprocess is None
    with pytest.raises(UsageError, match="a model cannot be of type int"):
        as_classifier(3)


def test_fingerprints_of_modules_and_functions():
    nets = [nn.Linear(3, 4), nn.Linear(3, 4)]

    def closure(net):
        return lambda x: net(x.mean((2, 3)))

    def apply(net, x):
        return net(x.mean((2, 3)))

    for wrap in (
        lambda net: net,
        closure,
        lambda net: functools.partial(apply, net),
        lambda net: net.forward,
    ):
        first, again, other = (as_classifier(wrap(net)).fingerprint for net in (*nets[:1] * 2, nets[1]))
        assert first == again != other
    assert as_classifier(nn.ReLU()).fingerprint != as_classifier(nn.GELU()).fingerprint


def test_fingerprints_of_functions_cover_source_and_values():
    def scaled(scale):
        return lambda x: scale * x.mean((2, 3))

    def means(x):
        return x.mean((2, 3))

    def peaks(x):
        return x.amax((2, 3))

    models = [
        means,
        peaks,
        scaled(1),
        scaled(2),
        functools.partial(means),
        functools.partial(torch.sum, dim=1),
    ]
    assert len({as_classifier(model).fingerprint for model in models}) == len(models)
    assert as_classifier(scaled(2)).fingerprint == as_classifier(scaled(2)).fingerprint


# Loading


def test_the_string_works_from_another_folder(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(load_model("net.py:build").net.state_dict(), "w.safetensors")
    model = load_model("net.py:build@w.safetensors?mean=0.5&scale=2.0")
    assert model.string == f"{tmp_path}/net.py:build@{tmp_path}/w.safetensors?mean=0.5&scale=2.0"
    assert not model.training
    monkeypatch.chdir("/")
    again = load_model(model.string)
    assert again.string == model.string
    assert again.fingerprint == model.fingerprint
    torch.testing.assert_close(again(IMAGES), model(IMAGES))
    assert not (tmp_path / "__pycache__" / "net.pyc").exists()


def test_fingerprint_covers_weights_code_and_normalisation_but_no_path(code, tmp_path, state):
    def fingerprint(string):
        return load_model(string).fingerprint

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "w.safetensors")
        (tmp_path / folder / "helper.py").write_text("")
        (tmp_path / folder / "net.py").write_text(CODE)
    first, second = (f"{DIGITS}@{tmp_path}/{folder}/w.safetensors" for folder in "ab")
    assert fingerprint(first) == fingerprint(second) == fingerprint(f"{first}?num_classes=10")
    assert len({fingerprint(first + query) for query in ("", "?mean=0.5", "?std=0.5", "?size=9")}) == 4
    body = bytearray((tmp_path / "b" / "w.safetensors").read_bytes())
    body[-4] ^= 1
    (tmp_path / "b" / "w.safetensors").write_bytes(body)
    assert fingerprint(first) != fingerprint(second)
    assert load_model(first).weights_sha256 != load_model(second).weights_sha256
    assert fingerprint(f"{tmp_path}/a/net.py:build") == fingerprint(f"{tmp_path}/b/net.py:build")
    assert fingerprint(f"{tmp_path}/a/net.py:build") != fingerprint(f"{tmp_path}/a/net.py:build?scale=2")
    (tmp_path / "b" / "net.py").write_text(CODE.replace("mean((2, 3))", "amax((2, 3))"))
    assert fingerprint(f"{tmp_path}/a/net.py:build") != fingerprint(f"{tmp_path}/b/net.py:build")


def test_normalisation_comes_from_the_query_then_the_file_then_the_library(tmp_path):
    def mean(string):
        values = load_model(string).mean
        return None if values is None else round(values.flatten()[0].item(), 4)

    net = load_model("torchvision:squeezenet1_1?pretrained=false&num_classes=3").net
    plain, noted = tmp_path / "plain.safetensors", tmp_path / "noted.safetensors"
    save_file(net.state_dict(), plain)
    save_file(net.state_dict(), noted, {"mean": "0.1, 0.2, 0.3", "std": "1,1,1"})
    arch = "torchvision:squeezenet1_1"
    assert mean(f"{arch}@{noted}?num_classes=3&mean=0.7") == 0.7
    assert mean(f"{arch}@{noted}?num_classes=3") == 0.1
    assert mean(f"{arch}@{plain}?num_classes=3") == 0.485
    assert mean(f"{DIGITS}?pretrained=false") is None


def test_the_zoo_takes_classes_and_channels_from_the_weights(tmp_path):
    net = load_model(f"{DIGITS}?pretrained=false&num_classes=3&in_channels=2").net
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model = load_model(f"{DIGITS}@{tmp_path}/w.safetensors")
    assert model.num_classes == 3
    assert model(torch.rand(5, 2, 7, 9)).shape == (5, 3)
    assert model.preprocess == Preprocess((8, 8), 8)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{name}": tensor for name, tensor in s.items()},
        lambda s: {"state_dict": {f"module.{name}": tensor for name, tensor in s.items()}},
        lambda s: {name: nn.Parameter(tensor) for name, tensor in s.items()},
    ],
)
def test_torch_files_load(tmp_path, state, wrap, suffix):
    path = (tmp_path / "w").with_suffix(suffix)
    torch.save(wrap(state), path)
    save_file(state, tmp_path / "w.safetensors")
    expected = load_model(f"{DIGITS}@{tmp_path}/w.safetensors").fingerprint
    assert load_model(f"{DIGITS}@{path}").fingerprint == expected


def test_files_of_torchs_old_format_load(tmp_path, state):
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert load_model(f"{DIGITS}@{tmp_path}/w.pt")


def test_a_header_whose_length_looks_like_a_pickle(tmp_path, state):
    path = tmp_path / "w.safetensors"
    for padding in range(600):
        save_file(state, path, {"note": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header length began with 0x80")
    assert load_model(f"{DIGITS}@{path}")


def test_counters_of_batch_norm_may_be_missing_or_unused(tmp_path):
    net = load_model("robustkit:cifar-resnet20").net
    full = net.state_dict()
    bare = {name: tensor for name, tensor in full.items() if "num_batches" not in name}
    more = {**bare, "layer9.num_batches_tracked": torch.tensor(3)}
    prints = set()
    for name, tensors in (("full", full), ("bare", bare), ("more", more)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        prints.add(load_model(f"robustkit:cifar-resnet20@{tmp_path}/{name}.safetensors").fingerprint)
    assert len(prints) == 1


# Files that are no weights


class Malice:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["alone", "beside", "old", "raw"])
def test_code_in_a_weights_file_never_runs(tmp_path, state, where):
    marker, path = tmp_path / "marker", tmp_path / "w.pt"
    malice = Malice(marker)
    if where == "raw":
        path.write_bytes(pickle.dumps(malice))
    else:
        content = {"state_dict": state, "note": malice} if where == "beside" else malice
        torch.save(content, path, _use_new_zipfile_serialization=where != "old")
    with pytest.raises(UsageError, match=r"Python object.*could run code") as caught:
        load_model(f"{DIGITS}@{path}")
    assert not marker.exists()
    assert "\n" not in str(caught.value)


def _write(path, kind, state):
    save_file(state, path.with_name("whole.safetensors"))
    torch.save(state, path.with_name("whole.pt"))
    whole = path.with_name("whole.pt" if path.suffix != ".safetensors" else "whole.safetensors").read_bytes()
    match kind:
        case "missing":
            pass
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "half":
            path.write_bytes(whole[: len(whole) // 2])
        case "header":
            path.write_bytes(whole[:100])
        case "text":
            path.write_text("these are no weights at all")
        case "few bytes":
            path.write_text("hi")
        case "list":
            torch.save([torch.zeros(1)], path)
        case "epoch":
            torch.save({"epoch": 3}, path)
        case "none":
            save_file({}, path)
        case "nan":
            save_file({**state, "conv2.bias": state["conv2.bias"] / 0}, path)


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("w.pt", "missing", "there is no weights file"),
        ("w.safetensors", "missing", "there is no weights file"),
        ("w.pt", "folder", "is a folder: write the file in it"),
        ("w.pt", "empty", "is empty"),
        ("w.safetensors", "empty", "is empty"),
        ("w.pt", "half", "is truncated or damaged"),
        ("w.safetensors", "half", "is truncated or damaged"),
        ("w.safetensors", "header", "is truncated or damaged"),
        ("w.pt", "text", "neither a safetensors file nor one that torch.save wrote"),
        ("w.safetensors", "text", "neither a safetensors file"),
        ("w.pt", "few bytes", "neither a safetensors file"),
        ("w.safetensors", "few bytes", "neither a safetensors file"),
        ("w.pt", "list", "lacks 8 of its 8 tensors"),
        ("w.pt", "epoch", "holds the entries epoch but no tensors"),
        ("w.safetensors", "none", "holds an empty header but no tensors"),
        ("w.safetensors", "nan", "NaN or infinite values in 'conv2.bias'"),
    ],
)
def test_files_without_weights_are_refused(tmp_path, state, name, kind, sentence):
    _write(tmp_path / name, kind, state)
    with pytest.raises(UsageError, match=sentence) as caught:
        load_model(f"{DIGITS}@{tmp_path / name}")
    assert "\n" not in str(caught.value)


def test_torchscript_files_are_refused_as_code(tmp_path):
    script = "import sys, torch; torch.jit.save(torch.jit.script(torch.nn.ReLU()), sys.argv[1])"
    path = tmp_path / "w.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(path)], check=True)
    with pytest.raises(UsageError, match="is TorchScript"):
        load_model(f"{DIGITS}@{path}")


@pytest.mark.parametrize(
    ("change", "query", "sentence"),
    [
        (lambda s: s.pop("conv1.bias"), "", r"lacks 1 of its 8 tensors \(conv1.bias\)"),
        (lambda s: s.update(extra=torch.zeros(1)), "", r"has 1 that it does not know \(extra\)"),
        (
            lambda s: [s.update({f"{name}.x": s.pop(name)}) for name in list(s)],
            "",
            r"lacks 8 of its 8 tensors \(\S+, \S+, \S+, …\) and has 8 that it does not know",
        ),
        (
            lambda s: None,
            "?num_classes=3",
            r"'linear.weight' has shape \(10, 64\).*\(3, 64\).*num_classes=10",
        ),
        (
            lambda s: s.update({"conv3.weight": torch.zeros(64, 2, 3, 3)}),
            "",
            r"'conv3.weight' has shape \(64, 2, 3, 3\) there and \(64, 64, 3, 3\)",
        ),
    ],
)
def test_weights_of_another_net_are_refused(tmp_path, state, change, query, sentence):
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=sentence):
        load_model(f"{DIGITS}@{tmp_path}/w.safetensors{query}")


def test_invalid_normalisation_metadata_is_refused(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors", {"mean": "black"})
    with pytest.raises(UsageError, match=r"metadata of .*not 'black'"):
        load_model(f"{DIGITS}@{tmp_path}/w.safetensors")


# Python code


def test_models_load_from_functions_of_a_file(code):
    model = load_model(f"{code}:means?mean=0.5&size=9")
    torch.testing.assert_close(model(IMAGES), IMAGES.mean((2, 3)) - 0.5, rtol=0, atol=0.1)
    assert model.preprocess == Preprocess((9, 9), 9)


@pytest.mark.parametrize(
    ("tail", "sentence"),
    [
        (":missing", "has no factory 'missing'"),
        (":number", "has a int, not a function, named 'number'"),
        (":fails", "failed with OSError: no such luck: correct it"),
        (":needs", "missing a required argument: 'depth'"),
        (":needs?depth=3", "returned an object of type NoneType"),
        (":build?scal=2", "Did you mean 'scale'"),
        (":means?scale=2", "takes no fields: leave out scale="),
    ],
)
def test_factories_that_fail_are_one_sentence(code, tail, sentence):
    with pytest.raises(UsageError, match=sentence) as caught:
        load_model(f"{code}{tail}")
    assert "\n" not in str(caught.value)


def test_files_without_code_are_refused(tmp_path, state):
    with pytest.raises(UsageError, match="there is no file"):
        load_model(f"{tmp_path}/net.py:build")
    (tmp_path / "net.py").write_text("def build(:\n")
    with pytest.raises(UsageError, match="failed with SyntaxError"):
        load_model(f"{tmp_path}/net.py:build")
    (tmp_path / "net.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(UsageError, match="failed with SystemExit: 3"):
        load_model(f"{tmp_path}/net.py:build")
    (tmp_path / "net.py").write_text("def build():\n    return lambda x: x.flatten(1)\n")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="is a function and takes no weights"):
        load_model(f"{tmp_path}/net.py:build@{tmp_path}/w.safetensors")
    (tmp_path / "net.py").write_text(
        "import torch\ndef build():\n    net = torch.nn.Linear(2, 2)\n"
        "    net.weight.data[0] = float('nan')\n    return net\n"
    )
    with pytest.raises(UsageError, match="NaN or infinite values in 'weight'"):
        load_model(f"{tmp_path}/net.py:build")


@pytest.mark.slow
def test_models_load_from_importable_modules(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="did you mean 'robustkit:digits-cnn'"):
        load_model("robstkit:digits-cnn")
    with pytest.raises(UsageError, match="no kind of model 'no_such_module_here', nor a module of that name"):
        load_model("no_such_module_here:build")
    monkeypatch.chdir(tmp_path)
    Path("my_own_net.py").write_text("import not_there_either\n")
    with pytest.raises(UsageError, match=r"did you mean './my_own_net.py:build'"):
        load_model("my_own_net:build")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="failed with ModuleNotFoundError: No module named 'not_there_either'"):
        load_model("my_own_net:build")
    assert load_model("torch.nn:Linear?in_features=9&out_features=4").string == (
        "torch.nn:Linear?in_features=9&out_features=4"
    )


def test_the_example_model_of_pyautoattack_loads():
    examples = pytest.importorskip("pyautoattack.examples.resnet")
    weights = Path(examples.__file__).with_name("model_test.pt")
    model = load_model(f"pyautoattack.examples.resnet:ResNet18@{weights}")
    assert model.mean is None
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


# Libraries


def test_timm_models_load(monkeypatch):
    model = load_model("timm:test_resnet.r160_in1k?pretrained=false&num_classes=7")
    with torch.no_grad():
        assert model(torch.rand(2, 3, 33, 35)).shape == (2, 7)
    assert model.num_classes == 7
    assert model.mean is not None
    assert model.preprocess == Preprocess((160, 160), 168, "bilinear")
    with pytest.raises(UsageError, match="did you mean 'timm:resnet18'"):
        load_model("timm:resnet1888")
    with pytest.raises(UsageError, match=r"Did you mean 'test_resnet\.r160_in1k'"):
        load_model("timm:test_resnet.r160_in2k")
    with pytest.raises(UsageError, match="Did you mean 'num_classes'"):
        load_model("timm:test_resnet?num_clases=7")


def test_torchvision_models_load():
    model = load_model("torchvision:squeezenet1_1?pretrained=false&num_classes=7&size=40")
    with torch.no_grad():
        assert model(IMAGES).shape == (5, 7)
    assert model.num_classes == 7
    assert model.preprocess == Preprocess((40, 40), 40, "bilinear")
    with pytest.raises(UsageError, match="did you mean 'torchvision:resnet18'"):
        load_model("torchvision:resnet188")
    with pytest.raises(UsageError, match="have 1000 classes, not 7"):
        load_model("torchvision:squeezenet1_1?num_classes=7")


@pytest.mark.parametrize(
    ("adapter", "string"),
    [("network", "timm:test_resnet"), ("from_torchvision", "torchvision:squeezenet1_1")],
)
def test_weights_that_cannot_be_downloaded_are_one_sentence(adapter, string, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(f"robustkit.models.sources.{adapter}.reachable", lambda url: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"could not be downloaded.*pretrained=false") as caught:
        load_model(string)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_unreachable_address_is_one_sentence():
    assert not reachable("http://localhost:9/")


# Folders and devices


def test_folders_and_names_without_a_model_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no model\.json"):
        load_model(f"{tmp_path}/")
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(UsageError, match="has not ended: give the same 'robustkit train' command again"):
        load_model(f"{tmp_path}/#2")
    with pytest.raises(UsageError, match="write 'robustkit:digits-cnn'"):
        load_model("digits-cnn")
    with pytest.raises(UsageError, match="neither a folder nor KIND:NAME"):
        load_model("resnet50")


def test_models_load_onto_available_devices_only(monkeypatch):
    assert next(load_model(DIGITS, device="cpu").parameters()).device.type == "cpu"
    with pytest.raises(UsageError, match="device 'gpu' cannot be used here"):
        load_model(DIGITS, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device 'cuda' cannot be used here"):
            load_model(DIGITS, device="cuda")


def test_loading_does_not_change_the_file(tmp_path, state):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    model = load_model(f"{DIGITS}@{path}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert load_file(path)["conv1.weight"].any()
