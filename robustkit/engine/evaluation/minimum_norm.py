"""The nearest adversarial points of images: attacks in turn, each told of the nearest points found before it."""

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
from robustkit.core.shapes import Images, Labels, PerRow
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.nearest_points import MinimumNorm
from robustkit.engine.evaluation.sanity import refuse_answers, refuse_randomness
from robustkit.engine.evaluation.verdicts import Verdicts, image_hashes, judge, sample_ids
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.engine.model.random_verdicts import is_random
from robustkit.models.classifier import Classifier
from robustkit.registry import Suite, SuiteEntry, parse_suite
from robustkit.runs.recorded_outputs import run_once

# The margin that an adversarial point must have, as a share of the largest logit: twice what `verify` takes for
# rounding.
CLEAR = 2e-5


@dataclass(frozen=True)
class Nearest:
    """The nearest adversarial points of a batch.

    Attributes:
        judged: the points with the model's answers; the clean image where none was found.
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
        threat: a minimal one.
        seed: of the run.
        ids: the images' own numbers (B), by which they draw.
    """
    goal, spent = Goal(labels, clear=CLEAR), list[tuple[int, int]]()
    best = judge(instrumented, x, labels, x, threat)
    distance = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    by = torch.full_like(labels, -1)
    for number, (entry, stream) in enumerate(zip(entries, _streams(entries), strict=True)):
        before = instrumented.forwards, instrumented.backwards
        rng = RowRng(seed, stream, ids)
        attack = partial(entry.attack, instrumented, x, goal, threat, rng=rng, known=best.x)
        found = run_once(stream, partial(_counted, instrumented, attack))
        # What a killed run had done already counts as well.
        instrumented.forwards, instrumented.backwards = (
            before[0] + found["forwards"],
            before[1] + found["backwards"],
        )
        judged = judge(instrumented, x, labels, found["x"], threat)
        far = torch.where(judged.fooled, threat.distance(judged.x, x), torch.inf)
        nearer = (far < distance).nonzero()[:, 0]
        best = best.replaced(nearer, judged.select((far < distance).cpu().numpy()))
        distance, by = torch.minimum(far, distance), by.index_fill(0, nearer, number)
        spent.append((instrumented.forwards - before[0], instrumented.backwards - before[1]))
    return Nearest(best, distance, by, spent)


def _counted(instrumented: InstrumentedModel, attack: Callable[[], Images]) -> dict[str, Any]:
    """Run an attack; return its points and its passes."""
    before = instrumented.forwards, instrumented.backwards
    return {
        "x": attack(),
        "forwards": instrumented.forwards - before[0],
        "backwards": instrumented.backwards - before[1],
    }


def _streams(entries: Sequence[SuiteEntry]) -> list[str]:
    """Return the name of each attack's random numbers: its own, and how often it occurred before."""
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
    entries = parse_suite(suite, threat.norm, minimal=True)
    instrumented = InstrumentedModel(model.expect(samples.num_classes), device)
    points, distances, names = [], [], list[str | None]()
    with evaluation_mode(model), own_randomness(seed, "minimum-norm"):
        image = samples.images([0]).to(device)
        measure(instrumented, image, batch_size)
        refuse_randomness(threat, random=is_random(instrumented.model, image))
        instrumented.forwards = instrumented.backwards = 0
        with threads(instrumented.threads):
            for begin in range(0, len(samples), batch_size):
                part = np.arange(begin, min(begin + batch_size, len(samples)))
                x, labels = samples.images(part).to(device), samples.labels[part]
                logits = instrumented.logits_fp32(x)
                refuse_answers(logits, labels, part)
                y = torch.from_numpy(labels).to(device)
                right = (logits.argmax(1) == y).nonzero()[:, 0]
                ids = sample_ids(image_hashes(x)).to(device)
                found = search(instrumented, entries, x[right], y[right], threat, seed=seed, ids=ids[right])
                far = torch.zeros(len(x), dtype=torch.float64, device=device)
                points.append(x.index_copy(0, right, found.judged.x))
                distances.append(far.index_copy(0, right, found.distance))
                told: list[str | None] = ["clean"] * len(x)
                for at, number in zip(right.tolist(), found.attack.tolist(), strict=True):
                    told[at] = entries[number].name if number >= 0 else None
                names += told
    return MinimumNorm(
        torch.cat(points), torch.cat(distances), names, instrumented.forwards, instrumented.backwards
    )
