"""`robustkit diversity`: the members of an ensemble against each other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from robustkit.cli.inputs import Inputs
from robustkit.cli.output import save_page, wide_console
from robustkit.cli.progress import CraftDisplay
from robustkit.cli.streams import print_result
from robustkit.core.errors import UsageError
from robustkit.data.samples import Samples
from robustkit.diagnostics.ensemble_diversity import Comparison
from robustkit.models.allowed_paths import FLAG
from robustkit.reporting.html.diversity import FILE, page
from robustkit.reporting.terminal.diversity import show
from robustkit.runs.run_folder import read_diversity


def diversity(
    model: str,
    *,
    data: str | None,
    limit: int | None,
    threat: str | None,
    steps: int,
    restarts: int,
    images_of: Sequence[Path],
    seed: int,
    device: str,
    out: Path | None,
    overwrite: bool,
    data_root: Path | None,
    download: bool,
    trust_code: bool,
    as_json: bool,
) -> int:
    """Run the verb."""
    subject = Inputs.load(model, data, limit, threat, device, data_root, download, trust_code=trust_code)
    comparison = Comparison(
        model=subject.model,
        samples=subject.samples,
        threat=subject.threat,
        steps=steps,
        restarts=restarts,
        seed=seed,
        images=common(images_of, subject.samples),
        device=subject.device,
    )
    folder = out or Path("runs") / f"diversity-{comparison.spec.run_id}"
    record = comparison.run(folder, CraftDisplay(), overwrite)
    shown = save_page(folder / FILE, page(record).encode())
    if as_json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        words = ["evaluate", model, "--data", data or subject.samples.name, "--threat", str(record.spec.threat)]
        following = shlex.join(["robustkit", *words, *[FLAG] * trust_code])
        show(record, wide_console(), shown, following)
    return 0


def common(folders: Sequence[Path], samples: Samples) -> list[int] | None:
    """Return the positions that all these comparisons were on; None for no folder.

    Raises:
        UsageError: if one is of other data, or they share no image.
    """
    if not folders:
        return None
    records = [read_diversity(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        if record.spec.data["fingerprint"] != samples.fingerprint:
            raise UsageError(
                f"{folder} is of {record.spec.data['string']}, {record.spec.data['n']} images, not of these "
                f"{len(samples)} of {samples.name}; give the same --data and --limit."
            )
    shared = set.intersection(*(set(record.index) for record in records))
    if not shared:
        raise UsageError("the comparisons of --images-of have no image in common; look at more with --limit.")
    return sorted(shared)
