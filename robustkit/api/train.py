"""`robustkit.train`: train nets, or samples of a posterior, by a method."""

from __future__ import annotations

from pathlib import Path

from robustkit.api.inputs import read_samples
from robustkit.api.options.declare import build
from robustkit.api.options.train import TrainArguments, TrainOptions
from robustkit.api.verbs import verb
from robustkit.core.determinism import prepare_deterministic
from robustkit.core.devices import pick_device
from robustkit.data import load_data
from robustkit.data.samples import Samples
from robustkit.registry import parse_method
from robustkit.runs.training_record import Trained
from robustkit.training.defaults import held_out_split, match_labels
from robustkit.training.method import Method
from robustkit.training.train import Training


@verb(TrainArguments)
def train(arguments: TrainArguments) -> Trained:
    """Train nets, or samples of a posterior, and return their record.

    An option that is None has the default of the method, which depends on the number of images.

    Returns:
        The record, with the fields of model.json; `.folder` is a model string for `load_model` and `evaluate`.

    Raises:
        UsageError: the request cannot be carried out.
        RunError: the run failed.

    Example:
        >>> import robustkit
        >>> trained = robustkit.train("standard(warmup=0)", limit=64, epochs=1, out="runs/example")
        >>> len(trained.history)
        1
    """
    data = arguments.data
    if isinstance(data, str):
        test, samples = arguments.test or held_out_split(data), load_data(data)
    else:
        test, samples = arguments.test, read_samples(data, arguments.labels)
    method = parse_method(arguments.method) if isinstance(arguments.method, str) else arguments.method
    request = training(arguments, method, samples, load_data(test) if isinstance(test, str) else test)
    return request.run(run_folder(arguments, request), arguments.progress, arguments.overwrite)


def training(options: TrainOptions, method: Method, samples: Samples, test: Samples | None) -> Training:
    """Return the training run that these options ask for."""
    prepare_deterministic(options.deterministic)
    return build(
        Training,
        options,
        method=method,
        samples=samples.head(options.limit),
        test=None if test is None else match_labels(test, samples),
        device=pick_device(options.device),
    )


def run_folder(options: TrainOptions, request: Training) -> Path:
    """Return the folder of a training run."""
    return Path(options.out or Path("runs") / f"{request.method.info.name}-{request.spec.run_id}")
