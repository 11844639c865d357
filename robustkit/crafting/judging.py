"""What models make of crafted images: of the clean ones, of these, and of changes that nobody thought about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from robustkit.checks.relabelled import clean_doubts
from robustkit.core.flags import Flag
from robustkit.core.isolation import evaluation_mode, own_randomness, threads
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel, per_row
from robustkit.data.prefetch import read_ahead
from robustkit.data.samples import Samples
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.loaded_models import Net
from robustkit.engine.model.profiling import measure
from robustkit.runs.craft_record import Judgement
from robustkit.runs.recorded_outputs import recording
from robustkit.runs.unfinished_work import Store

BATCH_SIZE = 256


class Stack(Protocol):
    """Images (N C H W) that are read where they lie, by positions; an array is one."""

    def __getitem__(self, at: np.ndarray, /) -> np.ndarray:
        """Return the images at these positions."""


@dataclass(frozen=True)
class TargetEvaluator:
    """Asks models about images of these samples; `goals` are the classes wanted, None if any other will do.

    The `store` keeps the answers of unfinished judgements.
    """

    samples: Samples
    threat: ThreatModel
    goals: Sequence[int] | None
    seed: int
    device: torch.device
    batch: int = BATCH_SIZE
    store: Store = field(default_factory=lambda: Store(None))

    def judge(self, net: Net, adversarial: Stack, *, floors: bool) -> Judgement:
        """Return what a net makes of all images (N C H W), with the floors if asked to."""
        asked: dict[str, Callable[[np.ndarray, Images], Images]] = {
            "clean": lambda at, x: x,
            "adversarial": lambda at, x: self._there(adversarial[at]),
        }
        if floors:
            asked["noise"] = self.noise
        if floors and len(self.samples) > 1:
            asked["transplant"] = lambda at, x: self.transplant(adversarial, at, x)
        return Judgement.of(net.identity, self.samples.labels.tolist(), self.goals, self._ask(net, asked))

    def predictions(self, net: Net, images: Stack) -> list[int]:
        """Return the class that a net names for each image; -1 where its logits are not finite."""
        said: list[int] = self._ask(net, {"images": lambda at, x: self._there(images[at])})["images"]
        return said

    def noise(self, at: np.ndarray, x: Images) -> Images:
        """Return the images at these positions plus random signs, scaled to eps in the threat's norm."""
        draws = RowRng(self.seed, "noise", torch.from_numpy(at).to(self.device)).uniform(*x.shape[1:])
        signs = torch.where(draws < 0.5, -1.0, 1.0).to(x)
        length = self.threat.distance(signs, torch.zeros_like(signs)).to(x)
        return self.threat.project(x + float(self.threat.eps) * signs / per_row(length, x), x)

    def transplant(self, adversarial: Stack, at: np.ndarray, x: Images) -> Images:
        """Return the images at these positions with the change that was made for the next one."""
        others = (at + 1) % len(self.samples)
        change = self._there(adversarial[others]) - self.samples.images(others).to(self.device)
        return self.threat.project(x + change, x)

    def _ask(self, net: Net, asked: dict[str, Callable[[np.ndarray, Images], Images]]) -> dict[str, Any]:
        model = net.load(self.device)
        instrumented = InstrumentedModel(model, self.device)
        said: dict[str, list[int]] = {name: [] for name in asked}
        work = f"judge-{net.fingerprint[:12]}-{'-'.join(asked)}"
        with evaluation_mode(model), threads(net.threads), recording(self.store, work) as answers:
            measure(instrumented, self.samples.images([0]).to(self.device), self.batch)
            every = np.arange(len(self.samples))
            for at, images in read_ahead(self.samples, np.split(every, every[self.batch :: self.batch])):
                x = images.to(self.device)
                for name, make in asked.items():
                    with own_randomness(self.seed, "judge", name, int(at[0])):
                        logits = instrumented.logits_fp32(make(at, x))
                    finite = logits.isfinite().all(1)
                    said[name] += torch.where(finite, logits.argmax(1), -1).tolist()
            answers.restart()
        return said

    def _there(self, images: np.ndarray) -> Images:
        return torch.from_numpy(np.ascontiguousarray(images)).to(self.device)


def doubts_of(judgements: Sequence[Judgement], labels: Sequence[int], classes: int) -> list[Flag]:
    """Return the flags of what several models say of the clean images."""
    return [
        flag for one in judgements for flag in clean_doubts(one.predictions["clean"], labels, classes, one.model)
    ]
