"""Ensemble diversity by single-step perturbations that are stored, after FASTEN (Huang et al. 2024, IEEE TIFS).

Every member perturbs each image by one step of the length eps that changes the features of a layer as much as
possible. Another member is trained to classify the perturbed image correctly, and to give the probabilities of the
clean image. The next epoch starts from the stored perturbations, so they improve at the cost of one step per
epoch.

Deviations from the authors' code:
- all members perturb images, and each learns from the images of one other member, drawn for the batch; in the
code two
  members drawn for the batch perturb them;
- a step starts from the stored perturbation; in the code it starts at random and is mixed with the stored one in a
  random proportion;
- each member has a memory of its own that follows crops and flips; in the code all share one that does not;
- only the sign of a perturbation is stored, 0 if it is below half of eps, from where the next step starts at
random; - the term that drives the members' outputs apart is left out: it has no gradient in the code;
- the baseline and the method are one run, with the size and learning rates of `dverge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError, check_choices
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits
from robustkit.core.step_size import StepSize
from robustkit.models.layers.features import distil
from robustkit.registry import method
from robustkit.registry.ranges import NonNegative, Share, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, BatchNeeds, Method, Plan, Size


@method("fasten", paper="IEEE TIFS 2024")
@dataclass(frozen=True, slots=True)
class FASTEN(Method):
    """Members learn from each other's images, perturbed by one step from the perturbation of the last epoch.

    The step has the length `step_size` (a share of `eps`, or `2/255px`); without `reuse` it starts at random.
    `layer`, `draw`, `statistics` and `baseline` are those of `dverge`. `consistency` is the weight of the
    divergence between a member's outputs for the perturbed and the clean image.
    """

    eps: Share = 0.06
    step_size: StepSize = StepSize(1.0)
    reuse: bool = True
    layer: str = "random"
    draw: str = "epoch"
    statistics: str = "train"
    consistency: NonNegative = 3.0
    baseline: ShareBelowOne = 0.5
    weight_decay: NonNegative = 1e-4

    ensembles = True
    min_members = 2

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        check_choices(self, draw=ensemble_utils.LAYER_DRAWS, statistics=ensemble_utils.BATCH_NORM_POLICIES)

    def default_size(self, samples: int) -> Size:
        """Return the size of `dverge`."""
        return ensemble_utils.dverge_size(samples)

    def check_nets(self, nets: Sequence[nn.Module], image: Images) -> None:
        """Refuse a layer that a net does not have."""
        if self.layer != "random":
            ensemble_utils.fixed_layer(nets, image, self.layer)

    def supports_member_parallel(self) -> bool:
        """Return True: members learn from images that processes can exchange."""
        return True

    @property
    def batch_needs(self) -> BatchNeeds:
        """Return that perturbations are stored, unless every step starts at random."""
        return BatchNeeds(memory=self.reuse)

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(parameters, lr=plan.lr, momentum=0.9, weight_decay=self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from a half and a hundredth from three quarters of each part of the run."""
        return ensemble_utils.two_phase_decay(step, self.baseline, plan)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of every member's loss on another member's images; store the perturbations."""
        if batch.step < ensemble_utils.baseline_steps(self.baseline, plan):
            return Method.backward(self, nets, batch, plan)
        with ensemble_utils.batch_norm_policy(nets, self.statistics):
            moved = batch.process_group.exchanged(self.moved(nets, batch, plan))
        places = self._places(batch, len(moved))
        total = batch.x.new_zeros(())
        for number, net in enumerate(nets, batch.process_group.first):
            logits = net(moved[(number + places) % len(moved)])
            loss = F.cross_entropy(logits, batch.y)
            if self.consistency:
                with torch.no_grad():
                    clean = net(batch.x)
                loss = loss + self.consistency * divergence_from_mean(clean, logits)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total / len(nets)

    def moved(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> list[Images]:
        """Return the perturbed images (B C H W) of each net, made with the current weights."""
        layers = ensemble_utils.drawn_layers(nets, batch, plan, self.layer, self.draw, f"{self.info.name}/layer")
        return [
            self._moved(net, batch, layer, number)
            for number, (net, layer) in enumerate(zip(nets, layers, strict=True), batch.process_group.first)
        ]

    def _moved(self, net: nn.Module, batch: Batch, layer: int | str, member: int) -> Images:
        start = ensemble_utils.uniform_noise(batch, f"start{member}")
        if self.reuse:
            if batch.memory is None:
                raise UsageError(f"{self.info.name} needs stored perturbations: set `memory` in its batches.")
            known = batch.memory[:, member].to(start.dtype)
            start = torch.where(known == 0, start, known)
        away = -self.step_size.share(self.eps)
        x = distil(net, batch.x, batch.x, layer, eps=self.eps, step_size=away, steps=1, start=start)
        if batch.memory is not None:
            batch.memory[:, member] = ((x - batch.x) / max(self.eps, 1e-12)).round().to(torch.int8)
        return x

    def _places(self, batch: Batch, members: int) -> int:
        """Return the distance between the indices of a member and of the member whose images it learns from."""
        ids = torch.zeros(1, dtype=torch.int64)
        share = RowRng(batch.rng.seed, f"{self.info.name}/places", ids, step=batch.step).uniform(1)
        return 1 + int(float(share) * (members - 1))


def divergence_from_mean(clean: Logits, logits: Logits) -> Tensor:
    """Return the mean Jensen-Shannon divergence between the probabilities of two logits (B K)."""
    logarithms = torch.stack([clean.detach(), logits]).log_softmax(2)
    middle = logarithms.exp().mean(0)
    return F.kl_div(logarithms, middle.expand_as(logarithms), reduction="sum") / logarithms[..., 0].numel()
