"""Weight files as other programs write them: tensors are found at any key and no code runs."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import enum
import functools
import io
import json
import pathlib
import pickle
import re
import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustkit.core.errors import UsageError
from robustkit.models import load_model
from robustkit.models.fingerprint import state_sha256
from robustkit.models.weights.inert_pickle import InertPickle

DIGITS = "robustkit:digits-cnn"


@pytest.fixture
def state():
    return dict(load_model(f"{DIGITS}?pretrained=false", seed=3).net.state_dict())


@pytest.fixture
def other_state():
    return dict(load_model(f"{DIGITS}?pretrained=false", seed=4).net.state_dict())


@pytest.fixture
def fingerprints(tmp_path, state, other_state):
    """The fingerprints of the two nets above."""
    prints = []
    for number, tensors in enumerate((state, other_state)):
        save_file(tensors, tmp_path / f"plain{number}.safetensors")
        prints.append(load_model(f"{DIGITS}@{tmp_path}/plain{number}.safetensors").fingerprint)
    return prints


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


class Colour(enum.Enum):
    RED = 1


class Config(dict[str, Any]):
    """As EasyDict or yacs: a dict whose items are attributes, too."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__.update(items)


WRAPPINGS = {
    "net": lambda s: {"net": s, "acc": 95.1, "epoch": 3},
    "state_dict": lambda s: collections.OrderedDict(state_dict=collections.OrderedDict(s)),
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": torch.tensor(0.3)},
    "any name": lambda s: {"params": s},
    "deep": lambda s: {"checkpoint": {"model": {"weights": s}}},
    "list": lambda s: [s, {"epoch": 3}],
    "lightning": lambda s: {
        "state_dict": {**prefixed("model.", s), "criterion.weight": torch.ones(10)},
        "hyper_parameters": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
        "callbacks": collections.defaultdict(list, {"a": [1]}),
    },
    "madry": lambda s: {
        "model": {
            **prefixed("module.model.", s),
            **prefixed("module.attacker.model.", s),
            "module.normalizer.new_mean": torch.zeros(1, 1, 1),
            "module.normalizer.new_std": torch.ones(1, 1, 1),
        },
        "schedule": None,
    },
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled in parallel": lambda s: {"model": prefixed("_orig_mod.module.", s)},
    "a sharded part": lambda s: {name.replace(".", "._fsdp_wrapped_module.", 1): x for name, x in s.items()},
    "a checkpointed part": lambda s: {
        name.replace(".", "._checkpoint_wrapped_module.", 1): x for name, x in s.items()
    },
    "a parallel part": lambda s: {name.replace(".", ".module.", 1): tensor for name, tensor in s.items()},
    "any prefix": lambda s: prefixed("backbone.0.", s),
    "averaged": lambda s: {**prefixed("module.", s), "n_averaged": torch.tensor(7)},
    "a dict of its own class": lambda s: {"model": Config(**s), "cfg": Config(a=1, b=Config(c=2))},
    "parameters": lambda s: {name: nn.Parameter(tensor) for name, tensor in s.items()},
    "half": lambda s: {"model": s, "scaler": {"scale": 65536.0}},
}
BESIDE = {
    "numpy": [np.float64(0.5), np.arange(3), np.dtype("float32"), np.random.RandomState(0).get_state()],
    "namespace": argparse.Namespace(lr=0.1, inner=argparse.Namespace(x=[1])),
    "time": [datetime.datetime(2024, 1, 2), datetime.timedelta(seconds=3)],
    "path": pathlib.PurePosixPath("a/b"),
    "enum": {Colour.RED: Colour.RED},
    "torch": [torch.Size([3]), torch.device("cpu"), torch.float16, torch.Generator().get_state()],
    "containers": [collections.deque([1]), collections.Counter("ab"), {1, 2}, frozenset({3}), slice(1), range(3)],
    "objects": [functools.partial(dict, a=1), nn.CrossEntropyLoss(), ValueError("x"), Config(a=Config(b=1))],
}


def save(content, path, **options):
    torch.save(content, path, **options)
    return f"{DIGITS}@{path}"


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_tensors_are_found_at_any_key(tmp_path, state, fingerprints, wrapping):
    model = load_model(save(WRAPPINGS[wrapping](state), tmp_path / "w.pth.tar"))
    norm = {"madry": "?mean=0&std=1"}.get(wrapping, "")
    assert (model.fingerprint if not norm else model.weights_sha256) == (
        fingerprints[0] if not norm else load_model(f"{DIGITS}@{tmp_path}/plain0.safetensors").weights_sha256
    )


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize(
    "options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}], ids=["zip", "old", "4"]
)
def test_other_entries_do_not_matter(tmp_path, state, fingerprints, beside, options):
    optimiser = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    content = {"beside": BESIDE[beside], "net": state, "optimizer": optimiser.state_dict()}
    assert load_model(save(content, tmp_path / "w.ckpt", **options)).fingerprint == fingerprints[0]


def test_the_file_format_is_independent_of_its_name(tmp_path, state, fingerprints):
    for name in ("w.bin", "w", "w.safetensors", "w.pth"):
        assert load_model(save(state, tmp_path / name)).fingerprint == fingerprints[0]
    save_file(state, tmp_path / "w.pt")
    assert load_model(f"{DIGITS}@{tmp_path}/w.pt").fingerprint == fingerprints[0]


def test_unused_entries_are_reported(tmp_path, state):
    content = {"net": state, "args": argparse.Namespace(a=1), "n": np.float64(1), "colour": Colour.RED}
    (note,) = load_model(save(content, tmp_path / "w.pt")).notes
    assert "holds Python objects, which are not loaded" in note
    for name in ("argparse.Namespace", "numpy", f"{Colour.__module__}.Colour"):
        assert name in note


# Several sets


def test_a_moving_average_is_reported_and_can_be_chosen(tmp_path, state, other_state, fingerprints):
    for number, content in enumerate(
        (
            {"model": state, "model_ema": other_state},
            {"state_dict": state, "state_dict_ema": prefixed("module.", other_state)},
            {"net": state, "ema": {"shadow": other_state, "decay": 0.99}},
            {"state_dict": {**prefixed("model.", state), **prefixed("ema_model.", other_state)}},
        )
    ):
        string = save(content, tmp_path / f"{number}.pt")
        plain, average = load_model(string), load_model(f"{string}?weights=ema")
        assert [plain.fingerprint, average.fingerprint] == fingerprints
        assert any("moving average of the weights, too" in note and "weights=" in note for note in plain.notes)
        assert any("the weights are the moving average" in note for note in average.notes)
        assert load_model(average.string).fingerprint == average.fingerprint


def test_an_average_of_parameters_uses_the_statistics_of_the_net(tmp_path):
    net = load_model("robustkit:cifar-resnet20").net
    average = {name: 2 * parameter for name, parameter in net.named_parameters()}
    torch.save({"model": net.state_dict(), "ema": {"decay": 0.9, "shadow": average}}, tmp_path / "w.pt")
    found = load_model(f"robustkit:cifar-resnet20@{tmp_path}/w.pt?weights=ema").net.state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(found[name], average.get(name, tensor))


def test_an_unnamed_average_is_read_in_the_order_of_parameters(tmp_path):
    """As torch_ema and diffusers write it."""
    net = load_model("robustkit:cifar-resnet20?num_classes=7").net
    shadow = [2 * parameter for parameter in net.parameters()]
    torch.save({"model": net.state_dict(), "ema": {"shadow_params": shadow}}, tmp_path / "w.pt")
    model = load_model(f"robustkit:cifar-resnet20@{tmp_path}/w.pt?weights=ema")
    for (name, found), wanted in zip(model.net.named_parameters(), shadow, strict=True):
        torch.testing.assert_close(found, wanted, msg=name)
    torch.save({"model": net.state_dict(), "ema": {"shadow_params": shadow[1:]}}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="does not fit robustkit:cifar-resnet20: it lacks"):
        load_model(f"robustkit:cifar-resnet20@{tmp_path}/w.pt?weights=ema")


def test_heads_that_the_net_lacks_are_reported(tmp_path, state):
    with pytest.raises(UsageError, match=r"has 1 that it does not know .*leave these out of the file if they are"):
        load_model(save({**state, "rotation.weight": torch.ones(4, 3)}, tmp_path / "w.pt"))


def test_one_of_several_matching_entries_is_chosen(tmp_path, state, other_state, fingerprints):
    string = save({"generator": state, "classifier": other_state}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"several sets of tensors that fit \(classifier, generator\).*weights="):
        load_model(string)
    assert load_model(f"{string}?weights=classifier").fingerprint == fingerprints[1]
    with pytest.raises(UsageError, match="Did you mean 'classifier'"):
        load_model(f"{string}?weights=clasifier")
    with pytest.raises(UsageError, match=r"names no weights file in which weights=ema could choose.*@FILE"):
        load_model(f"{DIGITS}?weights=ema")


def test_equal_or_mismatched_entries_need_no_choice(tmp_path, state, fingerprints):
    same = copy.deepcopy(state)
    odd = {"conv1.weight": torch.ones(3, 3)}
    shapes = {name: torch.zeros(*tensor.shape, 2) for name, tensor in state.items()}
    content = {"net": state, "best": same, "discriminator": odd, "wider": shapes}
    assert load_model(save(content, tmp_path / "w.pt")).fingerprint == fingerprints[0]


# Normalisation and sizes


@pytest.mark.parametrize("scale", [1, 255])
def test_a_normalisation_layer_before_the_net_is_used(tmp_path, state, scale):
    content = {
        **prefixed("1.", state),
        "0.mean": torch.tensor([[[0.25 * scale]]]),
        "0.std": torch.tensor([0.5 * scale]),
    }
    string = save({"model": content}, tmp_path / "w.pt")
    model = load_model(string)
    assert (model.mean.item(), model.std.item()) == (0.25, 0.5)
    assert any("mean and std are those of '0.mean'" in note for note in model.notes)
    assert load_model(f"{string}?mean=0.75").mean.item() == 0.75


def test_the_last_layer_sets_the_number_of_classes(tmp_path):
    for arch in ("torchvision:squeezenet1_1", "timm:test_vit", "robustkit:wrn-10-1"):
        net = load_model(f"{arch}?pretrained=false&num_classes=7").net
        torch.save({"state_dict": prefixed("module.", net.state_dict())}, tmp_path / "w.pth.tar")
        model = load_model(f"{arch}@{tmp_path}/w.pth.tar")
        assert model.num_classes == 7
        assert model.fingerprint == load_model(f"{arch}@{tmp_path}/w.pth.tar?num_classes=7").fingerprint


def test_timm_converts_weights_published_by_authors(tmp_path):
    """ConvNeXt's own names, which timm's filter knows."""
    net = load_model("timm:convnext_atto?pretrained=false&num_classes=3").net
    published = {}
    for name, tensor in net.state_dict().items():
        for ours, theirs in (
            ("stem.", "downsample_layers.0."),
            ("head.norm.", "norm."),
            ("head.fc.", "head."),
            (".conv_dw.", ".dwconv."),
            (".mlp.fc", ".pwconv"),
        ):
            name = name.replace(ours, theirs)
        name = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        published[re.sub(r"stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", name)] = tensor
    torch.save({"model": published}, tmp_path / "w.pth")
    model = load_model(f"timm:convnext_atto@{tmp_path}/w.pth")
    assert model.num_classes == 3
    assert model.weights_sha256 == state_sha256(net)


# Shards


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_load_by_their_index(tmp_path, state, fingerprints, kind):
    names = list(state)
    places: dict[str, str] = {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-{number + 1:05d}-of-00002.{kind}"
        tensors = {name: state[name] for name in part}
        (save_file if kind == "safetensors" else torch.save)(tensors, tmp_path / file)
        places |= dict.fromkeys(part, file)
    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert load_model(f"{DIGITS}@{index}").fingerprint == fingerprints[0]
    with pytest.raises(UsageError, match=rf"lacks 5 of its 8 tensors.*write its index, 'model.{kind}.index.json'"):
        load_model(f"{DIGITS}@{tmp_path}/model-00001-of-00002.{kind}")
    with pytest.raises(
        UsageError, match=rf"is a folder: write the file in it, for example model.{kind}.index.json"
    ):
        load_model(f"{DIGITS}@{tmp_path}/")
    bad: Any
    for bad in (
        {**places, "x": "../up.safetensors"},
        {**places, "x": places["conv1.bias"]},
        {"x": "no.bin"},
        [],
        {},
    ):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(UsageError):
            load_model(f"{DIGITS}@{index}")


# What is refused


class Calls:
    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("new", [True, False])
def test_nothing_is_called_or_imported(tmp_path, state, fingerprints, protocol, new):
    marker = tmp_path / "marker"
    calls = [
        Calls(pathlib.Path.touch, marker),
        Calls(np.save, str(marker), 1),
        Calls(torch.save, 1, str(marker)),
        Calls(functools.partial, pathlib.Path.touch, marker),
        Calls(torch.hub.load, str(tmp_path), "x"),
    ]
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": new}
    string = save({"net": state, "calls": calls}, tmp_path / "w.pt", **options)
    model = load_model(string)
    assert model.fingerprint == fingerprints[0]
    assert "torch.serialization.save" in model.notes[0]
    assert {path.name for path in tmp_path.iterdir()} == {"w.pt", "plain0.safetensors", "plain1.safetensors"}


@pytest.mark.parametrize("function", [eval, exec, open, __import__, subprocess.Popen])
def test_dangerous_functions_are_refused(tmp_path, state, function):
    string = save({"net": state, "x": Calls(function, "x")}, tmp_path / "w.pt")
    with pytest.raises(
        UsageError, match=rf"Python object \w+\.{function.__name__} beside tensors.*could run code"
    ):
        load_model(string)


def test_real_classes_are_not_changed_and_tensors_not_called():
    """A file may say BUILD of a class, or REDUCE of a tensor or of a type that torch's loader puts in."""
    for body in (
        b"ctorch\nSize\n(N}X\x01\x00\x00\x00aK\x01stb.",
        b"ccollections\nOrderedDict\n(N}X\x01\x00\x00\x00aK\x01stb.",
    ):
        pickle_module = InertPickle()
        pickle_module.load(io.BytesIO(body))
        assert not hasattr(torch.Size, "a")
        assert not hasattr(collections.OrderedDict, "a")
    for body in (b"]K\x01\x85R.", b"ccollections\nOrderedDict\n)R)R.", b"ctorch\nfloat32\n)R.", b"\x82\x01."):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            InertPickle().load(io.BytesIO(body))


def test_whole_modules_are_refused(tmp_path):
    net = load_model(DIGITS).net
    for content, where in ((net, ""), ({"model": net, "ema": None}, " under 'model'")):
        for new in (True, False):
            string = save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
            with pytest.raises(
                UsageError, match=rf"a whole module of class robustkit\S+DigitsCNN{where}, .*state_dict"
            ):
                load_model(string)


def test_tensors_larger_than_the_file_are_refused(tmp_path, state):
    huge = torch.zeros(1).expand(10**9, 64)
    with pytest.raises(UsageError, match="truncated or damaged"):
        load_model(save({**state, "linear.weight": huge}, tmp_path / "w.pt"))


def test_files_of_other_formats_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    for content, sentence in (
        (b"\x1f\x8b\x08\x00 and so on and on", "compressed by gzip: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS: fetch the file"),
        (pickle.dumps({"w": 1}, 4), "is a pickle that torch.save did not write"),
        (b"<!DOCTYPE html><html>", "neither a safetensors file nor one that torch.save wrote"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=sentence):
            load_model(f"{DIGITS}@{path}")
    np.savez(tmp_path / "w.npz", w=np.ones(3))
    with pytest.raises(UsageError, match=r"neither a safetensors file nor one that torch\.save wrote"):
        load_model(f"{DIGITS}@{tmp_path}/w.npz")


def test_numpy_arrays_are_named_in_the_error(tmp_path, state):
    for content in ({"w": state["conv1.weight"].numpy()}, {"net": {k: v.numpy() for k, v in state.items()}}):
        with pytest.raises(
            UsageError, match=r"holds arrays of numpy.*save them by torch\.save\(\{name: torch\.as"
        ):
            load_model(save(content, tmp_path / "w.pt"))
