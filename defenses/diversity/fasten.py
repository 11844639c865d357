"""Diversity at single steps that are remembered, in the way of FASTEN (Huang et al. 2024, IEEE TIFS).

Every member moves each image one step, as long as the ball is wide, to where a layer of it sees the image least as
before. Another member learns that the image still is what it was, and to answer as it does for the plain one.
The next epoch starts where this one ended, so perturbations grow better at the price of a step.

Departures from the authors' code:
- all members move images, and each learns from one other's, as many places on as is drawn for the batch; there two
  members, drawn for the batch, move them;
- a step starts at what is remembered; there at random, to be mixed with what is remembered in a random proportion;
- each member has its own memory, moved along by crops and flips; there all share one, which stays where it was;
- of a perturbation its sign is kept, 0 below half of eps, from where the next step starts at random;
- the term that drives members' answers apart is left out: in the code it has no gradient;
- the baseline and this are one run, of the size and the rates of `dverge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError, did_you_mean
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
    """Members learn from each other's images, each moved by one step that goes on from the last epoch's.

    The step is `step_size` (a share of `eps`, or `2/255px`); without `reuse` it starts at random. `layer`, `draw`,
    `statistics` and `baseline` are as in `dverge`; `consistency` weighs how far a member's answers to a moved
    and to the plain image are apart.
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
        for field, known in (
            ("draw", ensemble_utils.LAYER_DRAWS),
            ("statistics", ensemble_utils.BATCH_NORM_POLICIES),
        ):
            if getattr(self, field) not in known:
                raise did_you_mean(field, getattr(self, field), known)

    def default_size(self, samples: int) -> Size:
        """Return the size of `dverge`."""
        return ensemble_utils.dverge_size(samples)

    def check_nets(self, nets: Sequence[nn.Module], image: Images) -> None:
        """Refuse a layer that a net has not."""
        if self.layer != "random":
            ensemble_utils.fixed_layer(nets, image, self.layer)

    def supports_member_parallel(self) -> bool:
        """Return that members learn from images, which processes can exchange."""
        return True

    @property
    def batch_needs(self) -> BatchNeeds:
        """Return the memory of perturbations, unless every step starts at random."""
        return BatchNeeds(memory=self.reuse)

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(parameters, lr=plan.lr, momentum=0.9, weight_decay=self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from a half and a hundredth from three quarters of each part of the run."""
        return ensemble_utils.two_phase_decay(step, ensemble_utils.baseline_steps(self.baseline, plan), plan)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of every member's loss on another's images; leave in the memory where those are."""
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
                    plain = net(batch.x)
                loss = loss + self.consistency * apart(plain, logits)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total / len(nets)

    def moved(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> list[Images]:
        """Return each of these nets' images (B C H W), made with the weights as they are."""
        layers = ensemble_utils.drawn_layers(nets, batch, plan, self.layer, self.draw, f"{self.info.name}/layer")
        return [
            self._moved(net, batch, layer, number)
            for number, (net, layer) in enumerate(zip(nets, layers, strict=True), batch.process_group.first)
        ]

    def _moved(self, net: nn.Module, batch: Batch, layer: int | str, member: int) -> Images:
        start = ensemble_utils.uniform_noise(batch, f"start{member}")
        if self.reuse:
            if batch.memory is None:
                raise UsageError(f"{self.info.name} goes on from the last epoch; give its batches a memory.")
            known = batch.memory[:, member].to(start.dtype)
            start = torch.where(known == 0, start, known)
        away = -self.step_size.share(self.eps)
        x = distil(net, batch.x, batch.x, layer, eps=self.eps, step_size=away, steps=1, start=start)
        if batch.memory is not None:
            batch.memory[:, member] = ((x - batch.x) / max(self.eps, 1e-12)).round().to(torch.int8)
        return x

    def _places(self, batch: Batch, members: int) -> int:
        """Return how many places on the member is whose images one learns from."""
        ids = torch.zeros(1, dtype=torch.int64)
        word = RowRng(batch.rng.seed, f"{self.info.name}/places", ids, step=batch.step).uniform(1)
        return 1 + int(float(word) * (members - 1))


def apart(plain: Logits, logits: Logits) -> Tensor:
    """Return how far two answers (B K) are from their mean, as its relative entropies to them, averaged."""
    logarithms = torch.stack([plain.detach(), logits]).log_softmax(2)
    middle = logarithms.exp().mean(0)
    return F.kl_div(logarithms, middle.expand_as(logarithms), reduction="sum") / logarithms[..., 0].numel()
