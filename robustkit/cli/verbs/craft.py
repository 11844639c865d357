"""`robustkit craft`: from flags to objects, the run, its table."""

from __future__ import annotations

import json
from pathlib import Path

from robustkit.api.craft import craft_request
from robustkit.api.options.craft import CraftFlags
from robustkit.cli.inputs import BUILT_IN_DATA, default_threat, load_samples
from robustkit.cli.model_lists import refuse_lists
from robustkit.cli.output import save_page, wide_console
from robustkit.cli.progress import CraftDisplay
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.report import craft_view
from robustkit.core.determinism import prepare_deterministic
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.crafting.run import run_craft
from robustkit.engine.model.loaded_models import gather_both
from robustkit.reporting.terminal.transfer import show
from robustkit.runs.run_folder import PAGE


def craft(flags: CraftFlags) -> int:
    """Run the verb."""
    if flags.budgets and not flags.target:
        raise UsageError("--budgets needs a model to evaluate the images on; give one with --target.")
    refuse_lists("--surrogate", flags.surrogate)
    refuse_lists("--target", flags.target)
    prepare_deterministic(flags.deterministic)
    device = pick_device(flags.device)
    samples = load_samples(
        flags.surrogate, flags.data, flags.limit, flags.data_root, flags.download, flags.trust_code
    )
    threat = ThreatModel.parse(flags.threat) if flags.threat else default_threat(flags.data or BUILT_IN_DATA)
    surrogates, targets = gather_both(
        flags.surrogate, flags.target, samples, device, flags.streaming, trust_code=flags.trust_code
    )
    request = craft_request(flags, surrogates, samples, threat, device)
    folder = Path(flags.out or f"runs/craft-{request.spec.run_id}")
    record = run_craft(
        request,
        folder,
        targets,
        forecast=flags.forecast,
        curve=flags.budgets,
        png=Path(flags.png) if flags.png else None,
        progress=CraftDisplay(),
        overwrite=flags.overwrite,
    )
    shown = write_page(folder)
    if flags.json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        show(record, wide_console(), next_command(folder, bool(record.targets)), shown)
    return 0


def write_page(folder: Path) -> Path | None:
    """Write the page of a craft run as it is now; return it if it is there."""
    return save_page(folder / PAGE, craft_view(folder).page().encode())


def next_command(folder: Path, evaluated: bool) -> str:
    """Return the command that follows: to evaluate on a target, or to compare."""
    if not evaluated:
        return f"robustkit transfer {folder} --target MODEL   (a model that is not a surrogate)"
    return f"robustkit compare {folder} DIR   (another attack on the same images)"
