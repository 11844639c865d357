"""Graphs of ONNX files as nets: converted to torch, or run by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robustkit.core.errors import UsageError, error_summary
from robustkit.models.sources.model_file import file_identity
from robustkit.models.sources.shaped_net import InputShape

# The opsets that onnx2torch knows best, tried after the file's own.
_OPSETS = (17, 13)
# Sides of the images on which a conversion is compared, where the file does not fix them.
_ANY_SIZE, _ANY_BATCH = 32, 2
# The largest difference of logits, as a share of the largest logit.
_MAX_DIFFERENCE = 1e-3
_TYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64}


class NamedOutputs(nn.Module):
    """A net whose several outputs have names."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        """Wrap a net."""
        super().__init__()
        self.net, self.names = net, tuple(names)

    def forward(self, images: torch.Tensor) -> object:
        """Return one output as it is, several in a dict."""
        outputs = self.net(images)
        return outputs if len(self.names) == 1 else dict(zip(self.names, outputs, strict=True))


class RuntimeNet(nn.Module):
    """An ONNX file run by onnxruntime on the CPU: no gradients."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """Open a session; `dtype` is that of the file's input."""
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.path, self.dtype = path, dtype
        self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input_name: str = self.session.get_inputs()[0].name

    def forward(self, images: torch.Tensor) -> object:
        """Return the outputs of images (B C H W) as tensors outside of autograd."""
        given = images.detach().to("cpu", self.dtype).contiguous().numpy()
        found = self.session.run(None, {self.input_name: given})
        tensors = [torch.from_numpy(np.asarray(one)).to(images.device) for one in found]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimeNet:
        """Return itself: it has no state that changes, and sessions cannot be copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Open another session where it is unpickled."""
        return type(self), (self.path, self.dtype)


def input_shape(graph: Any, path: Path) -> InputShape:
    """Return the shape of the images that a file takes.

    Raises:
        UsageError: It takes several inputs, or no images of floating-point numbers.
    """
    constants = {one.name for one in graph.graph.initializer}
    inputs = [one for one in graph.graph.input if one.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise UsageError(
            f"model file '{path}' takes {len(inputs)} inputs ({names:.100}): export a net that takes images alone."
        )
    kind = inputs[0].type.tensor_type
    if kind.elem_type not in _TYPES:
        raise UsageError(
            f"model file '{path}' takes whole numbers, not images on [0, 1]: export the part after the conversion "
            "to floating point."
        )
    return InputShape.read([side.dim_value or None for side in kind.shape.dim], path)


def output_names(graph: Any) -> list[str]:
    """Return the names of a file's outputs."""
    return [one.name for one in graph.graph.output]


def external_identity(path: Path) -> dict[str, object]:
    """Return the hashes of the files beside an ONNX file that hold its tensors."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    bare = _bare(path)
    files = sorted({ExternalDataInfo(one).location for one in bare.graph.initializer if uses_external_data(one)})
    return {"external": [file_identity(path.parent / name) for name in files]} if files else {}


def runtime_net(path: Path, reason: str) -> RuntimeNet:
    """Return the net of a file in onnxruntime.

    Raises:
        UsageError: onnxruntime is missing, or refuses the file.
    """
    start = f"model file '{path}' could not be converted to torch ({reason})"
    dtype = _TYPES[_bare(path).graph.input[0].type.tensor_type.elem_type]
    try:
        return RuntimeNet(path, dtype)
    except ImportError as error:
        raise UsageError(
            f"{start}, and onnxruntime is missing: pip install onnxruntime, which reads it."
        ) from error
    # onnxruntime has an exception for each of a dozen faults, with Exception as the only common class.
    except Exception as error:
        raise UsageError(
            f"{start}, and onnxruntime does not read it ({error_summary(error):.200}): export it again."
        ) from error


def converted(graph: Any, path: Path, shape: InputShape) -> tuple[nn.Module | None, str]:
    """Return the net that onnx2torch makes of a graph, or None and the reason why it cannot be used."""
    import onnx2torch
    from onnx import version_converter

    reason = ""
    for opset in (None, *_OPSETS):
        try:
            wanted = graph if opset is None else version_converter.convert_version(graph, opset)
            net: nn.Module = onnx2torch.convert(_without_zeros(wanted)).eval()
            return (net, "") if _agrees(net, path, shape) else (None, "its numbers are not onnxruntime's")
        # An operation that onnx2torch lacks is an error of any kind, and at any opset another one.
        except Exception as error:
            reason = reason or f"{error_summary(error):.120}"
    return None, reason


def _without_zeros(graph: Any) -> Any:
    """Return a graph without the mark that a 0 in a shape is a length, which onnx2torch refuses."""
    for node in graph.graph.node:
        kept = [one for one in node.attribute if not (node.op_type == "Reshape" and one.name == "allowzero")]
        if len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    return graph


def _agrees(net: nn.Module, path: Path, shape: InputShape) -> bool:
    """Return whether a converted net returns onnxruntime's numbers; True where that is not installed."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return True
    sides = (shape.batch or _ANY_BATCH, shape.channels or 3, shape.height or _ANY_SIZE, shape.width or _ANY_SIZE)
    images = torch.rand(sides, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(_listed(net(images)), _listed(runtime_net(path, "")(images)), strict=True)
        return all(
            one.shape == other.shape
            and float((one - other).abs().max()) <= _MAX_DIFFERENCE * max(float(other.abs().max()), 1.0)
            for one, other in pairs
        )


def _listed(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _bare(path: Path) -> Any:
    """Return the graph of a file without the tensors in other files."""
    import onnx

    return onnx.load(path, load_external_data=False)
