"""`robustkit train`: strings to objects, the run, its table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from robustkit.cli.inputs import announce
from robustkit.cli.output import save_page, wide_console
from robustkit.cli.progress import TrainDisplay
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.evaluate import read_batch_size
from robustkit.core.devices import pick_device
from robustkit.data import load_data
from robustkit.models.allowed_paths import FLAG, names_code
from robustkit.registry import make_method
from robustkit.reporting.html.training import page
from robustkit.reporting.terminal.training import show
from robustkit.runs.run_folder import PAGE
from robustkit.training.defaults import judged_by, sibling
from robustkit.training.parallel import processes
from robustkit.training.train import Training


def train(
    method: str,
    fields: Mapping[str, str],
    *,
    data: str,
    test: str | None,
    arch: str | None,
    limit: int | None,
    epochs: int | None,
    batch_size: str,
    lr: float | None,
    members: int | None,
    ema: float,
    augment: str | None,
    seed: int,
    precision: str,
    device: str,
    devices: int,
    parallel: str,
    out: Path | None,
    overwrite: bool,
    data_root: Path | None,
    download: bool,
    trust_code: bool,
    as_json: bool,
) -> int:
    """Run the verb."""
    values = make_method(method, **fields)
    judging = test or sibling(data)
    samples = load_data(data, root=data_root, download=download)
    announce(samples)
    held_out = load_data(judging, root=data_root, download=download) if judging else None
    plan = Training(
        method=values,
        samples=samples.head(limit),
        test=None if held_out is None else judged_by(held_out, samples),
        arch=arch,
        epochs=epochs,
        batch_size=read_batch_size(batch_size),
        lr=lr,
        members=members,
        ema=ema,
        augment=augment,
        precision=precision,
        seed=seed,
        device=pick_device(device),
        devices=devices,
        parallel=parallel,
        trust_code=trust_code,
    )
    folder = out or Path("runs") / f"{values.info.name}-{plan.spec.run_id}"
    record = plan.run(folder, TrainDisplay(), overwrite)
    if processes.rank():
        return 0
    shown = save_page(folder / PAGE, page(plan.spec, record.history, record).encode())
    if as_json:
        print_result(json.dumps(record.to_json(), indent=2))
        return 0
    verb = "craft --surrogate" if record.samples else "evaluate"
    trust = f" {FLAG}" * names_code(record.arch)
    following = f"robustkit {verb} {folder}/ --data {judging or 'DATA'}{trust}"
    show(record, wide_console(), following, shown)
    return 0
