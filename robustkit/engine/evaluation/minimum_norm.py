"""The nearest adversarial points of images: attacks one after another, each from the nearest points so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from robustkit.core.criteria import Goal
from robustkit.core.isolation import evaluation_mode, own_randomness, threads
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Mask, PerRow
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.sanity import check_logits, check_not_random
from robustkit.engine.evaluation.verdicts import Verdicts, image_hashes, judge, sample_ids
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.engine.model.random_verdicts import is_random
from robustkit.models.classifier import Classifier
from robustkit.models.sources.built import GRADIENT
from robustkit.registry import Suite, SuiteEntry, parse_suite
from robustkit.runs.recorded_outputs import run_once

# The least margin of an adversarial point, as a share of the largest logit: twice the rounding in `verify`.
MIN_MARGIN_SHARE = 2e-5


@dataclass(frozen=True)
class MinimumNorm:
    """What `robustkit.minimum_norm` found.

    Attributes:
        x: the nearest adversarial images (B C H W); the clean image where none was found or it is misclassified.
        distance: of each from its clean image (B), float64, in pixel units of [0, 1]; 0 where the clean image is
            misclassified, infinite where none was found.
        attack: the name of the attack that found each one; `clean` for a misclassified clean image, None for none.
        forwards: forward passes of images, verdicts included.
        backwards: backward passes of images.
    """

    x: Images
    distance: PerRow
    attack: Sequence[str | None]
    forwards: int
    backwards: int

    @property
    def passes(self) -> float:
        """The mean number of passes per image, forward and backward."""
        return (self.forwards + self.backwards) / max(len(self.attack), 1)

    @property
    def found(self) -> Mask:
        """Whether each image has an adversarial one (B)."""
        return self.distance.isfinite()


@dataclass(frozen=True)
class Nearest:
    """The nearest adversarial points of a batch.

    Attributes:
        judged: verdicts on the points; the clean image where none was found.
        distance: of each from the clean image (B), float64; infinite where none was found.
        attack: the number of the attack that found it (B); -1 where none was found.
        spent: forwards and backwards of each attack, over all images.
    """

    judged: Verdicts
    distance: PerRow
    attack: Labels
    spent: Sequence[tuple[int, int]]


def search(
    instrumented: InstrumentedModel,
    entries: Sequence[SuiteEntry],
    x: Images,
    labels: Labels,
    threat: ThreatModel,
    *,
    seed: int,
    ids: Labels,
) -> Nearest:
    """Run attacks in turn and keep the nearest adversarial point of each image.

    Args:
        instrumented: the model.
        entries: attacks that find minimum norms.
        x: images (B C H W) that the model classifies correctly.
        labels: of these (B).
        threat: a minimum-norm threat.
        seed: of the run.
        ids: a number of each image (B), which seeds its random numbers.
    """
    goal, spent = Goal(labels, clear=MIN_MARGIN_SHARE), list[tuple[int, int]]()
    best = judge(instrumented, x, labels, x, threat)
    distance = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    found_by = torch.full_like(labels, -1)
    for number, (entry, stream) in enumerate(zip(entries, _streams(entries), strict=True)):
        before = instrumented.forwards, instrumented.backwards
        rng = RowRng(seed, stream, ids)
        attack = partial(entry.attack, instrumented, x, goal, threat, rng=rng, known=best.x)
        found = run_once(stream, partial(_counted, instrumented, attack))
        # Includes the passes of a killed run.
        instrumented.forwards, instrumented.backwards = (
            before[0] + found["forwards"],
            before[1] + found["backwards"],
        )
        judged = judge(instrumented, x, labels, found["x"], threat)
        length = torch.where(judged.fooled, threat.distance(judged.x, x), torch.inf)
        nearer = (length < distance).nonzero()[:, 0]
        best = best.replaced(nearer, judged.select((length < distance).cpu().numpy()))
        distance, found_by = torch.minimum(length, distance), found_by.index_fill(0, nearer, number)
        spent.append((instrumented.forwards - before[0], instrumented.backwards - before[1]))
    return Nearest(best, distance, found_by, spent)


def _counted(instrumented: InstrumentedModel, attack: Callable[[], Images]) -> dict[str, Any]:
    """Run an attack; return its points and its passes as values that can be recorded."""
    before = instrumented.forwards, instrumented.backwards
    return {
        "x": attack(),
        "forwards": instrumented.forwards - before[0],
        "backwards": instrumented.backwards - before[1],
    }


def _streams(entries: Sequence[SuiteEntry]) -> list[str]:
    """Return the name of each attack's random stream: its own, and how often it occurred before."""
    names = [entry.name for entry in entries]
    return [f"{name}/{names[:number].count(name)}" for number, name in enumerate(names)]


def nearest_points(
    model: Classifier,
    samples: Samples,
    threat: ThreatModel,
    *,
    suite: Suite,
    seed: int,
    device: torch.device,
    batch_size: int,
) -> MinimumNorm:
    """Return the nearest adversarial point of each sample; see `robustkit.minimum_norm`."""
    entries = parse_suite(suite, threat.norm, minimal=True, gradients=model.access == GRADIENT)
    instrumented = InstrumentedModel(model.expect(samples.num_classes), device)
    points, distances, names = [], [], list[str | None]()
    with evaluation_mode(model), own_randomness(seed, "minimum-norm"):
        image = samples.images([0]).to(device)
        measure(instrumented, image, batch_size)
        check_not_random(threat, random=is_random(instrumented.model, image))
        instrumented.forwards = instrumented.backwards = 0
        with threads(instrumented.threads):
            for begin in range(0, len(samples), batch_size):
                part = np.arange(begin, min(begin + batch_size, len(samples)))
                x, labels = samples.images(part).to(device), samples.labels[part]
                logits = instrumented.logits_fp32(x)
                check_logits(logits, labels, part)
                y = torch.from_numpy(labels).to(device)
                right = (logits.argmax(1) == y).nonzero()[:, 0]
                ids = sample_ids(image_hashes(x)).to(device)
                found = search(instrumented, entries, x[right], y[right], threat, seed=seed, ids=ids[right])
                length = torch.zeros(len(x), dtype=torch.float64, device=device)
                points.append(x.index_copy(0, right, found.judged.x))
                distances.append(length.index_copy(0, right, found.distance))
                found_by: list[str | None] = ["clean"] * len(x)
                for row, number in zip(right.tolist(), found.attack.tolist(), strict=True):
                    found_by[row] = entries[number].name if number >= 0 else None
                names += found_by
    return MinimumNorm(
        torch.cat(points), torch.cat(distances), names, instrumented.forwards, instrumented.backwards
    )
