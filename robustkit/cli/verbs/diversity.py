"""`robustkit diversity`: from flags to objects, the comparison, its tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from robustkit.api.diversity import comparison
from robustkit.api.options.craft import DiversityFlags
from robustkit.cli.inputs import Inputs
from robustkit.cli.output import save_page, wide_console
from robustkit.cli.progress import CraftDisplay
from robustkit.cli.streams import print_result
from robustkit.core.errors import UsageError
from robustkit.data.samples import Samples
from robustkit.models.allowed_paths import FLAG
from robustkit.reporting.html.diversity import FILE, page
from robustkit.reporting.terminal.diversity import show
from robustkit.runs.run_folder import read_diversity


def diversity(flags: DiversityFlags) -> int:
    """Run the verb."""
    inputs = Inputs.load(flags, flags.model)
    positions = common_positions(flags.images_of, inputs.samples)
    request = comparison(flags, inputs.model, inputs.samples, inputs.threat, inputs.device, positions)
    folder = Path(flags.out or f"runs/diversity-{request.spec.run_id}")
    record = request.run(folder, CraftDisplay(), flags.overwrite)
    shown = save_page(folder / FILE, page(record).encode())
    if flags.json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        data, threat = flags.data or inputs.samples.name, str(record.spec.threat)
        words = ["evaluate", flags.model, "--data", data, "--threat", threat, *[FLAG] * flags.trust_code]
        show(record, wide_console(), shown, shlex.join(["robustkit", *words]))
    return 0


def common_positions(folders: Sequence[Path], samples: Samples) -> list[int] | None:
    """Return the positions of the images that all these comparisons used; None for no folder.

    Raises:
        UsageError: one used other data, or they have no image in common.
    """
    if not folders:
        return None
    records = [read_diversity(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        if record.spec.data["fingerprint"] != samples.fingerprint:
            raise UsageError(
                f"{folder} is on {record.spec.data['string']}, {record.spec.data['n']} images, not on these "
                f"{len(samples)} of {samples.name}; use the same --data and --limit."
            )
    shared = set.intersection(*(set(record.index) for record in records))
    if not shared:
        raise UsageError("the comparisons of --images-of have no image in common; use more images with --limit.")
    return sorted(shared)
