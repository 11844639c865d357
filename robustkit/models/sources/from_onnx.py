"""ONNX files: `FILE.onnx`, converted to torch by onnx2torch, else run by onnxruntime without gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from robustkit.core.errors import UsageError, error_summary
from robustkit.models.sources.built import GRADIENT, SCORES, Built
from robustkit.models.sources.model_file import file_identity, path_of
from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return the net of an ONNX file.

    It is converted to torch if onnx2torch can do so and the converted net returns onnxruntime's numbers; else
    onnxruntime runs it without gradients, and a note says why.

    Raises:
        UsageError: A library is missing, or the file is, or it is damaged, of another kind, or takes no images.
    """
    path = path_of(spec)
    try:
        import onnx
        import onnx2torch  # noqa: F401
    except ImportError as error:
        raise UsageError(f"model {str(spec)!r} needs onnx2torch: pip install onnx2torch onnxruntime.") from error
    from robustkit.models.sources import onnx_graph
    from robustkit.models.sources.shaped_net import ShapedNet

    try:
        graph = onnx.load(path)
    except Exception as error:
        raise UsageError(
            f"model file '{path}' is damaged or no ONNX file ({error_summary(error):.120}): save or download it "
            "again."
        ) from error
    shape, names = onnx_graph.input_shape(graph, path), onnx_graph.output_names(graph)
    net, reason = onnx_graph.converted(graph, path, shape)
    notes, access = shape.notes, GRADIENT
    if net is None:
        access = SCORES
        net = onnx_graph.runtime_net(path, reason)
        notes = (
            *notes,
            f"the file could not be converted to torch ({reason}), so it runs in onnxruntime, which returns "
            "scores and no gradients: only attacks that need no gradient are run on it",
        )
    return Built(
        net=ShapedNet(onnx_graph.NamedOutputs(net, names), shape, str(spec)),
        arch=f"{SOURCE.prefix}:{path}",
        identity={
            "arch": SOURCE.prefix,
            **file_identity(path),
            **onnx_graph.external_identity(path),
            "access": access,
        },
        in_channels=shape.channels,
        preprocess=shape.preprocess,
        batch=shape.batch,
        notes=notes,
        access=access,
    )


SOURCE = ModelSource(
    prefix="onnx",
    suffix=".onnx",
    help="an ONNX file, as FILE.onnx; without gradients if onnx2torch cannot convert it",
    build=build,
    fields=frozenset(),
    placeholder="FILE",
)
