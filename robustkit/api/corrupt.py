"""`robustkit.corrupt`: the accuracy on common corruptions."""

from __future__ import annotations

from pathlib import Path

from robustkit.api.inputs import load_or_wrap, place_of, read_samples
from robustkit.api.options.corrupt import CorruptArguments
from robustkit.api.options.declare import build
from robustkit.api.verbs import verb
from robustkit.diagnostics.corruptions import CorruptionRequest
from robustkit.models.label_matching import matched_to
from robustkit.runs.corruption_record import Corruptions


@verb(CorruptArguments)
def corrupt(arguments: CorruptArguments) -> Corruptions:
    """Measure a model's accuracy on 15 common corruptions at 5 severities.

    The corruptions are those of Hendrycks & Dietterich 2019 (arXiv:1903.12261), with the constants of CIFAR-10-C
    for small images and those of ImageNet-C for large ones.

    Returns:
        The record, with the fields of corruptions.json.

    Raises:
        UsageError: a corruption or severity does not exist, or images and model do not fit together.

    Example:
        >>> import robustkit
        >>> data = robustkit.load_data("digits:test").head(40)
        >>> record = robustkit.corrupt("robustkit:digits-cnn", data, corruptions=["contrast"], severities=[1, 5])
        >>> record.clean.value >= record.accuracy["contrast"][-1].value
        True
    """
    model = load_or_wrap(arguments.model, arguments.trust_code)
    device = place_of(model, arguments.device)
    samples = matched_to(read_samples(arguments.images, arguments.labels), model)
    request = build(CorruptionRequest, arguments, model=model.to(device), samples=samples, device=device)
    out = Path(arguments.out) if arguments.out is not None else None
    return request.run(out, arguments.progress, arguments.overwrite)
