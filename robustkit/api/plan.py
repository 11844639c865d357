"""`robustkit.plan`: what an evaluation will take."""

from __future__ import annotations

import torch

from robustkit.api.inputs import place_of, samples_and_threat
from robustkit.api.options.declare import build
from robustkit.api.options.evaluate import PlanArguments, PlanOptions
from robustkit.api.verbs import verb
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.allocation.rounds import read_strictness
from robustkit.engine.planning.cost_probe import CostProbe
from robustkit.engine.planning.forecast import forecast_cost
from robustkit.models import as_classifier
from robustkit.models.classifier import Classifier
from robustkit.models.label_matching import matched_to
from robustkit.runs.forecast_record import Plan


@verb(PlanArguments)
def plan(arguments: PlanArguments) -> Plan:
    """Return what `evaluate` with the same arguments would take, on one device and on several.

    Randomly drawn images are attacked for about `seconds`, and the rest is simulated; no file is written.

    Returns:
        The forecast: `scales` has time, cost and 95 % intervals for each number of devices.

    Raises:
        UsageError: the request cannot be carried out.
        RunError: the measurement failed.

    Example:
        >>> import robustkit
        >>> model = robustkit.load_model("robustkit:digits-cnn")
        >>> data = robustkit.load_data("digits:test").head(8)
        >>> forecast = robustkit.plan(model, data, threat="linf:0.15", suite="fgsm", seconds=0.1, devices=[1, 4])
        >>> [scale.devices for scale in forecast.scales]
        [1, 4]
    """
    samples, threat = samples_and_threat(arguments.images, arguments.labels, arguments.threat)
    model = as_classifier(arguments.model)
    device = place_of(model, arguments.device)
    probe = cost_probe(arguments, model.to(device), matched_to(samples, model), threat, device)
    return forecast_cost(probe, arguments.devices, arguments.price, arguments.progress)


def cost_probe(
    options: PlanOptions, model: Classifier, samples: Samples, threat: ThreatModel, device: torch.device
) -> CostProbe:
    """Return the measurement that these options ask for."""
    return build(
        CostProbe,
        options,
        model=model,
        samples=samples,
        threat=threat,
        device=device,
        strictness=read_strictness(options.strictness),
        budget=options.seconds,
    )
