"""`robustkit transfer`: evaluate a folder of crafted images on more models."""

from __future__ import annotations

import json
from pathlib import Path

from robustkit.api.options.craft import TransferFlags
from robustkit.cli.inputs import load_samples
from robustkit.cli.model_lists import refuse_lists
from robustkit.cli.output import wide_console
from robustkit.cli.progress import CraftDisplay
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.craft import next_command, write_page
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.crafting.rejudge import judge_more
from robustkit.data.classes import match_classes
from robustkit.data.samples import Samples
from robustkit.engine.model.loaded_models import gather
from robustkit.models.recorded_data import recorded_data
from robustkit.reporting.terminal.transfer import show
from robustkit.runs import run_folder
from robustkit.runs.craft_record import Craft


def transfer(flags: TransferFlags) -> int:
    """Run the verb; without targets the stored results are printed again."""
    refuse_lists("--target", flags.target)
    record = run_folder.read_craft(flags.folder)
    if flags.target:
        run_folder.check_seals(flags.folder, record)
        device = pick_device(flags.device)
        samples = _crafted_data(flags, record)
        nets = gather(
            flags.target, samples, device, what="target", keep=lambda total: False, trust_code=flags.trust_code
        )
        record = judge_more(flags.folder, samples, nets, device, CraftDisplay())
        write_page(flags.folder)
    if flags.json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        show(record, wide_console(), next_command(flags.folder, evaluated=True))
    return 0


def _crafted_data(flags: TransferFlags, record: Craft) -> Samples:
    """Return the images that a run was crafted on; UsageError where the data is another."""
    folder, spec = flags.folder, record.spec
    source = Path(folder) / run_folder.TRANSFER
    data = flags.data or recorded_data(spec.data["string"], source)
    surrogates = [net["string"] for net in spec.surrogates]
    samples = load_samples(surrogates, data, None, flags.data_root, False, flags.trust_code, source)
    # Labels are numbered as for the first surrogate.
    samples = match_classes(samples, record.environment.get("classes"), record.environment.get("class_names"))
    samples = samples.head(min(spec.data["n"], len(samples)))
    if samples.fingerprint != spec.data["fingerprint"]:
        now, then = samples.fingerprint[:12], str(spec.data["fingerprint"])[:12]
        raise UsageError(
            f"{samples.name} is not the data that {folder} was crafted on (sha256 {now}…, was {then}…); "
            "give its place with --data."
        )
    return samples
