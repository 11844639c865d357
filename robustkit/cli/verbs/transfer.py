"""`robustkit transfer`: judge a folder of crafted images on more models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from robustkit.cli.model_lists import refuse_lists
from robustkit.cli.output import wide_console
from robustkit.cli.progress import CraftDisplay
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.craft import read_data, write_page
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.crafting.rejudge import judge_more
from robustkit.data.classes import matched
from robustkit.engine.model.loaded_models import gather
from robustkit.models.recorded_data import recorded_data
from robustkit.reporting.terminal.transfer import show
from robustkit.runs import run_folder


def transfer(
    folder: Path,
    *,
    targets: Sequence[str],
    data: str | None,
    device: str,
    data_root: Path | None,
    trust_code: bool,
    as_json: bool,
) -> int:
    """Run the verb; without targets the stored judgements are printed again."""
    refuse_lists("--target", targets)
    record = run_folder.read_craft(folder)
    if targets:
        run_folder.refuse_broken(folder, record)
        spec, place = record.spec, pick_device(device)
        source = folder / run_folder.TRANSFER
        images = data or recorded_data(spec.data["string"], source)
        crafted_on = [net["string"] for net in spec.surrogates]
        samples = read_data(crafted_on, images, None, data_root, False, trust_code, source)
        # Labels are numbered as for the first surrogate.
        known = record.environment
        samples = matched(samples, known.get("classes"), known.get("class_names"))
        samples = samples.head(min(spec.data["n"], len(samples)))
        if samples.fingerprint != spec.data["fingerprint"]:
            now, then = samples.fingerprint[:12], str(spec.data["fingerprint"])[:12]
            raise UsageError(
                f"{samples.name} is not the data that {folder} was crafted on (sha256 {now}…, was {then}…); "
                "write where that is with --data."
            )
        nets = gather(targets, samples, place, what="target", keep=lambda total: False, trust_code=trust_code)
        record = judge_more(folder, samples, nets, place, CraftDisplay())
        write_page(folder)
    if as_json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        following = f"robustkit compare {folder} DIR   (another attack over the same images)"
        show(record, wide_console(), following)
    return 0
