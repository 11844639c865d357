"""Nets of RobustBench's zoo: of a small package of the same form, and one of the real zoo if it is installed."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch

from robustkit.core.errors import UsageError
from robustkit.models import load_model

ZOO = {
    "__init__.py": """
        import pkg_resources
        from autoattack import AutoAttack
        from autoattack.state import EvaluationState
    """,
    "model_zoo/__init__.py": "",
    "model_zoo/enums.py": """
        from enum import Enum

        class BenchmarkDataset(Enum):
            cifar_10 = "cifar10"
            imagenet = "imagenet"

        class ThreatModel(Enum):
            Linf = "Linf"
            L2 = "L2"
    """,
    "model_zoo/models.py": """
        import torch
        from torch import nn
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

        class Normalised(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
                self.model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

            def forward(self, x):
                return self.model(x - self.mean)

        entry = {"model": Normalised, "gdrive_id": "x", "preprocessing": "BicubicRes256Crop224"}
        model_dicts = {BenchmarkDataset.cifar_10: {ThreatModel.Linf: {"Own2020Net": entry}}}
    """,
}


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Install a package of robustbench's form."""
    for name, text in ZOO.items():
        path = tmp_path / "site" / "robustbench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr("robustkit.models.sources.from_robustbench.reachable", lambda url: False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "robustbench"}
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "robustbench"]:
        del sys.modules[name]


def test_a_checkpoint_is_put_into_a_net_of_the_zoo_and_its_published_accuracy_noted(zoo):
    torch.manual_seed(0)
    weight, bias = torch.randn(10, 3, 3, 3), torch.randn(10)
    torch.save({"state_dict": {"module.0.weight": weight, "module.0.bias": bias}}, zoo / "w.pt")
    published = {"clean_acc": "89.69", "autoattack_acc": "59.53", "eps": "8/255"}
    (zoo / "Own2020Net.json").write_text(json.dumps(published))
    before = {name for name in ("pkg_resources", "autoattack", "autoattack.state") if name in sys.modules}
    model = load_model(f"robustbench:Own2020Net@{zoo}/w.pt?threat=Linf&dataset=cifar10")
    images = torch.rand(5, 3, 7, 9)
    wanted = torch.nn.functional.conv2d(images - 0.5, weight, bias).mean((2, 3))
    torch.testing.assert_close(model(images), wanted)
    assert "89.69 % clean accuracy, 59.53 % robust accuracy" in model.notes[0]
    assert (model.num_classes, model.preprocess.size, model.preprocess.resize) == (10, (224, 224), 256)
    assert {name for name in ("pkg_resources", "autoattack", "autoattack.state") if name in sys.modules} == before
    assert load_model(model.string).fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("string", "sentence"),
    [
        ("robustbench:Own2020Nat", "did you mean 'Own2020Net'"),
        ("robustbench:Own2020Net?threat=L3", "no threat 'L3'"),
        ("robustbench:Own2020Net?norm=Linf", "field of robustbench models"),
        ("robustbench:Own2020Net", "could not be downloaded or read: give a file as robustbench:Own2020Net@FILE"),
    ],
)
def test_an_impossible_string_is_refused(zoo, string, sentence):
    if string == "robustbench:Own2020Net":
        (zoo / "site" / "robustbench" / "utils.py").write_text("def load_model(*args, **kwargs): raise OSError")
    with pytest.raises(UsageError, match=sentence):
        load_model(string)


def test_published_accuracy_that_cannot_be_fetched_is_said(zoo):
    assert (
        "could not be fetched: put Own2020Net.json into"
        in load_model("robustbench:Own2020Net?pretrained=false").notes[0]
    )


def test_missing_robustbench_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(UsageError, match="pip install robustbench"):
        load_model("robustbench:Standard")


def test_a_net_of_the_real_zoo_takes_its_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("gdown")
    monkeypatch.setattr("robustkit.models.sources.from_robustbench.reachable", lambda url: False)
    string = "robustbench:Wong2020Fast?pretrained=false"
    net = load_model(string, seed=1).net
    state = {f"module.{name}": value for name, value in net.state_dict().items() if name not in ("mu", "sigma")}
    torch.save(state, tmp_path / "w.pt")
    images = torch.rand(2, 3, 32, 32)
    found = load_model(f"robustbench:Wong2020Fast@{tmp_path}/w.pt")(images)
    torch.testing.assert_close(found, net(images))
