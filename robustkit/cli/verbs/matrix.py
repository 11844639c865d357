"""`robustkit matrix`: every model as the surrogate of every other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from robustkit.cli.inputs import BUILT_IN_DATA, usual_threat
from robustkit.cli.model_lists import refuse_lists, split_models
from robustkit.cli.output import save_page, wide_console
from robustkit.cli.progress import CraftBoard, CraftDisplay
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.craft import read_data
from robustkit.cli.verbs.evaluate import read_batch_size
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.crafting.matrix import Grid
from robustkit.data.classes import matched
from robustkit.engine.model.loaded_models import gather_both
from robustkit.reporting.html.matrix import FILE, page
from robustkit.reporting.terminal.transfer import show_matrix


def matrix(
    *,
    models: Sequence[str],
    targets: Sequence[str],
    attack: str,
    targeted: str | None,
    data: str | None,
    limit: int | None,
    threat: str | None,
    seed: int,
    device: str,
    batch_size: str,
    workers: int | None,
    ray: str | None,
    out: Path | None,
    overwrite: bool,
    data_root: Path | None,
    download: bool,
    trust_code: bool,
    as_json: bool,
) -> int:
    """Run the verb."""
    names = [name for text in models for name in split_models(text)]
    if len(names) < 2:
        raise UsageError("a matrix needs at least two models; write --models A,B, or --models once for each.")
    refuse_lists("--target", targets)
    place = pick_device(device)
    samples = read_data(names, data, limit, data_root, download, trust_code)
    rules = ThreatModel.parse(threat) if threat else usual_threat(data or BUILT_IN_DATA)
    nets, others = gather_both(names, targets, samples, place, None, "model", trust_code)
    samples = matched(samples, nets[0].classes, nets[0].class_names)
    grid = Grid(
        nets=nets,
        targets=others,
        samples=samples,
        threat=rules,
        attack=attack,
        targeted=targeted,
        seed=seed,
        device=place,
        batch_size=read_batch_size(batch_size),
        workers=workers,
        ray=ray,
    )
    folder = out or Path("runs") / f"matrix-{grid.run_id}"
    board = CraftBoard()
    record = grid.run(folder, board if workers or ray else CraftDisplay(), board.of, overwrite)
    shown = save_page(folder / FILE, page(record).encode())
    if as_json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        following = f"robustkit transfer {folder / record.folders[0]} --target MODEL"
        show_matrix(record, wide_console(), shown, following)
    return 0
