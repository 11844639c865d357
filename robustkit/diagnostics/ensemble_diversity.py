"""Diversity of an ensemble: which members adversarial images made on each member fool, and shared features.

The protocol is that of DVERGE's evaluation (Yang et al. 2020, arXiv:2009.14720), with the bounds of an oracle
in addition. The attack is `robustkit.diagnostics.ensemble_members`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkit.checks.chance import chance_accuracy
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.core.isolation import evaluation_mode, own_randomness, threads
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Mask
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.diagnostics.ensemble_members import EnsembleMembers, attack, each_loss, loss, transferred
from robustkit.engine.evaluation.sanity import check_eps, check_labels
from robustkit.engine.progress import Progress
from robustkit.models.classifier import Classifier
from robustkit.models.layers.features import depth, distil
from robustkit.runs import run_folder
from robustkit.runs.diversity_record import Bounds, Diversity, DiversitySpec
from robustkit.runs.environment import environment
from robustkit.runs.opening import finished_before, open_for_writing
from robustkit.runs.report_parts import Cost, Rate
from robustkit.training import ensemble_utils

# The published protocol: pairs per random layer, and the distillation.
PAIRS_PER_LAYER = 10
DISTILLATION: dict[str, Any] = {"eps": 0.07, "step_size": 0.1, "steps": 10, "inertia": 1.0}
BATCH_CPU, BATCH_GPU = 250, 1000


@dataclass(frozen=True)
class DiversityRequest:
    """The members to compare and the attack.

    Attributes:
        model: an ensemble.
        samples: images to attack.
        threat: the threat model.
        steps: of each attack, each a fifth of eps.
        restarts: random starts for each image.
        seed: of every random number.
        images: positions to use, to compare ensembles on the same ones; None for all.
        device: where to compute.
    """

    model: Classifier
    samples: Samples
    threat: ThreatModel
    steps: int = 50
    restarts: int = 5
    seed: int = 0
    images: Sequence[int] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Check the values; UsageError for one out of range."""
        for name, number in (("steps", self.steps), ("restarts", self.restarts)):
            if number < 1:
                raise UsageError(f"--{name} {number}: write at least 1.")
        self.model.expect(self.samples.num_classes)
        check_eps(self.threat.bounded(), tuple(self.samples.images([0]).shape[1:]))

    @cached_property
    def spec(self) -> DiversitySpec:
        """Everything that determines the numbers."""
        samples = self.samples
        return DiversitySpec(
            model={"string": self.model.string, "fingerprint": self.model.fingerprint},
            data={"string": samples.name, "n": len(samples), "fingerprint": samples.fingerprint},
            threat=str(self.threat),
            steps=self.steps,
            restarts=self.restarts,
            seed=self.seed,
            images=None if self.images is None else sorted({int(position) for position in self.images}),
        )

    def run(self, out: Path | None = None, progress: Progress | None = None, overwrite: bool = False) -> Diversity:
        """Attack, distil, compare; or return the stored record of the same run.

        Args:
            out: the run folder; None writes nothing.
            progress: receives events.
            overwrite: delete the run in `out` first.

        Raises:
            UsageError: if the model has no members, or `out` holds another run.
        """
        progress = progress or Progress()
        if out is None:
            return self._run(progress)
        with open_for_writing(out, self.spec, overwrite=overwrite, say=progress.say):
            if (out / run_folder.DIVERSITY).is_file():
                progress.say(finished_before(self.spec.run_id))
                return run_folder.read_diversity(out)
            record = self._run(progress)
            run_folder.write_record(out, record)
        return record

    def _run(self, progress: Progress) -> Diversity:
        begun = time.perf_counter()
        positions = np.arange(len(self.samples)) if self.images is None else np.array(self.spec.images, np.int64)
        if not len(positions):
            raise UsageError("no image is left to compare on; use more with --limit.")
        with evaluation_mode(self.model), own_randomness(self.seed, "diversity"):
            ensemble = EnsembleMembers(self.model, self.device)
            most = BATCH_CPU if ComputeDevice(self.device).is_cpu else BATCH_GPU
            ensemble.measure(self._images(positions[:1]), most)
            check_labels(self.samples, self.model.string, ensemble.whole.num_classes or 0)
            with threads(ensemble.whole.threads):
                try:
                    return self._compare(ensemble, positions, ensemble.whole.micro_batch or most, progress, begun)
                finally:
                    progress.close()

    def _compare(
        self, ensemble: EnsembleMembers, positions: np.ndarray, most: int, progress: Progress, begun: float
    ) -> Diversity:
        clean = torch.cat(
            [ensemble.predictions(self._images(part)) != self._labels(part) for part in _batches(positions, most)],
            1,
        ).cpu()
        index = positions[~clean[:-1].any(0).numpy()]
        if len(index) < 2:
            raise UsageError(
                f"{len(index)} of {len(positions)} images are classified correctly by every member, and a "
                "comparison needs two; use more with --limit, or check labels, normalisation and pixel range."
            )
        fooled, lost = [], []
        for number in range(ensemble.count):
            progress.stage(f"on member {number}", len(index), len(index), len(index))
            rows = []
            for part in _batches(index, most):
                rows.append(
                    attack(
                        ensemble,
                        number,
                        self._images(part),
                        self._labels(part),
                        self.threat,
                        self._rng(part),
                        steps=self.steps,
                        restarts=self.restarts,
                    )
                )
                progress.advance(sum(len(row[1]) for row in rows), len(index))
            fooled.append(torch.cat([row[0] for row in rows], 1).cpu())
            lost.append(torch.cat([row[1] for row in rows]).cpu())
        progress.stage("distillation", 1, 1, 1)
        confusion, layers = self._confusion(ensemble, index, most)
        cosine = self._cosine(ensemble, index, most)
        forwards, backwards = ensemble.counts
        table = torch.stack(fooled)
        return Diversity(
            run_id=self.spec.run_id,
            spec=self.spec,
            members=ensemble.count,
            n=len(positions),
            index=[int(position) for position in index],
            accuracy=[_share(~row) for row in clean],
            clean=_bounds(clean, clean[:-1].all(0)),
            transfer=[[_share(cell) for cell in row] for row in table],
            worst=[_share(column) for column in transferred(table)],
            attacked=[_bounds(row, none) for row, none in zip(table, lost, strict=True)],
            confusion=confusion.tolist(),
            diversity=((confusion + confusion.T) / 2).tolist(),
            cosine=cosine.tolist(),
            distillation={**DISTILLATION, "layers": layers},
            cost=Cost(forwards, backwards, time.perf_counter() - begun),
            environment=environment(self.device, "fp32", ensemble.whole.micro_batch, ensemble.whole.threads),
            flags=self._flags(~clean, positions),
        )

    def _flags(self, right: Mask, positions: np.ndarray) -> list[Flag]:
        """Return the flags of the data, and of members (rows of `right`, the ensemble last) at chance."""
        labels, classes = self.samples.labels[positions].tolist(), self.model.num_classes or 2
        names = [*(f"member {number}" for number in range(len(right) - 1)), "the ensemble"]
        flags = [
            chance_accuracy(int(row.sum()), labels, classes, name) for name, row in zip(names, right, strict=True)
        ]
        return [*self.samples.flags, *(flag for flag in flags if flag is not None)]

    def _confusion(self, ensemble: EnsembleMembers, index: np.ndarray, most: int) -> tuple[Tensor, list[int]]:
        """Return L (N, N) and the layer of each group of pairs.

        Each image is paired with the next one in a random order. In eval mode a result does not depend on the
        batch, so groups with the same layer run together.
        """
        rng = self._rng(index, "partners")
        order = rng.integers(2**31, 1)[:, 0].argsort(stable=True).cpu().numpy()
        source, target = index[order], index[np.roll(order, -1)]
        groups = -(-len(index) // PAIRS_PER_LAYER)
        with torch.no_grad():
            depths = [
                depth(ensemble.member(number).model, self._images(index[:1])) for number in range(ensemble.count)
            ]
        draw = RowRng(self.seed, "diversity/layer", torch.arange(groups)).uniform(1)[:, 0].numpy()
        total = torch.zeros(ensemble.count, ensemble.count, dtype=torch.float64)
        for number, layers in enumerate(depths):
            of_pair = np.repeat(1 + (draw * layers).astype(np.int64), PAIRS_PER_LAYER)[: len(index)]
            for layer in np.unique(of_pair):
                for part in _batches(np.flatnonzero(of_pair == layer), most):
                    x, t = self._images(source[part]), self._images(target[part])
                    made = distil(ensemble.member(number).model, x, t, int(layer), **DISTILLATION)
                    total[number] += each_loss(ensemble, made, self._labels(target[part]))
        return total / len(index), [1 + int(one * depths[0]) for one in draw]

    def _cosine(self, ensemble: EnsembleMembers, index: np.ndarray, most: int) -> Tensor:
        total = torch.zeros(ensemble.count * (ensemble.count - 1) // 2, dtype=torch.float64)
        for part in _batches(index, most):
            x, labels = self._images(part), self._labels(part)
            slopes = torch.stack([_slope(ensemble.member(number), x, labels) for number in range(ensemble.count)])
            total += ensemble_utils.pairwise_cosines(slopes).double().sum(1).cpu()
        table = torch.eye(ensemble.count, dtype=torch.float64)
        one, other = torch.triu_indices(ensemble.count, ensemble.count, 1)
        table[one, other] = table[other, one] = total / len(index)
        return table

    def _images(self, positions: np.ndarray) -> Images:
        return self.samples.images(positions).to(self.device)

    def _labels(self, positions: np.ndarray) -> Labels:
        return torch.from_numpy(self.samples.labels[positions].astype(np.int64)).to(self.device)

    def _rng(self, positions: np.ndarray, stream: str = "attack") -> RowRng:
        return RowRng(self.seed, f"diversity/{stream}", torch.from_numpy(positions).to(self.device))


def _slope(model: Callable[[Images], Tensor], x: Images, labels: Labels) -> Tensor:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        return torch.autograd.grad(loss(model, labels, point).sum(), point)[0].flatten(1)


def _batches(positions: np.ndarray, most: int) -> list[np.ndarray]:
    return [positions[begin : begin + most] for begin in range(0, len(positions), most)]


def _share(hits: Mask) -> Rate:
    return Rate.of(int(hits.sum()), len(hits))


def _bounds(wrong: Mask, none: Mask) -> Bounds:
    """Return the bounds from who misclassifies (N + 1, n) and where no member is right (n)."""
    right = ~wrong[:-1]
    best: Any = max((_share(row) for row in right), key=lambda rate: rate.value)
    return Bounds(ensemble=_share(~wrong[-1]), best=best, any=_share(~none), all=_share(right.all(0)))
