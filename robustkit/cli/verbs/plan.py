"""`robustkit plan`: a look at what an evaluation will take, before it is run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from robustkit.cli.inputs import Inputs
from robustkit.cli.output import result_console
from robustkit.cli.progress import Display
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.evaluate import read_batch_size
from robustkit.engine.allocation.rounds import read_strictness
from robustkit.engine.planning.cost_probe import CostProbe
from robustkit.engine.planning.forecast import forecast_cost as measure
from robustkit.reporting.terminal.forecast import show
from robustkit.runs.forecast_record import read_devices


def plan(
    *,
    model: str,
    data: str | None,
    limit: int | None,
    threat: str | None,
    suite: str,
    seed: int,
    device: str,
    precision: str,
    batch_size: str,
    strictness: str | None,
    seconds: float,
    devices: str,
    price: float | None,
    data_root: Path | None,
    download: bool,
    trust_code: bool,
    as_json: bool,
    flags: list[str],
) -> int:
    """Run the verb; `flags` are those that the evaluation itself would take."""
    counts = read_devices(devices)
    subject = Inputs.load(model, data, limit, threat, device, data_root, download, trust_code=trust_code)
    probe = CostProbe(
        model=subject.model,
        samples=subject.samples,
        threat=subject.threat,
        suite=suite,
        seed=seed,
        device=subject.device,
        precision=precision,
        batch_size=read_batch_size(batch_size),
        strictness=read_strictness(strictness),
        budget=seconds,
    )
    record = measure(probe, counts, price, Display())
    if as_json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        show(record, result_console(), shlex.join(["robustkit", "evaluate", *flags]))
    return 0
