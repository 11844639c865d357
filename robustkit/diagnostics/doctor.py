"""The checks alone: seconds of diagnosis before an evaluation of hours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from robustkit.checks.probe import Probe
from robustkit.checks.relabelled import label_checks
from robustkit.checks.run import diagnose, training_mode
from robustkit.core.errors import RunError
from robustkit.core.flags import Flag
from robustkit.core.isolation import evaluation_mode, own_randomness, threads, training_count
from robustkit.core.out_of_memory import NO_MEMORY, is_out_of_memory
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.ledger_writer import noticed
from robustkit.engine.evaluation.sanity import check_eps, check_logits
from robustkit.engine.model.image_size import enlarged_images, pixel_space
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.models.classifier import Classifier
from robustkit.models.failures import described
from robustkit.registry import DEFAULT_SUITE, parse_suite
from robustkit.runs.report_parts import Cost


@dataclass(frozen=True)
class Diagnosis:
    """What the checks found on `n` images, `correct` of which the model classifies correctly."""

    model: str
    data: str
    threat: str
    n: int
    correct: int
    classes: int
    parameters: int
    flags: Sequence[Flag]
    cost: Cost


def examine(
    model: Classifier, samples: Samples, threat: ThreatModel, device: torch.device, seed: int = 0
) -> Diagnosis:
    """Run the checks on these images; model and random generators are left as they were.

    Checks that depend on the attacks use those of the default suite.

    Raises:
        UsageError: as an evaluation does.
        RunError: likewise.
    """
    x = samples.images(range(len(samples))).to(device)
    labels = torch.from_numpy(samples.labels).to(device)
    check_eps(threat.bounded(), tuple(x.shape[1:]))
    attacks = [entry.attack for entry in parse_suite(DEFAULT_SUITE, threat.norm) if not entry.view]
    instrumented = InstrumentedModel(model.expect(samples.num_classes), device)
    begun = time.perf_counter()
    with evaluation_mode(model) as was_training, own_randomness(seed, "doctor"):
        try:
            measure(instrumented, x[:1], len(x))
        except (RuntimeError, MemoryError) as error:
            raise RunError(NO_MEMORY if is_out_of_memory(error) else described(error)) from error
        # The binarization check needs gradients.
        probe = Probe(
            instrumented, x, labels, threat, attacks, seed, None if instrumented.backward_error else model
        )
        with torch.no_grad():
            logits = instrumented(x)
        check_logits(logits, samples.labels, np.arange(len(samples)))
        with threads(instrumented.threads):
            flags = [flag for flag in diagnose(probe) if flag.raised]
        flags += noticed(0, 0, instrumented) if instrumented.backward_error else []
        flags += training_mode(was_training, training_count(model))
        flags += enlarged_images(pixel_space(model, samples))
        predictions = logits.argmax(1)
        correct = int((predictions == labels).sum())
        flags += label_checks(predictions.tolist(), samples.labels.tolist(), logits.shape[1])
        flags += samples.flags
    return Diagnosis(
        model=model.string,
        data=samples.name,
        threat=str(threat),
        n=len(samples),
        correct=correct,
        classes=logits.shape[1],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flags=flags,
        cost=Cost(instrumented.forwards, instrumented.backwards, time.perf_counter() - begun),
    )
