"""The members of an ensemble one by one, and an attack on one of them evaluated on all.

The attack runs all its steps even after it has fooled the member it is made on, since images that barely fool it
fool few others. An image is done when no further restart can change a result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Mask
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.models.classifier import Classifier
from robustkit.models.ensembles.mixture import Mixture
from robustkit.training import ensemble_utils

# A step as a share of eps, as in DVERGE's evaluation.
STEP_SIZE = 0.2


class EnsembleMembers:
    """The members of an ensemble and the ensemble as a whole, with their passes counted."""

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
        self.instrumented_members = [
            InstrumentedModel(model.with_net(self.mixture.place(number)), device) for number in range(self.count)
        ]
        self.whole = InstrumentedModel(model, device)

    def measure(self, image: Images, most: int) -> None:
        """Learn from one image (1 C H W) how many fit into memory."""
        measure(self.whole, image, most)
        for instrumented in self.instrumented_members:
            instrumented.micro_batch = self.whole.micro_batch

    def member(self, number: int) -> InstrumentedModel:
        """Return a member, usable until the next call."""
        self.mixture.at(number)
        return self.instrumented_members[number]

    def predictions(self, x: Images) -> Tensor:
        """Return the predictions of the members, and last of the ensemble (N + 1, B); -1 for non-finite logits."""
        logits = [self.member(number).logits_fp32(x) for number in range(self.count)] + [self.whole.logits_fp32(x)]
        return torch.stack([torch.where(one.isfinite().all(1), one.argmax(1), -1) for one in logits])

    @property
    def counts(self) -> tuple[int, int]:
        """Forward and backward passes of images through members so far."""
        forwards = (
            sum(instrumented.forwards for instrumented in self.instrumented_members)
            + self.count * self.whole.forwards
        )
        return forwards, sum(instrumented.backwards for instrumented in self.instrumented_members)


def attack(
    ensemble: EnsembleMembers,
    number: int,
    x: Images,
    labels: Labels,
    threat: ThreatModel,
    rng: RowRng,
    *,
    steps: int,
    restarts: int,
) -> tuple[Mask, Mask]:
    """Attack one member; return which members, and last the ensemble, were fooled in any restart.

    Returns:
        Whether each was fooled (N + 1, B), and whether one restart fooled all members at once (B).
    """
    fooled = torch.zeros(ensemble.count + 1, len(x), dtype=torch.bool, device=x.device)
    lost = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for restart in range(restarts):
        rows = (~(fooled.all(0) & lost)).nonzero()[:, 0]
        if not len(rows):
            break
        own = rng.select(rows).at(restart=restart)
        model = ensemble.member(number)
        value = partial(loss, model, labels[rows])
        start = ensemble_utils.random_start(x[rows], threat, own)
        found = ensemble_utils.ascend(value, start, x[rows], threat, steps=steps, step_size=STEP_SIZE)
        predictions = ensemble.predictions(found)
        wrong = (predictions != labels[rows]) & (predictions >= 0)
        fooled[:, rows] |= wrong
        lost[rows] |= wrong[:-1].all(0)
    return fooled, lost


def transferred(fooled: Mask) -> Mask:
    """Return the members fooled by images made on any other one (N + 1, n), from results of each (N, N + 1, n)."""
    others = fooled.clone()
    members = torch.arange(len(fooled))
    others[members, members] = False
    return others.any(0)


@torch.no_grad()
def each_loss(ensemble: EnsembleMembers, x: Images, labels: Labels) -> Tensor:
    """Return the sum of each member's cross-entropies (N), float64."""
    predictions = [ensemble.member(number).logits_fp32(x) for number in range(ensemble.count)]
    return torch.stack([F.cross_entropy(one.double(), labels, reduction="sum") for one in predictions]).cpu()


def loss(model: Callable[[Images], Tensor], labels: Labels, x: Images) -> Tensor:
    """Return each image's cross-entropy (B)."""
    return F.cross_entropy(model(x), labels, reduction="none")
