"""Files that `torch.export.save` wrote: `FILE.pt2`. Their graph is interpreted; no code in them is executed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from robustkit.models.sources.built import Built
from robustkit.models.sources.model_file import file_identity, path_of
from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return the net of an exported program.

    Raises:
        UsageError: The file is missing, damaged or of another kind, or its graph has an operation that is not
            executed.
    """
    from robustkit.models.sources.pt2_archive import read_pt2
    from robustkit.models.sources.pt2_graph import GraphNet
    from robustkit.models.sources.shaped_net import ShapedNet

    path = path_of(spec)
    program = read_pt2(path)
    return Built(
        net=ShapedNet(GraphNet(program), program.shape, str(spec)),
        arch=f"{SOURCE.prefix}:{path}",
        identity={"arch": SOURCE.prefix, **file_identity(path)},
        in_channels=program.shape.channels,
        preprocess=program.shape.preprocess,
        batch=program.shape.batch,
        notes=program.shape.notes,
    )


SOURCE = ModelSource(
    prefix="pt2",
    suffix=".pt2",
    help="a net that torch.export.save wrote, as FILE.pt2; no code is executed",
    build=build,
    fields=frozenset(),
    placeholder="FILE",
)
