"""`robustkit.craft`: adversarial images made on surrogates, evaluated on other models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from robustkit.api.inputs import model_list, samples_and_threat
from robustkit.api.options.craft import CraftArguments, CraftOptions
from robustkit.api.options.declare import build
from robustkit.api.verbs import verb
from robustkit.core.determinism import prepare_deterministic
from robustkit.core.devices import pick_device
from robustkit.core.threat import ThreatModel
from robustkit.crafting.run import run_craft
from robustkit.crafting.spec import CraftRequest
from robustkit.data.classes import match_classes
from robustkit.data.samples import Samples
from robustkit.engine.model.loaded_models import Net, gather_both
from robustkit.runs.craft_record import Craft


@verb(CraftArguments)
def craft(arguments: CraftArguments) -> Craft:
    """Return adversarial images made on surrogates, and their success on models that the attack has not seen.

    Returns:
        The record, with the fields of transfer.json; `.adversarial["x"]` holds the images (N C H W), in order.

    Raises:
        UsageError: the request cannot be carried out.
        RunError: the run failed.

    Example:
        >>> import robustkit
        >>> data = robustkit.load_data("digits:test").head(6)
        >>> attack, surrogate = "mi-fgsm(steps=3)", "robustkit:digits-cnn"
        >>> crafted = robustkit.craft(surrogate, data, threat="linf:0.15", attack=attack)
        >>> crafted.adversarial["x"].shape
        (6, 1, 8, 8)
    """
    prepare_deterministic(arguments.deterministic)
    device = pick_device(arguments.device)
    samples, threat = samples_and_threat(arguments.images, arguments.labels, arguments.threat)
    surrogates, targets = gather_both(
        model_list(arguments.surrogates),
        model_list(arguments.targets),
        samples,
        device,
        arguments.streaming,
        trust_code=arguments.trust_code,
    )
    return run_craft(
        craft_request(arguments, surrogates, samples, threat, device),
        Path(arguments.out) if arguments.out is not None else None,
        targets,
        forecast=arguments.forecast,
        curve=arguments.budgets,
        png=Path(arguments.png) if arguments.png is not None else None,
        progress=arguments.progress,
        overwrite=arguments.overwrite,
    )


def craft_request(
    options: CraftOptions, surrogates: Sequence[Net], samples: Samples, threat: ThreatModel, device: torch.device
) -> CraftRequest:
    """Return the request that these options ask for; labels are numbered as for the first surrogate."""
    first = surrogates[0] if surrogates else None
    samples = match_classes(samples, first.classes, first.class_names) if first else samples
    return build(CraftRequest, options, nets=surrogates, samples=samples, threat=threat, device=device)
