"""`robustkit.evaluate`: the robust accuracy of a model."""

from __future__ import annotations

from pathlib import Path

import torch

from robustkit.api.inputs import place_of, samples_and_threat
from robustkit.api.options.declare import build
from robustkit.api.options.evaluate import EvaluateArguments, EvaluateOptions
from robustkit.api.verbs import verb
from robustkit.core.determinism import prepare_deterministic
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.allocation.rounds import read_strictness
from robustkit.engine.evaluation.early_stopping import Limits
from robustkit.engine.evaluation.run import Evaluation
from robustkit.models import as_classifier
from robustkit.models.classifier import Classifier
from robustkit.models.label_matching import matched_to
from robustkit.runs.evaluation_record import Report


@verb(EvaluateArguments)
def evaluate(arguments: EvaluateArguments) -> Report:
    """Return the robust accuracy of a classifier on images; every adversarial image is verified.

    Returns:
        The report, with the fields of report.json as attributes: `robust_accuracy`, `clean_accuracy`, `stages`,
        `verdicts` (one per image), `flags` (reasons for doubt), `cost`.

    Raises:
        UsageError: the request cannot be carried out.
        RunError: the run failed.

    Example:
        >>> import robustkit
        >>> model = robustkit.load_model("robustkit:digits-cnn")
        >>> data = robustkit.load_data("digits:test").head(8)
        >>> report = robustkit.evaluate(model, data, threat="linf:0.15", suite="pgd(steps=5)")
        >>> report.n, report.robust_accuracy.value <= report.clean_accuracy.value
        (8, True)
    """
    prepare_deterministic(arguments.deterministic)
    samples, threat = samples_and_threat(arguments.images, arguments.labels, arguments.threat)
    model = as_classifier(arguments.model)
    device = place_of(model, arguments.device)
    request = evaluation(arguments, model.to(device), matched_to(samples, model), threat, device)
    out = Path(arguments.out) if arguments.out is not None else None
    return request.run(out, arguments.progress, overwrite=arguments.overwrite)


def evaluation(
    options: EvaluateOptions, model: Classifier, samples: Samples, threat: ThreatModel, device: torch.device
) -> Evaluation:
    """Return the evaluation that these options ask for."""
    return build(
        Evaluation,
        options,
        model=model,
        samples=samples,
        threat=threat,
        device=device,
        strictness=read_strictness(options.strictness),
        limits=Limits(options.time_limit, options.stop_at_width),
    )
