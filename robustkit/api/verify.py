"""`robustkit.verify`: check every record of a finished run again."""

from __future__ import annotations

from pathlib import Path

from robustkit.api.inputs import read_samples
from robustkit.api.options.runs import VerifyArguments
from robustkit.api.verbs import verb
from robustkit.core.devices import pick_device
from robustkit.engine.evaluation.verify_run import Verification, verify_run
from robustkit.models import as_classifier
from robustkit.models.label_matching import matched_to


@verb(VerifyArguments)
def verify(arguments: VerifyArguments) -> Verification:
    """Check every record of a finished run again.

    Model and data are loaded by the strings in the run's spec unless they are given, and not at all if the files
    in the folder are not those of the run.

    Returns:
        `bad` and `borderline`, a sentence for each such record; `checked`, how many adversarial images.

    Raises:
        UsageError: the folder holds no finished run, model or data cannot be loaded, or the spec names code that
            is not trusted.

    Example:
        >>> import robustkit
        >>> model = robustkit.load_model("robustkit:digits-cnn")
        >>> data = robustkit.load_data("digits:test").head(8)
        >>> report = robustkit.evaluate(model, data, threat="linf:0.15", suite="fgsm", out="runs/checked")
        >>> robustkit.verify("runs/checked", model, data).bad
        []
    """
    model = None if arguments.model is None else as_classifier(arguments.model)
    samples = None if arguments.images is None else read_samples(arguments.images, arguments.labels)
    return verify_run(
        Path(arguments.folder),
        model=model,
        samples=samples if samples is None or model is None else matched_to(samples, model),
        device=None if str(arguments.device) == "auto" else pick_device(arguments.device),
        trust_code=arguments.trust_code,
    )
