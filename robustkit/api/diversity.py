"""`robustkit.diversity`: how far the members of an ensemble share weaknesses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from robustkit.api.inputs import samples_and_threat
from robustkit.api.options.craft import DiversityArguments, DiversityOptions
from robustkit.api.options.declare import build
from robustkit.api.verbs import verb
from robustkit.core.devices import pick_device
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.diagnostics.ensemble_diversity import DiversityRequest
from robustkit.models import as_classifier, load_model
from robustkit.models.classifier import Classifier
from robustkit.models.label_matching import matched_to
from robustkit.runs.diversity_record import Diversity


@verb(DiversityArguments)
def diversity(arguments: DiversityArguments) -> Diversity:
    """Attack each member of an ensemble alone; return which other members its adversarial images fool.

    Returns:
        The record, with the fields of diversity.json.

    Raises:
        UsageError: the model has no members, or too few images are classified correctly by all of them.

    Example:
        >>> import robustkit
        >>> model = robustkit.load_model("ensemble:[robustkit:digits-cnn;robustkit:digits-cnn?mean=0.1&std=1]")
        >>> data = robustkit.load_data("digits:test").head(12)
        >>> record = robustkit.diversity(model, data, threat="linf:0.1", steps=2, restarts=1)
        >>> record.n <= 12
        True
    """
    device, given = pick_device(arguments.device), arguments.model
    samples, threat = samples_and_threat(arguments.images, arguments.labels, arguments.threat)
    model = (
        load_model(given, device=device, trust_code=arguments.trust_code)
        if isinstance(given, str)
        else as_classifier(given).to(device)
    )
    request = comparison(arguments, model, matched_to(samples, model), threat, device, arguments.only)
    out = Path(arguments.out) if arguments.out is not None else None
    return request.run(out, arguments.progress, arguments.overwrite)


def comparison(
    options: DiversityOptions,
    model: Classifier,
    samples: Samples,
    threat: ThreatModel,
    device: torch.device,
    positions: Sequence[int] | None,
) -> DiversityRequest:
    """Return the comparison that these options ask for, on the images at these positions, or on all."""
    return build(
        DiversityRequest, options, model=model, samples=samples, threat=threat, device=device, images=positions
    )
