"""Files that `torch.jit.save` wrote: `torchscript:FILE`. Loading them runs the code in them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from robustkit.core.errors import UsageError, error_summary
from robustkit.models.sources.built import Built
from robustkit.models.sources.model_file import file_identity, path_of
from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return the module of a TorchScript file.

    Raises:
        UsageError: The file is missing or no TorchScript.
    """
    import torch

    path = path_of(spec)
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            # torch.jit is deprecated in recent versions of torch.
            warnings.simplefilter("ignore")
            net = torch.jit.load(stream, map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:
        raise UsageError(
            f"model file '{path}' is no TorchScript that torch {torch.__version__} reads "
            f"({error_summary(error):.200}): write a file that torch.jit.save wrote, or weights as "
            f"ARCH@{path.name}."
        ) from error
    return Built(
        net=net,
        arch=f"{SOURCE.prefix}:{path}",
        identity={"arch": SOURCE.prefix, **file_identity(path)},
    )


SOURCE = ModelSource(
    prefix="torchscript",
    suffix=".torchscript",
    help="a net that torch.jit.save wrote; it is code, which is run",
    build=build,
    fields=frozenset(),
    runs_code=True,
    placeholder="FILE",
)
