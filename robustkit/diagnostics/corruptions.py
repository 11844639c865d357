"""The accuracy of a model on common corruptions (Hendrycks & Dietterich 2019, arXiv:1903.12261)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from robustkit.checks.relabelled import label_checks
from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.flags import Flag
from robustkit.core.isolation import evaluation_mode, own_randomness, threads
from robustkit.data.corruptions.names import NAMES, SEVERITIES
from robustkit.data.corruptions.samples import CorruptedFiles, corrupted
from robustkit.data.corruptions.table import CORRUPTIONS
from robustkit.data.prefetch import read_ahead
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.sanity import check_labels
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.engine.progress import Progress
from robustkit.models.classifier import Classifier
from robustkit.runs import run_folder
from robustkit.runs.corruption_record import Corruptions, CorruptionSpec
from robustkit.runs.environment import environment
from robustkit.runs.opening import finished_before, open_for_writing
from robustkit.runs.report_parts import Cost, Rate
from robustkit.runs.unfinished_work import Store, decoded, encoded

BATCH = 256
IMAGENET_CLASSES = 1000
# The two-sided 95 % quantile of the normal distribution.
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class CorruptionRequest:
    """What to evaluate.

    Attributes:
        model: the classifier.
        samples: clean images, or those of a folder of corrupted ones.
        corruptions: names; all for none.
        severities: from 1 to 5.
        seed: of a random model's numbers; corruptions depend on the image alone.
        device: where to compute.
    """

    model: Classifier
    samples: Samples
    corruptions: Sequence[str] = ()
    severities: Sequence[int] = SEVERITIES
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Check the values; UsageError for a corruption or severity that does not exist."""
        for name in self.corruptions:
            if name not in NAMES:
                raise did_you_mean("corruption", name, NAMES)
        for severity in self.severities:
            if severity not in SEVERITIES:
                raise UsageError(f"there is no severity {severity}; write numbers from 1 to 5.")
        if not self.severities:
            raise UsageError("no severity is given; write at least one, from 1 to 5.")
        self.model.expect(self.samples.num_classes)

    @cached_property
    def spec(self) -> CorruptionSpec:
        """Everything that determines the numbers."""
        samples = self.samples
        chosen = set(self.corruptions) or set(NAMES)
        return CorruptionSpec(
            model={"string": self.model.string, "fingerprint": self.model.fingerprint},
            data={"string": samples.name, "n": len(samples), "fingerprint": samples.fingerprint},
            corruptions=[name for name in NAMES if name in chosen],
            severities=sorted(set(self.severities)),
            seed=self.seed,
        )

    def run(
        self, out: Path | None = None, progress: Progress | None = None, overwrite: bool = False
    ) -> Corruptions:
        """Evaluate the model; or return the stored record of the same run. A killed run resumes.

        Args:
            out: the run folder; None writes nothing.
            progress: receives events.
            overwrite: delete the run in `out` first.

        Raises:
            UsageError: the data cannot be read or do not fit the model, or `out` holds another run.
        """
        progress = progress or Progress()
        if out is None:
            return self._run(progress, Store(None))
        with open_for_writing(out, self.spec, overwrite=overwrite, say=progress.say):
            if (out / run_folder.CORRUPTIONS).is_file():
                progress.say(finished_before(self.spec.run_id))
                return run_folder.read_corruptions(out)
            store = Store(out / run_folder.UNFINISHED, self.spec.run_id)
            record = self._run(progress, store)
            run_folder.write_record(out, record)
            store.clear()
        return record

    def _run(self, progress: Progress, store: Store) -> Corruptions:
        begun = time.perf_counter()
        instrumented = InstrumentedModel(self.model, self.device)
        sets = dict(self._sets())
        before = {name: record["predictions"] for name, record in _stored(store).items()}
        with evaluation_mode(self.model):
            first = next(iter(sets.values())).images([0])
            measure(instrumented, first.to(self.device), BATCH)
            check_labels(self.samples, self.model.string, instrumented.num_classes or 0)
            predictions: dict[str, np.ndarray] = {}
            try:
                with threads(instrumented.threads):
                    for name, samples in sets.items():
                        n = len(samples)
                        progress.stage(name.replace("_", " "), n, n, n)
                        if name in before:
                            predictions[name] = before[name].numpy()
                            continue
                        predictions[name] = self._predict(instrumented, name, samples, progress)
                        kept = encoded({"name": name, "predictions": torch.from_numpy(predictions[name])})
                        store.append("corruptions", kept)
            finally:
                progress.close()
        return self._record(predictions, instrumented, time.perf_counter() - begun)

    def _sets(self) -> dict[str, Samples]:
        """Return the samples of each accuracy by name: `clean`, if there are clean images, and NAME@SEVERITY."""
        spec = self.spec
        clean = {} if isinstance(self.samples.source, CorruptedFiles) else {"clean": self.samples}
        return clean | {
            f"{name}@{severity}": corrupted(self.samples, name, severity)
            for name in spec.corruptions
            for severity in spec.severities
        }

    def _predict(
        self, instrumented: InstrumentedModel, name: str, samples: Samples, progress: Progress
    ) -> np.ndarray:
        """Return the predictions (N), -1 for non-finite logits."""
        found: list[torch.Tensor] = []
        every = np.arange(len(samples))
        done = right = 0
        for positions, images in read_ahead(samples, np.split(every, every[BATCH::BATCH])):
            with own_randomness(self.seed, "corrupt", name, int(positions[0])):
                logits = instrumented.logits_fp32(images.to(self.device))
            found.append(torch.where(logits.isfinite().all(1), logits.argmax(1), -1).cpu())
            done += len(positions)
            right += int((found[-1].numpy() == samples.labels[positions]).sum())
            progress.advance(done, len(samples) - done + right)
        return torch.cat(found).numpy()

    def _record(
        self, predictions: dict[str, np.ndarray], instrumented: InstrumentedModel, seconds: float
    ) -> Corruptions:
        spec, labels, n = self.spec, self.samples.labels, len(self.samples)
        right = {name: one == labels for name, one in predictions.items()}
        accuracy = {
            name: [Rate.of(int(right[f"{name}@{severity}"].sum()), n) for severity in spec.severities]
            for name in spec.corruptions
        }
        per_image = np.mean([one for name, one in right.items() if name != "clean"], axis=0)
        clean = Rate.of(int(right["clean"].sum()), n) if "clean" in right else None
        return Corruptions(
            run_id=spec.run_id,
            spec=spec,
            n=n,
            clean=clean,
            accuracy=accuracy,
            mean=_mean(per_image),
            cost=Cost(instrumented.forwards, 0, seconds),
            relative_error=_relative_error(accuracy, spec, instrumented.num_classes),
            environment=environment(self.device, "fp32", instrumented.micro_batch, instrumented.threads),
            flags=self._flags(predictions.get("clean"), instrumented.num_classes or 2),
        )

    def _flags(self, clean: np.ndarray | None, classes: int) -> list[Flag]:
        flags = list(self.samples.flags)
        if clean is not None:
            flags += label_checks(clean.tolist(), self.samples.labels.tolist(), classes)
        return flags


def _stored(store: Store) -> dict[str, dict[str, torch.Tensor]]:
    records = [decoded(body) for body in store.read("corruptions")]
    return {record["name"]: record for record in records}


def _mean(per_image: np.ndarray) -> Rate:
    """Return the mean of images' accuracies (N) with its normal 95 % interval; images are independent."""
    mean, n = float(per_image.mean()), len(per_image)
    half = NORMAL_95 * float(per_image.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    return Rate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def _relative_error(accuracy: dict[str, list[Rate]], spec: CorruptionSpec, classes: int | None) -> float | None:
    """Return ImageNet-C's mean corruption error relative to AlexNet, where it is defined."""
    whole = tuple(spec.corruptions) == NAMES and tuple(spec.severities) == SEVERITIES
    if classes != IMAGENET_CLASSES or not whole:
        return None
    errors = [
        (1 - sum(rate.value for rate in rates) / len(rates)) / CORRUPTIONS[name].alexnet
        for name, rates in accuracy.items()
    ]
    return sum(errors) / len(errors)
