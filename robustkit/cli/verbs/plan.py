"""`robustkit plan`: from flags to objects, the measurement, its forecast."""

from __future__ import annotations

import json
import shlex

from robustkit.api.options.evaluate import EvaluateFlags, PlanFlags
from robustkit.api.options.shared import DEFAULT_MODEL
from robustkit.api.plan import cost_probe
from robustkit.cli.flags import typed
from robustkit.cli.inputs import Inputs
from robustkit.cli.output import result_console
from robustkit.cli.progress import Display
from robustkit.cli.streams import print_result
from robustkit.engine.planning.forecast import forecast_cost
from robustkit.reporting.terminal.forecast import show


def plan(flags: PlanFlags) -> int:
    """Run the verb."""
    inputs = Inputs.load(flags, flags.model)
    probe = cost_probe(flags, inputs.model, inputs.samples, inputs.threat, inputs.device)
    record = forecast_cost(probe, flags.devices, flags.price, Display())
    if flags.json:
        print_result(json.dumps(record.to_json(), indent=2))
    else:
        model = [] if flags.model == DEFAULT_MODEL else [flags.model]
        words = typed(flags, EvaluateFlags.__dataclass_fields__.keys() - {"model", "json", "download"})
        show(record, result_console(), shlex.join(["robustkit", "evaluate", *model, *words]))
    return 0
