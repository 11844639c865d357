"""`robustkit train`: from flags to objects, the run, its table."""

from __future__ import annotations

import json
from collections.abc import Mapping

from robustkit.api.options.train import TrainFlags
from robustkit.api.train import run_folder, training
from robustkit.cli.inputs import announce
from robustkit.cli.output import save_page, wide_console
from robustkit.cli.progress import TrainDisplay
from robustkit.cli.streams import print_result
from robustkit.data import load_data
from robustkit.models.allowed_paths import FLAG, names_code
from robustkit.registry import make_method
from robustkit.reporting.html.training import page
from robustkit.reporting.terminal.training import show
from robustkit.runs.run_folder import PAGE
from robustkit.training.defaults import held_out_split
from robustkit.training.parallel import processes


def train(flags: TrainFlags, method: str, fields: Mapping[str, str]) -> int:
    """Run the verb with a method and the texts of its fields."""
    values = make_method(method, **fields)
    test = flags.test or held_out_split(flags.data)
    samples = load_data(flags.data, root=flags.data_root, download=flags.download)
    announce(samples)
    held_out = load_data(test, root=flags.data_root, download=flags.download) if test else None
    request = training(flags, values, samples, held_out)
    folder = run_folder(flags, request)
    record = request.run(folder, TrainDisplay(), flags.overwrite)
    if processes.rank():
        return 0
    shown = save_page(folder / PAGE, page(request.spec, record.history, record).encode())
    if flags.json:
        print_result(json.dumps(record.to_json(), indent=2))
        return 0
    verb = "craft --surrogate" if record.samples else "evaluate"
    trust = f" {FLAG}" * names_code(record.arch)
    following = f"robustkit {verb} {folder}/ --data {test or 'DATA'}{trust}"
    show(record, wide_console(), following, shown)
    return 0
