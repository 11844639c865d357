"""Which strings run Python code, which objects may build a net, and which sizes a string may set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import facts, net, write_members, write_single
from teams import ThreadPool

from robustkit import load_model
from robustkit.core.errors import UsageError
from robustkit.distributed.sent_models import SentModel
from robustkit.models.allowed_paths import recorded_model
from robustkit.models.randomness import Noise
from robustkit.models.recorded_data import recorded_data
from robustkit.models.strings import ModelString
from robustkit.runs import run_folder
from robustkit.training.nets import net_of

LINEAR = "torch.nn:Linear?in_features=9&out_features=4"
CODE = """
import functools
import os
import subprocess
from pathlib import Path

import joblib
import numpy
import torch
from torchvision.models import resnet18

Path(__file__).with_name("ran").touch()


class Plain:
    pass


class Net(torch.nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.linear = torch.nn.Linear(9, num_classes)

    def forward(self, x):
        return self.linear(x.flatten(1))


@functools.lru_cache
def build():
    return Net()


def number():
    return 3


system, run, load, npload, hub, jobload = (
    os.system, subprocess.run, torch.load, numpy.load, torch.hub.load, joblib.load
)
part, evil = functools.partial(Net, 5), functools.partial(os.system, "touch ran")
made = Net()
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "net.py"
    path.parent.mkdir()
    path.write_text(CODE)
    return path


def received(place: Path, arch: str, members: int = 1) -> str:
    """A run folder whose record names this architecture, with the weights of an honest one."""
    if members > 1:
        return write_members(place, [net(seed) for seed in range(members)], arch=arch)
    return write_single(place, net(), arch=arch)


@pytest.mark.parametrize(
    "form",
    ["{a}", "{a}#0", "{several}", "{several}#1", "{a}?mean=0.5", "ensemble:[robustkit:digits-cnn;{a}]"],
)
@pytest.mark.parametrize("arch", ["{code}:build", "os:system?command=touch {ran}", "builtins:exec?source=1"])
def test_loading_a_record_runs_no_code(form: str, arch: str, code: Path, tmp_path: Path) -> None:
    arch = arch.format(code=code, ran=code.parent / "ran")
    names = {
        "a": received(tmp_path / "a", arch),
        "several": received(tmp_path / "several", f"ensemble:[robustkit:digits-cnn?num_classes=4;{arch}]", 2),
    }
    with pytest.raises(UsageError, match=r"model\.json names Python code, .* give --trust-code") as caught:
        load_model(form.format(**names))
    assert "\n" not in str(caught.value)
    assert not (code.parent / "ran").exists()


def test_code_of_a_trusted_record_runs(code: Path, tmp_path: Path) -> None:
    typed = load_model(f"{code}:build")
    string = write_single(tmp_path / "a", net_of(typed), arch=f"{code}:build")
    model = load_model(string, trust_code=True)
    x = torch.rand(2, 1, 3, 3)
    assert torch.equal(model(x), typed(x))
    joined = load_model(f"ensemble:[{string};{code}:build]", trust_code=True)
    pool = ThreadPool(1)
    # Workers have the driver's leave, no more and no less; so has a copy of the model.
    for one in (model, joined, model.with_net(net_of(typed))):
        assert one.trust_code
        assert SentModel.of(pool, one).load(torch.device("cpu")).trust_code
    with pytest.raises(UsageError, match="--trust-code"):
        replace(SentModel.of(pool, model), trust_code=False).load(torch.device("cpu"))
    assert not SentModel.of(pool, typed).trust_code
    pool.close()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "os:system",
            "builtins:exec",
            "builtins:eval",
            "subprocess:Popen",
            "subprocess:run",
            "functools:partial",
        ),
        *("torch:load", "torch.hub:load", "torch.jit:load", "numpy:load", "joblib:load", "pickle:loads"),
        *("shutil:rmtree", "runpy:run_path", "importlib:import_module", "ctypes:CDLL", "PIL.Image:open"),
        *("robustkit.cli:run", "robustkit.models:load_model", "sys:exit", "os:_exit", "webbrowser:open"),
    ],
)
def test_objects_that_are_no_factory_are_not_called(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"neither a torch\.nn\.Module class nor a function of yours .* not called"
    ):
        load_model(f"{name}?command=exit&f=x&path=/tmp/none")


@pytest.mark.slow
def test_names_imported_by_a_file_are_no_factories(code: Path) -> None:
    for name in ("system", "run", "load", "npload", "hub", "jobload", "evil", "Plain", "made", "Path"):
        with pytest.raises(UsageError, match="not called"):
            load_model(f"{code}:{name}")
    for name in ("build", "Net", "part", "Net?num_classes=7"):
        assert isinstance(load_model(f"{code}:{name}").net, torch.nn.Module)
    assert isinstance(load_model(f"{code}:resnet18?num_classes=3").net, torch.nn.Module)
    with pytest.raises(UsageError, match="returned an object of type int"):
        load_model(f"{code}:number")
    assert load_model(LINEAR).num_classes is None


@pytest.mark.parametrize(
    ("string", "near"),
    [
        ("huggingface:microsoft/resnet-18", "timm:resnet18"),
        ("hub:timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k"),
        ("tim:resnet18", "timm:resnet18"),
        ("TIMM:resnet18", "timm:resnet18"),
        ("robstkit:wrn-28-10", "robustkit:wrn-28-10"),
        ("clip_not_here:RN50", None),
        ("s3://bucket/net@w.pt", None),
        ("torch.hub:pytorch/vision", None),
        ("a b:c", None),
    ],
)
def test_unknown_kinds_are_refused(string: str, near: str | None) -> None:
    with pytest.raises(UsageError, match="there is no kind of model") as caught:
        load_model(string)
    message = str(caught.value)
    assert "install" not in message
    assert "ensemble:[A;B]" in message
    assert ("did you mean" in message) == (near is not None)
    assert near is None or f"did you mean '{near}'" in message


@pytest.mark.parametrize("name", ["hf_hub:x/y", "local-dir:/none", "resnet18@x:y"])
def test_only_timms_own_nets_are_built(name: str) -> None:
    with pytest.raises(UsageError, match=r"timm has no model|weights file|no config.json of timm"):
        load_model(f"timm:{name}")


DEEP = "ensemble:[" * 9 + "robustkit:digits-cnn;robustkit:digits-cnn" + "]" * 9


@pytest.mark.parametrize(
    ("string", "limit"),
    [
        ("robustkit:wrn-999999999994-1", "1,000 layers"),
        ("robustkit:wrn-10-99999", "1,000,000,000 parameters"),
        (f"robustkit:wrn-{'9' * 5000}-1", "1,000 layers"),
        ("robustkit:wrn-28-600", "1,000,000,000 parameters"),
        ("robustkit:digits-cnn?num_classes=100001", "at most 100,000"),
        (f"robustkit:digits-cnn?num_classes={'9' * 5000}", "at most 100,000"),
        ("robustkit:digits-cnn?in_channels=999999999", "at most 4,096"),
        ("robustkit:digits-cnn?size=999999999", "from 1 to 4,096"),
        ("robustkit:digits-cnn?size=8,4097", "from 1 to 4,096"),
        ("torchvision:resnet18?pretrained=false&num_classes=99999999999", "at most 100,000"),
        ("timm:resnet18?pretrained=false&num_classes=99999999999", "at most 100,000"),
        (f"robustkit:digits-cnn?defense={'+'.join(['jpeg'] * 9)}", "at most 8"),
        (f"ensemble:[{';'.join(['robustkit:digits-cnn'] * 1001)}]", "at most 1,000"),
        (DEEP, "more than 8 brackets"),
        (f"robustkit:digits-cnn@{'w' * 100_000}", "at most 100,000"),
        ("ensemble:[robustkit:digits-cnn;robustkit:digits-cnn]?combine=crossmax:" + "9" * 5000, "2 to 9999"),
    ],
)
def test_sizes_are_checked_before_anything_is_allocated(string: str, limit: str) -> None:
    with pytest.raises(UsageError, match=limit) as caught:
        load_model(string)
    assert len(str(caught.value)) < 400


def test_the_largest_nets_of_the_literature_are_within_the_limits() -> None:
    from robustkit.models.zoo.catalog import lookup

    for name in ("wrn-28-10", "wrn-94-16", "wrn-106-16", "wrn-70-16", "wrn-010-01"):
        assert lookup(name)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"members": 10**12}, "members is 1000000000000 but must be from 1 to 1000"),
        ({"members": 0}, "members is 0 but must be from 1"),
        ({"classes": 10**12}, "classes is 1000000000000 but must be from 2 to 100000"),
        ({"input": [3, 10**9, 8], "method": {"name": "multires"}}, "height and a width of at most 4,096 pixels"),
        ({"input": [10**9, 8, 8]}, "must be at most 4,096 channels"),
        ({"input": "abc"}, 'input is "abc" but must be a list'),
        ({"input": [3, 8, 8, 10**12]}, "must be at most 4,096 channels"),
        ({"arch": "nothing-here:resnet-18"}, "which is no net's"),
    ],
)
def test_sizes_in_a_record_are_checked(words: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    string = write_single(tmp_path / "a", net())
    (tmp_path / "a" / "model.json").write_text(json.dumps(facts(**words)))
    with pytest.raises(UsageError, match=sentence):
        load_model(string)


def test_ranges_of_many_numbers_are_refused_quickly(tmp_path: Path) -> None:
    string = write_members(tmp_path / "a", [net(0), net(1)])
    with pytest.raises(UsageError, match="names number 2 but 2 members"):
        load_model(f"{string}#0-99999")
    with pytest.raises(UsageError, match="at most 100,000 nets"):
        load_model(f"{string}#" + "+".join(["0-99999"] * 10_000))
    with pytest.raises(UsageError, match=r"a seed is a whole number below 10\^18"):
        Noise.parse("frozen:" + "9" * 5000)


RECORD = "runs/x/report.json"


@pytest.mark.parametrize(
    "string",
    [
        r"robustkit:digits-cnn@\\host\share\w.pt",
        "robustkit:digits-cnn@//host/share/w.pt",
        "robustkit:digits-cnn@../../w.pt",
        "robustkit:digits-cnn@https://example.org/w.pt",
        "timm:resnet18@/proc/self/environ.pt",
        "//host/share/run/#2",
        "ensemble:[robustkit:digits-cnn;robustkit:digits-cnn@~/w.pt]",
    ],
)
def test_unsafe_model_paths_in_a_record_are_refused(string: str) -> None:
    with pytest.raises(
        UsageError, match="not the absolute path of a file on a disk of this machine: give --model"
    ):
        recorded_model(string, RECORD, False)


@pytest.mark.parametrize(
    "string",
    [
        "folder://host/share",
        "folder:/",
        "folder:~",
        "webdataset:pipe:ls",
        "/dev/x.npz",
        "../x.npz",
        "folder:",
        "folder:/d/a?classes=//host/names.txt",
        "folder:/d/a\0",
        "folder:/tmp/../proc",
        "folder:/tmp/..",
        "folder:/tmp/a?/../../proc",
        "/tmp/../dev/zero.npz",
        "digits:test?classes=names.txt",
        "digits:test?classes=~/.netrc",
    ],
)
def test_unsafe_data_strings_in_a_record_are_refused(string: str) -> None:
    with pytest.raises(UsageError, match="give --data"):
        recorded_data(string, RECORD)


def test_ordinary_strings_in_a_record_are_accepted() -> None:
    for string in (
        "robustkit:digits-cnn@/home/me/a/../w.pt",
        "timm:resnet50",
        "/home/me/runs/a/#2",
        "torchvision:vgg11",
    ):
        assert recorded_model(string, RECORD, False) == string
    assert recorded_model("./net.py:build", RECORD, True)
    for string in (
        "digits:test",
        "cifar10:test",
        "folder:/data/val",
        "webdataset:/d/{000..049}.tar",
        "/d/x.npz?layout=NCHW",
        "folder:/dev/shm/val",
        "folder:/d/val?classes=/d/names.txt",
        "digits:test?classes=zero,one,two",
    ):
        assert recorded_data(string, RECORD) == string


def test_kinds_are_recognised_by_their_prefix() -> None:
    assert ModelString.parse("timm:hf-hub:a/b").kind == "source"
    assert ModelString.parse("C:/a/net.py:build").kind == "file"
    assert ModelString.parse("a.b:c").kind == "module"
    assert ModelString.parse("a/net.onnx").kind == ModelString.parse("onnx:net.onnx").kind == "source"
    assert ModelString.parse("a.b-c:net").kind == "unknown"


def test_files_named_by_a_report_are_files_of_the_run(tmp_path: Path) -> None:
    files = {"../secret": "0" * 64, "/etc/passwd": "0" * 64, "ledger.sqlite": "0" * 64}
    (tmp_path / "secret").touch()
    place = tmp_path / "run"
    place.mkdir()
    (place / "ledger.sqlite").symlink_to(tmp_path / "secret")
    found = run_folder.broken_seals(place, SimpleNamespace(files=files))  # type: ignore[arg-type]
    assert ["no file of a run" in sentence for sentence in found] == [True, True, False]
    assert "is a link" in found[2]
    assert not any("sha256" in sentence for sentence in found)
