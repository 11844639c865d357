"""The members of an ensemble against each other: who is fooled by whose adversarial images, and who sees alike.

The protocol is that of DVERGE's evaluation (Yang et al. 2020, arXiv:2009.14720), with the bounds of an oracle
beside it. An attack runs to its last step whether or not it has fooled the member it is made on, since images that
only just fool that one fool few others. Images leave when no restart could change a number any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit import inner
from robustkit.data.samples import Samples
from robustkit.diverse import Bounds, Diversity, DiversitySpec
from robustkit.engine import folder
from robustkit.engine.environment import environment
from robustkit.engine.meter import Meter
from robustkit.engine.progress import Progress
from robustkit.engine.sanity import refuse_endless
from robustkit.errors import UsageError
from robustkit.features import depth, distil
from robustkit.isolation import evaluation_mode, own_randomness, threads
from robustkit.models.classifier import Classifier
from robustkit.models.mixture import Mixture
from robustkit.record import Cost, Rate
from robustkit.rng import RowRng
from robustkit.shapes import Images, Labels, Mask
from robustkit.threat import ThreatModel

# Of the published protocol: a step as a share of eps; pairs that share one draw of the layer; its distillation.
STEP_SIZE, PAIRS = 0.2, 10
DISTILLATION: dict[str, Any] = {"eps": 0.07, "step_size": 0.1, "steps": 10, "inertia": 1.0}
BATCH_CPU, BATCH_GPU = 250, 1000


class Panel:
    """The members of an ensemble one by one, and the ensemble behind them, counted."""

    def __init__(self, model: Classifier, device: torch.device) -> None:
        """Take an ensemble; UsageError if the model has no members."""
        if not isinstance(model.net, Mixture) or len(model.net) < 2:
            raise UsageError(
                f"{model.string} has no members to compare; give the run folder of an ensemble, as "
                "robustkit train deep-ensemble writes it."
            )
        if model.defenses:
            raise UsageError(f"{model.string} has a defense in front of its members; leave the defense out.")
        self.model, self.mixture, self.device = model, model.net, device
        self.count = len(self.mixture)
        self.meters = [Meter(model.with_net(self.mixture.place(number)), device) for number in range(self.count)]
        self.whole = Meter(model, device)

    def size_up(self, image: Images, most: int) -> None:
        """Learn from one image how many fit into memory."""
        self.whole.size_up(image, most)
        for meter in self.meters:
            meter.piece = self.whole.piece

    def member(self, number: int) -> Meter:
        """Return a member, good until another is asked for."""
        self.mixture.at(number)
        return self.meters[number]

    @torch.no_grad()
    def wrong(self, x: Images, labels: Labels) -> Mask:
        """Return which members, and last whether the ensemble, are wrong (N + 1, B); NaN is no class."""
        said = [self.member(number).exact(x) for number in range(self.count)] + [self.whole.exact(x)]
        return torch.stack([(one.argmax(1) != labels) & one.isfinite().all(1) for one in said])

    @property
    def counts(self) -> tuple[int, int]:
        """Sample-propagations through members so far, forwards and backwards."""
        forwards = sum(meter.forwards for meter in self.meters) + self.count * self.whole.forwards
        return forwards, sum(meter.backwards for meter in self.meters)


@dataclass(frozen=True)
class Comparison:
    """What to compare, and how hard to attack.

    Attributes:
        model: an ensemble.
        samples: images to look at.
        threat: what the attacker may do.
        steps: of each attack, each a fifth of eps.
        restarts: random starts for each image.
        seed: of every random number.
        images: positions to look at, to compare ensembles on the same; None for all.
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
        """Refuse what cannot be meant."""
        for name, number in (("steps", self.steps), ("restarts", self.restarts)):
            if number < 1:
                raise UsageError(f"--{name} {number}: write at least 1.")
        refuse_endless(self.threat, tuple(self.samples.images([0]).shape[1:]))

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
            images=None if self.images is None else [int(place) for place in self.images],
        )

    def run(self, out: Path | None = None, progress: Progress | None = None) -> Diversity:
        """Attack, distil, compare; or return what a folder holds of the same.

        Raises:
            UsageError: for a request that cannot be carried out, or a folder of another run.
        """
        progress = progress or Progress()
        if out is None:
            return self._run(progress)
        with folder.open_for_writing(out, self.spec):
            if (out / folder.DIVERSITY).is_file():
                progress.say(f"run {self.spec.run_id} was finished before; this is its stored result")
                return folder.read_diversity(out)
            record = self._run(progress)
            folder.write_record(out, record)
        return record

    def _run(self, progress: Progress) -> Diversity:
        begun = time.perf_counter()
        places = np.arange(len(self.samples)) if self.images is None else np.asarray(self.images, np.int64)
        if not len(places):
            raise UsageError("no image is left to compare on; look at more with --limit.")
        with evaluation_mode(self.model), own_randomness(self.seed, "diversity"):
            panel = Panel(self.model, self.device)
            most = BATCH_CPU if self.device.type == "cpu" else BATCH_GPU
            panel.size_up(self._images(places[:1]), most)
            with threads(panel.whole.threads):
                try:
                    return self._compare(panel, places, most, progress, begun)
                finally:
                    progress.close()

    def _compare(self, panel: Panel, places: np.ndarray, most: int, progress: Progress, begun: float) -> Diversity:
        clean = torch.cat(
            [panel.wrong(self._images(at), self._labels(at)) for at in _batches(places, most)], 1
        ).cpu()
        index = places[~clean[:-1].any(0).numpy()]
        if len(index) < 2:
            raise UsageError(
                f"{len(index)} of {len(places)} images are classified correctly by every member, and two is the "
                "least to compare on; look at more with --limit, or train the members longer."
            )
        fooled, lost = [], []
        for number in range(panel.count):
            progress.stage(f"on member {number}", len(index), len(index), len(index))
            rows = []
            for at in _batches(index, most):
                rows.append(
                    attack(
                        panel,
                        number,
                        self._images(at),
                        self._labels(at),
                        self.threat,
                        self._rng(at),
                        steps=self.steps,
                        restarts=self.restarts,
                    )
                )
                progress.advance(sum(len(row[1]) for row in rows), len(index))
            fooled.append(torch.cat([row[0] for row in rows], 1).cpu())
            lost.append(torch.cat([row[1] for row in rows]).cpu())
        progress.stage("distillation", 1, 1, 1)
        confusion, layers = self._confusion(panel, index, most)
        cosine = self._cosine(panel, index, most)
        forwards, backwards = panel.counts
        table = torch.stack(fooled)
        return Diversity(
            run_id=self.spec.run_id,
            spec=self.spec,
            members=panel.count,
            n=len(places),
            index=[int(place) for place in index],
            accuracy=[_share(~row) for row in clean],
            clean=_bounds(clean, clean[:-1].all(0)),
            transfer=[[_share(cell) for cell in row] for row in table],
            worst=[_share(column) for column in by_others(table)],
            attacked=[_bounds(row, none) for row, none in zip(table, lost, strict=True)],
            confusion=confusion.tolist(),
            diversity=((confusion + confusion.T) / 2).tolist(),
            cosine=cosine.tolist(),
            distillation={**DISTILLATION, "layers": layers},
            cost=Cost(forwards, backwards, time.perf_counter() - begun),
            environment=environment(self.device, "fp32", panel.whole.piece, panel.whole.threads),
        )

    def _confusion(self, panel: Panel, index: np.ndarray, most: int) -> tuple[Tensor, list[int]]:
        """Return L (N, N) and the layer of each group of pairs.

        Each image is paired with the next one in an order drawn at random. In eval mode a sample does not know
        its batch, so groups with the same layer go through it together.
        """
        rng = self._rng(index, "partners")
        order = rng.integers(2**31, 1)[:, 0].argsort(stable=True).cpu().numpy()
        source, target = index[order], index[np.roll(order, -1)]
        groups = -(-len(index) // PAIRS)
        with torch.no_grad():
            depths = [depth(panel.member(number).model, self._images(index[:1])) for number in range(panel.count)]
        draw = RowRng(self.seed, "diversity/layer", torch.arange(groups)).uniform(1)[:, 0].numpy()
        total = torch.zeros(panel.count, panel.count, dtype=torch.float64)
        for number, layers in enumerate(depths):
            of_pair = np.repeat(1 + (draw * layers).astype(np.int64), PAIRS)[: len(index)]
            for layer in np.unique(of_pair):
                for at in _batches(np.flatnonzero(of_pair == layer), most):
                    x, t = self._images(source[at]), self._images(target[at])
                    made = distil(panel.member(number).model, x, t, int(layer), **DISTILLATION)
                    total[number] += each_loss(panel, made, self._labels(target[at]))
        return total / len(index), [1 + int(word * depths[0]) for word in draw]

    def _cosine(self, panel: Panel, index: np.ndarray, most: int) -> Tensor:
        total = torch.zeros(panel.count * (panel.count - 1) // 2, dtype=torch.float64)
        for at in _batches(index, most):
            x, labels = self._images(at), self._labels(at)
            slopes = torch.stack([_slope(panel.member(number), x, labels) for number in range(panel.count)])
            total += inner.cosines(slopes).double().sum(1).cpu()
        table = torch.eye(panel.count, dtype=torch.float64)
        one, other = torch.triu_indices(panel.count, panel.count, 1)
        table[one, other] = table[other, one] = total / len(index)
        return table

    def _images(self, places: np.ndarray) -> Images:
        return self.samples.images(places).to(self.device)

    def _labels(self, places: np.ndarray) -> Labels:
        return torch.from_numpy(self.samples.labels[places].astype(np.int64)).to(self.device)

    def _rng(self, places: np.ndarray, stream: str = "attack") -> RowRng:
        return RowRng(self.seed, f"diversity/{stream}", torch.from_numpy(places).to(self.device))


def attack(
    panel: Panel,
    number: int,
    x: Images,
    labels: Labels,
    threat: ThreatModel,
    rng: RowRng,
    *,
    steps: int,
    restarts: int,
) -> tuple[Mask, Mask]:
    """Return whom images made on a member fooled in any restart (N + 1, B), and where all members at once (B)."""
    fooled = torch.zeros(panel.count + 1, len(x), dtype=torch.bool, device=x.device)
    lost = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for restart in range(restarts):
        at = (~(fooled.all(0) & lost)).nonzero()[:, 0]
        if not len(at):
            break
        own = rng.select(at).at(restart=restart)
        model = panel.member(number)
        value = partial(_loss, model, labels[at])
        start = inner.random_start(x[at], threat, own)
        found = inner.ascend(value, start, x[at], threat, steps=steps, step_size=STEP_SIZE)
        wrong = panel.wrong(found, labels[at])
        fooled[:, at] |= wrong
        lost[at] |= wrong[:-1].all(0)
    return fooled, lost


def by_others(fooled: Mask) -> Mask:
    """Return who is fooled by images made on any other member (N + 1, n), of tables (N, N + 1, n)."""
    others = fooled.clone()
    members = torch.arange(len(fooled))
    others[members, members] = False
    return others.any(0)


@torch.no_grad()
def each_loss(panel: Panel, x: Images, labels: Labels) -> Tensor:
    """Return the sum of each member's cross-entropies (N), float64."""
    said = [panel.member(number).exact(x) for number in range(panel.count)]
    return torch.stack([F.cross_entropy(one.double(), labels, reduction="sum") for one in said]).cpu()


def _loss(model: Callable[[Images], Tensor], labels: Labels, x: Images) -> Tensor:
    return F.cross_entropy(model(x), labels, reduction="none")


def _slope(model: Callable[[Images], Tensor], x: Images, labels: Labels) -> Tensor:
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        return torch.autograd.grad(_loss(model, labels, at).sum(), at)[0].flatten(1)


def _batches(places: np.ndarray, most: int) -> list[np.ndarray]:
    return [places[begin : begin + most] for begin in range(0, len(places), most)]


def _share(hits: Mask) -> Rate:
    return Rate.of(int(hits.sum()), len(hits))


def _bounds(wrong: Mask, none: Mask) -> Bounds:
    """Return the bounds of who is wrong (N + 1, n) and where no member is right (n)."""
    right = ~wrong[:-1]
    best: Any = max((_share(row) for row in right), key=lambda rate: rate.value)
    return Bounds(ensemble=_share(~wrong[-1]), best=best, any=_share(~none), all=_share(right.all(0)))
