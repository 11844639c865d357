"""`robustkit matrix`: every model as the surrogate of every other."""

from __future__ import annotations

import json
from pathlib import Path

from robustkit.api.options.craft import MatrixFlags
from robustkit.api.options.declare import build
from robustkit.cli.inputs import BUILT_IN_DATA, default_threat, load_samples
from robustkit.cli.model_lists import refuse_lists, split_models
from robustkit.cli.output import save_page, wide_console
from robustkit.cli.progress import CraftDisplay, MatrixDisplay
from robustkit.cli.streams import print_result
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.crafting.matrix import MatrixRequest
from robustkit.data.classes import match_classes
from robustkit.engine.model.loaded_models import gather_both
from robustkit.reporting.html.matrix import FILE, page
from robustkit.reporting.terminal.transfer import show_matrix


def matrix(flags: MatrixFlags) -> int:
    """Run the verb."""
    names = [name for text in flags.models for name in split_models(text)]
    if len(names) < 2:
        raise UsageError("a matrix needs at least two models; use --models A,B, or --models once for each.")
    refuse_lists("--target", flags.target)
    device = pick_device(flags.device)
    samples = load_samples(names, flags.data, flags.limit, flags.data_root, flags.download, flags.trust_code)
    threat = ThreatModel.parse(flags.threat) if flags.threat else default_threat(flags.data or BUILT_IN_DATA)
    nets, targets = gather_both(names, flags.target, samples, device, None, "model", flags.trust_code)
    samples = match_classes(samples, nets[0].classes, nets[0].class_names)
    request = build(
        MatrixRequest, flags, nets=nets, targets=targets, samples=samples, threat=threat, device=device
    )
    folder = Path(flags.out or f"runs/matrix-{request.run_id}")
    display = MatrixDisplay()
    progress = display if flags.workers or flags.ray else CraftDisplay()
    record = request.run(folder, progress, display.of_run, flags.overwrite)
    saved_page = save_page(folder / FILE, page(record).encode())
    if flags.json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        next_command = f"robustkit transfer {folder / record.folders[0]} --target MODEL"
        show_matrix(record, wide_console(), saved_page, next_command)
    return 0
