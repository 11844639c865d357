"""`robustkit corrupt`: from flags to objects, the evaluation, its table."""

from __future__ import annotations

import json
from pathlib import Path

from robustkit.api.options.corrupt import CorruptFlags
from robustkit.api.options.declare import build
from robustkit.cli.inputs import load_model_and_samples
from robustkit.cli.output import result_console, save_page
from robustkit.cli.progress import AccuracyDisplay
from robustkit.cli.streams import print_result
from robustkit.diagnostics.corruptions import CorruptionRequest
from robustkit.reporting.html.corruptions import FILE, page
from robustkit.reporting.terminal.corruptions import show


def corrupt(flags: CorruptFlags) -> int:
    """Run the verb."""
    model, samples, device = load_model_and_samples(flags, flags.model)
    names = [name.strip() for text in flags.corruptions for name in text.split(",")]
    request = build(CorruptionRequest, flags, model=model, samples=samples, device=device, corruptions=names)
    folder = Path(flags.out or f"runs/corrupt-{request.spec.run_id}")
    record = request.run(folder, AccuracyDisplay(), flags.overwrite)
    shown = save_page(folder / FILE, page(record).encode())
    if flags.json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        show(record, result_console(), shown)
    return 0
