"""`robustkit craft`: strings to objects, the run, its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from robustkit.cli.inputs import BUILT_IN, BUILT_IN_DATA, BUILT_IN_LIMIT, announce, usual_threat
from robustkit.cli.model_lists import refuse_lists
from robustkit.cli.output import save_page, wide_console
from robustkit.cli.progress import CraftDisplay
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.evaluate import read_batch_size
from robustkit.cli.verbs.report import craft_view
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.core.numbers import exact
from robustkit.core.threat import ThreatModel
from robustkit.crafting.run import run_craft
from robustkit.crafting.spec import CraftRequest
from robustkit.data import load_data
from robustkit.data.classes import matched
from robustkit.data.samples import Samples
from robustkit.data.strings import DataString
from robustkit.engine import gradient_budgets
from robustkit.engine.model.loaded_models import Net, gather_both
from robustkit.models import load_model
from robustkit.models.allowed_paths import recorded_model
from robustkit.models.label_matching import matched_to
from robustkit.models.strings import ModelString
from robustkit.reporting.terminal.transfer import show
from robustkit.runs.run_folder import PAGE


def craft(
    *,
    surrogates: Sequence[str],
    attack: str,
    combine: str,
    weights: str | None,
    targets: Sequence[str],
    targeted: str | None,
    data: str | None,
    limit: int | None,
    threat: str | None,
    seed: int,
    device: str,
    batch_size: str,
    streaming: bool | None,
    budgets: str | None,
    forecast: bool,
    png: Path | None,
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
    curve = gradient_budgets.read(budgets) if budgets else []
    if curve and not targets:
        raise UsageError("--budgets needs a model to judge the images on; give one with --target.")
    refuse_lists("--surrogate", surrogates)
    refuse_lists("--target", targets)
    place = pick_device(device)
    samples = read_data(surrogates, data, limit, data_root, download, trust_code)
    rules = ThreatModel.parse(threat) if threat else usual_threat(data or BUILT_IN_DATA)
    nets, judges = gather_both(surrogates, targets, samples, place, streaming, trust_code=trust_code)
    samples = matched(samples, nets[0].classes, nets[0].class_names)
    plan = CraftRequest(
        nets=nets,
        samples=samples,
        threat=rules,
        attack=attack,
        combine=combine,
        weights=_weights(weights),
        targeted=targeted,
        seed=seed,
        device=place,
        batch_size=read_batch_size(batch_size),
        streaming=streaming,
        workers=workers,
        ray=ray,
    )
    folder = out or Path("runs") / f"craft-{plan.spec.run_id}"
    record = run_craft(
        plan, folder, judges, forecast=forecast, curve=curve, png=png, progress=CraftDisplay(), overwrite=overwrite
    )
    shown = write_page(folder)
    if as_json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        show(record, wide_console(), next_command(folder, nets, bool(record.targets)), shown)
    return 0


def write_page(folder: Path) -> Path | None:
    """Write the page of a craft run as it is now; return it if it is there."""
    return save_page(folder / PAGE, craft_view(folder).page().encode())


def next_command(folder: Path, nets: Sequence[Net], judged: bool) -> str:
    """Return what to do after crafting: judge, compare."""
    if not judged:
        return f"robustkit transfer {folder} --target MODEL   (a model that is no surrogate)"
    return f"robustkit compare {folder} DIR   (another attack over the same images)"


def read_data(
    models: Sequence[str],
    data: str | None,
    limit: int | None,
    data_root: Path | None,
    download: bool,
    trust_code: bool,
    record: Path | None = None,
) -> Samples:
    """Return the images to craft on; without a data string the built-in model takes its own.

    Files are read at the size that the first model asks for. `record` is the file that the models are named by, if
    nobody typed them.
    """
    if data is None:
        if str(ModelString.parse(models[0])) != BUILT_IN:
            raise UsageError(
                f"no data for {models[0]}; write --data, e.g. --data cifar10:test or --data test.npz."
            )
        data, limit = BUILT_IN_DATA, limit or BUILT_IN_LIMIT
    model = None
    if DataString.parse(data).is_pictures:
        first = models[0] if record is None else recorded_model(models[0], record, trust_code)
        model = load_model(first, trust_code=trust_code)
    preprocess = model.preprocess if model else None
    samples = load_data(data, root=data_root, download=download, preprocess=preprocess)
    samples = matched_to(samples, model) if model else samples
    announce(samples)
    return samples.head(limit)


def _weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(exact(part)) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"weights {text!r}: write one number above 0 for each surrogate, e.g. 1,1,2.") from None
