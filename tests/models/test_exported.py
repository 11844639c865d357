"""One net through every kind of file that holds a whole model: equal numbers, and a sentence for each fault."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile

import pytest
import torch
from torch import nn

from robustkit import evaluate
from robustkit.core.errors import UsageError
from robustkit.models import load_model
from robustkit.models.allowed_paths import names_code

CLASSES = 4
SHAPE = (3, 7, 9)


def net_of(channels):
    torch.manual_seed(channels)
    features = nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5))
    net = nn.Sequential(features, nn.AvgPool2d((3, 5), (2, 4)), nn.Flatten(), nn.Linear(30, CLASSES))
    net[0][1].running_mean.normal_()
    return net.eval()


def export_pt2(net, images, path, dynamic=True):
    batch = {0: torch.export.Dim("batch")} if dynamic else None
    program = torch.export.export(net, (images,), dynamic_shapes=(batch,))
    torch.export.save(program, path)


def export_fixed_pt2(net, images, path):
    export_pt2(net, images, path, dynamic=False)


def export_torchscript(net, images, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, images), str(path))


def export_onnx(net, images, path):
    """Write an ONNX file operation by operation, as torch's exporter of today takes 10 seconds."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx2torch")
    conv, norm = net[0][0], net[0][1]
    tensors = {
        "weight": conv.weight,
        "bias": conv.bias,
        "scale": norm.weight,
        "shift": norm.bias,
        "mean": norm.running_mean,
        "var": norm.running_var,
        "matrix": net[3].weight,
        "offset": net[3].bias,
        "shape": torch.tensor([0, -1]),
    }
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["images", "weight", "bias"], ["conv"], pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["conv", "scale", "shift", "mean", "var"], ["norm"]),
        make("Relu", ["norm"], ["relu"]),
        make("AveragePool", ["relu"], ["pool"], kernel_shape=[3, 5], strides=[2, 4]),
        make("Reshape", ["pool", "shape"], ["flat"]),
        make("Gemm", ["flat", "matrix", "offset"], ["logits"], transB=1),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [onnx.helper.make_tensor_value_info("images", kind, ["batch", *images.shape[1:]])],
        [onnx.helper.make_tensor_value_info("logits", kind, ["batch", CLASSES])],
        [onnx.numpy_helper.from_array(value.detach().numpy(), name) for name, value in tensors.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)


WRITERS = {
    "pt2": (export_pt2, "{}.pt2"),
    "pt2-fixed": (export_fixed_pt2, "{}.pt2"),
    "onnx": (export_onnx, "{}.onnx"),
    "torchscript": (export_torchscript, "torchscript:{}.pt"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("a folder@home")


@pytest.fixture(scope="module")
def exported(folder):
    """Return the net and the model string of a kind of file, which is written once."""
    written = {}

    def write(kind, channels):
        if (kind, channels) not in written:
            writer, form = WRITERS[kind]
            net, name = net_of(channels), f"{kind} {channels}"
            string = form.format(folder / name)
            writer(net, torch.rand(2, channels, *SHAPE[1:]), folder / string.rpartition("/")[2])
            written[kind, channels] = net, string
        return written[kind, channels]

    return write


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_logits_and_gradients_of_the_net(exported, kind, channels):
    net, string = exported(kind, channels)
    model = load_model(string)
    images = torch.rand(5, channels, *SHAPE[1:], requires_grad=True)
    logits = model(images)
    torch.testing.assert_close(logits, net(images))
    gradients = [torch.autograd.grad(value[:, 1].sum(), images)[0] for value in (logits, net(images))]
    torch.testing.assert_close(*gradients)
    again = load_model(model.string, trust_code=True)
    assert again.string == model.string
    assert again.fingerprint == model.fingerprint


def test_normalisation_and_size_are_applied_before_an_exported_net(exported):
    net, string = exported("pt2", 3)
    images = torch.rand(5, 3, 14, 18)
    small = nn.functional.interpolate(images, SHAPE[1:], mode="bilinear", antialias=True)
    logits = load_model(f"{string}?mean=0.5&std=0.25&size=7,9")(images)
    torch.testing.assert_close(logits, net((small - 0.5) / 0.25))


def test_a_fixed_batch_is_noted(exported):
    assert load_model(exported("pt2", 3)[1]).notes == ()
    assert "for 2 images in each pass" in load_model(exported("pt2-fixed", 3)[1]).notes[0]


def test_a_dict_of_outputs_keeps_its_keys(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, CLASSES)

        def forward(self, x):
            with torch.no_grad():
                features = x.mean((2, 3)) + torch.arange(x.shape[1], device=x.device)
            return {"features": features, "logits": self.linear(features)}

    net, path = Both(), tmp_path / "net.pt2"
    export_pt2(net, torch.rand(2, *SHAPE), path)
    images = torch.rand(5, *SHAPE)
    torch.testing.assert_close(load_model(str(path))(images), net(images)["logits"])


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((1, 7, 9), r"exported for images of shape \(3, 7, 9\), not \(1, 7, 9\): give it images of 3 channels"),
        ((3, 8, 9), "write size=7,9 in its string"),
    ],
)
def test_images_of_another_shape_are_refused(exported, shape, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_model(exported("pt2", 3)[1])(torch.rand(5, *shape))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("{}/none.pt2", None, r"there is no model file '.*none.pt2': check the path"),
        ("{}/.pt2", "", "is empty"),
        ("{}/text.pt2", "text", "damaged or no archive of torch.export"),
        ("torchscript:{}/text.pt", "text", "is no TorchScript"),
        ("{}/text.pt", "text", "or 'torchscript:.*' if it is TorchScript, which is code"),
        ("pt2:{}", None, "is a folder"),
        ("{}/net.pt2?num_classes=3", "x", "field of pt2 models"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path, name, content, sentence):
    string = name.format(tmp_path)
    if content is not None:
        (tmp_path / string.partition("?")[0].rpartition("/")[2]).write_text(content)
    with pytest.raises(UsageError, match=sentence):
        load_model(string)


def rewritten(source, target, change):
    """Copy an archive with a change of its graph."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("models/model.json"):
                body = json.loads(content)
                change(body["graph_module"]["graph"]["nodes"])
                content = json.dumps(body).encode()
            new.writestr(name, content)


def arguments_of(nodes, operation):
    node = next(node for node in nodes if operation in node["target"])
    return {one["name"]: one["arg"] for one in node["inputs"]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda nodes: nodes[0].update(target="torch.hub.load"),
            "operation 'torch.hub.load', which robustkit does",
        ),
        (lambda nodes: nodes[0].update(target="torch.ops.aten.save.default"), "aten.save"),
        (lambda nodes: nodes[0].update(target="torch.ops.aten.__class__.mro"), "__class__"),
        (lambda nodes: arguments_of(nodes, "batch_norm")["training"].update(as_bool=True), "in training mode"),
    ],
)
def test_a_graph_with_another_operation_than_arithmetic_is_refused(exported, tmp_path, change, sentence):
    path = tmp_path / "changed.pt2"
    rewritten(exported("pt2", 3)[1], path, change)
    with pytest.raises(UsageError, match=sentence):
        load_model(str(path))


def test_only_torchscript_is_code(exported):
    assert names_code(exported("torchscript", 3)[1])
    assert not names_code(exported("pt2", 3)[1])


@pytest.fixture
def without_conversion(exported, monkeypatch):
    """Return an ONNX model that onnx2torch refuses."""
    string = exported("onnx", 3)[1]
    pytest.importorskip("onnxruntime")

    def refuse(graph):
        raise NotImplementedError("no converter of Relu")

    monkeypatch.setattr("onnx2torch.convert", refuse)
    return load_model(string)


def test_a_file_that_is_not_converted_gives_scores_only(exported, without_conversion):
    images = torch.rand(5, *SHAPE, requires_grad=True)
    logits = without_conversion(images)
    torch.testing.assert_close(logits, exported("onnx", 3)[0](images).detach())
    assert not logits.requires_grad
    assert without_conversion.access == "scores"
    assert "no converter of Relu), so it runs in onnxruntime" in without_conversion.notes[0]


def test_a_model_of_scores_gets_the_attacks_of_a_suite_that_need_no_gradient(without_conversion):
    images = torch.rand(4, *SHAPE)
    labels = without_conversion(images).argmax(1)
    report = evaluate(without_conversion, images, labels, "linf:0.2", suite="rapid")
    assert [stage.attack for stage in report.stages] == ["clean", "square"]
    assert any("onnxruntime" in note for note in report.environment["model_notes"])
    with pytest.raises(UsageError, match="pgd needs gradients, and this model returns scores only; write square"):
        evaluate(without_conversion, images, labels, "linf:0.2", suite="pgd(steps=3)")


def test_a_missing_library_is_named(exported, monkeypatch, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_text("x")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match="needs onnx2torch: pip install onnx2torch onnxruntime"):
        load_model(str(path))
