"""The nearest adversarial points of a batch: attacks in turn, each from where those before it have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from robustkit.data.samples import Samples
from robustkit.engine.judge import image_hashes, judge, sample_ids
from robustkit.engine.meter import Meter
from robustkit.engine.sanity import refuse_answers
from robustkit.goal import Goal
from robustkit.isolation import evaluation_mode, own_randomness, threads
from robustkit.minimum import MinimumNorm
from robustkit.models.classifier import Classifier
from robustkit.registry import parse_suite
from robustkit.rng import RowRng
from robustkit.shapes import Images, Labels, Mask
from robustkit.threat import ThreatModel, per_row

# By how much the model must be wrong, as a share of its largest logit: twice what `verify` takes for rounding.
CLEAR = 2e-5


class Nearer(NamedTuple):
    """What one attack found: the nearest points by now (B C H W), and where they are this attack's (B)."""

    x: Images
    found: Mask


def search(
    meter: Meter,
    attacks: Sequence[Any],
    streams: Sequence[str],
    x: Images,
    labels: Labels,
    threat: ThreatModel,
    *,
    seed: int,
    ids: Labels,
) -> Iterator[Nearer]:
    """Yield after each attack the nearest points so far, the clean image where there is none.

    Args:
        meter: the model.
        attacks: that can look for the nearest point.
        streams: the name of each one's random numbers.
        x: images (B C H W) that the model gets right.
        labels: of these (B).
        threat: a minimal one.
        seed: of the run.
        ids: the images' own numbers (B).
    """
    nearest, goal = x, Goal(labels, clear=CLEAR)
    for attack, stream in zip(attacks, streams, strict=True):
        point = attack(meter, x, goal, threat, rng=RowRng(seed, stream, ids), known=nearest)
        point = judge(meter, x, labels, point, threat)
        far = torch.where(point.fooled, threat.distance(point.x, x), torch.inf)
        before = threat.distance(nearest, x)
        found = far < torch.where(before > 0, before, torch.inf)
        nearest = torch.where(per_row(found, x), point.x, nearest)
        yield Nearer(nearest, found)


def nearest_points(
    model: Classifier,
    samples: Samples,
    threat: ThreatModel,
    *,
    suite: str,
    seed: int,
    device: torch.device,
    batch_size: int,
) -> MinimumNorm:
    """Return the nearest adversarial point of each sample; see `robustkit.minimum_norm`."""
    rungs = parse_suite(suite, threat.norm, minimal=True)
    attacks, names = [rung.attack for rung in rungs], [rung.name for rung in rungs]
    meter = Meter(model.expect(samples.num_classes), device)
    points, distances, by = [], [], list[str | None]()
    with evaluation_mode(model), own_randomness(seed, "minimum-norm"):
        meter.size_up(samples.images([0]).to(device), batch_size)
        with threads(meter.threads):
            for begin in range(0, len(samples), batch_size):
                part = np.arange(begin, min(begin + batch_size, len(samples)))
                x, labels = samples.images(part).to(device), samples.labels[part]
                y = torch.from_numpy(labels).to(device)
                logits = meter.exact(x)
                refuse_answers(logits, labels, part)
                right = (logits.argmax(1) == y).nonzero()[:, 0]
                ids = sample_ids(image_hashes(x)).to(device)[right]
                number = torch.full_like(right, -1)
                point = x[right]
                for stage, step in enumerate(
                    search(meter, attacks, streams(names), x[right], y[right], threat, seed=seed, ids=ids)
                ):
                    point, number = step.x, torch.where(step.found, stage, number)
                far = torch.where(number < 0, torch.inf, threat.distance(point, x[right]))
                points.append(x.index_copy(0, right, point))
                distances.append(torch.zeros(len(x), dtype=torch.float64, device=device).index_copy(0, right, far))
                told: list[str | None] = ["clean"] * len(x)
                for at, stage in zip(right.tolist(), number.tolist(), strict=True):
                    told[at] = names[stage] if stage >= 0 else None
                by += told
    return MinimumNorm(torch.cat(points), torch.cat(distances), by, meter.forwards, meter.backwards)


def streams(names: Sequence[str]) -> list[str]:
    """Return the name of each attack's random numbers: its own, and how often it was there before."""
    return [f"{name}/{names[:number].count(name)}" for number, name in enumerate(names)]
