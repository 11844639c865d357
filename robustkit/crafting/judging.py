"""Predictions of target models on crafted images, on the clean ones, and on controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from robustkit.checks.relabelled import label_checks
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

EVALUATION_BATCH_SIZE = 256


class ImageArray(Protocol):
    """Images (N C H W) indexed by positions, in memory or read on access."""

    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray:
        """Return the images at these positions."""


@dataclass(frozen=True)
class TargetEvaluator:
    """Evaluates models on images of these samples.

    `goals` are target classes by position, None for an untargeted attack; the `store` keeps model outputs of
    unfinished work.
    """

    samples: Samples
    threat: ThreatModel
    goals: Sequence[int] | None
    seed: int
    device: torch.device
    batch: int = EVALUATION_BATCH_SIZE
    store: Store = field(default_factory=lambda: Store(None))

    def judge(self, net: Net, adversarial: ImageArray, *, controls: bool) -> Judgement:
        """Return predictions on clean and adversarial images (N C H W); `controls` adds noise and transplants."""
        images_by_name: dict[str, Callable[[np.ndarray, Images], Images]] = {
            "clean": lambda positions, x: x,
            "adversarial": lambda positions, x: self._on_device(adversarial[positions]),
        }
        if controls:
            images_by_name["noise"] = self.noise
        if controls and len(self.samples) > 1:
            images_by_name["transplant"] = lambda positions, x: self.transplant(adversarial, positions, x)
        return Judgement.of(
            net.identity, self.samples.labels.tolist(), self.goals, self._predict(net, images_by_name)
        )

    def predictions(self, net: Net, images: ImageArray) -> list[int]:
        """Return a net's prediction for each image; -1 for non-finite logits."""
        predictions: list[int] = self._predict(
            net, {"images": lambda positions, x: self._on_device(images[positions])}
        )["images"]
        return predictions

    def noise(self, positions: np.ndarray, x: Images) -> Images:
        """Return the images at these positions plus random signs of length eps in the threat's norm."""
        draws = RowRng(self.seed, "noise", torch.from_numpy(positions).to(self.device)).uniform(*x.shape[1:])
        signs = torch.where(draws < 0.5, -1.0, 1.0).to(x)
        length = self.threat.distance(signs, torch.zeros_like(signs)).to(x)
        return self.threat.project(x + float(self.threat.eps) * signs / per_row(length, x), x)

    def transplant(self, adversarial: ImageArray, positions: np.ndarray, x: Images) -> Images:
        """Return the images at these positions with the perturbation of the next one."""
        others = (positions + 1) % len(self.samples)
        change = self._on_device(adversarial[others]) - self.samples.images(others).to(self.device)
        return self.threat.project(x + change, x)

    def _predict(
        self, net: Net, images_by_name: dict[str, Callable[[np.ndarray, Images], Images]]
    ) -> dict[str, Any]:
        model = net.load(self.device)
        instrumented = InstrumentedModel(model, self.device)
        predictions: dict[str, list[int]] = {name: [] for name in images_by_name}
        work = f"judge-{net.fingerprint[:12]}-{'-'.join(images_by_name)}"
        with evaluation_mode(model), threads(net.threads), recording(self.store, work) as record:
            measure(instrumented, self.samples.images([0]).to(self.device), self.batch)
            every = np.arange(len(self.samples))
            for positions, images in read_ahead(self.samples, np.split(every, every[self.batch :: self.batch])):
                x = images.to(self.device)
                for name, make in images_by_name.items():
                    with own_randomness(self.seed, "judge", name, int(positions[0])):
                        logits = instrumented.logits_fp32(make(positions, x))
                    finite = logits.isfinite().all(1)
                    predictions[name] += torch.where(finite, logits.argmax(1), -1).tolist()
            record.restart()
        return predictions

    def _on_device(self, images: np.ndarray) -> Images:
        return torch.from_numpy(np.ascontiguousarray(images)).to(self.device)


def clean_flags(judgements: Sequence[Judgement], labels: Sequence[int], classes: int) -> list[Flag]:
    """Return the flags of several models' predictions on the clean images."""
    return [
        flag for one in judgements for flag in label_checks(one.predictions["clean"], labels, classes, one.model)
    ]
