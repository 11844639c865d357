"""DVERGE (Yang et al. 2020, arXiv:2009.14720): diverse ensembles by distilled non-robust features.

A source image is perturbed until its features at one layer of one member match those of a target image; all other
members are trained to classify it as its source. DVERGE alone protects against transferred attacks but hardly
against white-box attacks: evaluate both.

The paper's 200 epochs start from nets trained for 200 epochs. Here both are one run; the share `baseline` of it is
plain training. A pair consists of two images of one epoch in independent orders, as in the authors' code. Running
statistics and optimizer states continue from one part to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError, check_choices
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.models.layers.features import distil
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, Share, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, BatchNeeds, Method, Plan, Size


@method("dverge", paper="arXiv:2009.14720")
@dataclass(frozen=True, slots=True)
class DVERGE(Method):
    """Members learn from each other's distilled images; `--adversarial 1` adds adversarial training (DVERGE+AT).

    Distillation has `steps` of `step_size` (a share of `eps`, or `2/255px`) with momentum `inertia`, from the
    image or from a `random_start`. `layer` is a number, a module's name, or `random`, drawn for each `epoch`,
    `batch` or `member` (`draw`). `statistics` is the mode of batch normalisation during distillation: `train`,
    `frozen` or `separate`. `clean` is the weight of the loss on clean images. With `distinct`, pairs of one class
    are left out. The first epochs, the share `baseline`, are plain training. The adversarial images of each member
    come from PGD with `adversarial_steps` of a quarter of the eps of `threat`.
    """

    eps: Share = 0.07
    step_size: StepSize = StepSize(0.1)
    steps: Count = 10
    inertia: Share = 1.0
    random_start: bool = False
    layer: str = "random"
    draw: str = "epoch"
    statistics: str = "train"
    clean: NonNegative = 0.0
    distinct: bool = False
    baseline: ShareBelowOne = 0.5
    adversarial: NonNegative = 0.0
    threat: str = "linf:8/255"
    adversarial_steps: Count = 10
    weight_decay: NonNegative = 1e-4

    ensembles = True
    min_members = 2

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown value of `draw` or `statistics`, or a wrong threat."""
        check_choices(self, draw=ensemble_utils.LAYER_DRAWS, statistics=ensemble_utils.BATCH_NORM_POLICIES)
        ThreatModel.parse(self.threat).bounded()

    @property
    def batch_needs(self) -> BatchNeeds:
        """Return that each image comes with a partner image."""
        return BatchNeeds(pairs=True)

    def default_size(self, samples: int) -> Size:
        """Return the paper's size with the 200 epochs of the baseline; a shorter run on a small set."""
        return ensemble_utils.dverge_size(samples, few=24 if self.adversarial else 40)

    def check_nets(self, nets: Sequence[nn.Module], image: Images) -> None:
        """Refuse a layer that a net does not have."""
        if self.layer != "random":
            ensemble_utils.fixed_layer(nets, image, self.layer)

    def supports_member_parallel(self) -> bool:
        """Return True: members learn from images that processes can exchange."""
        return True

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(parameters, lr=plan.lr, momentum=0.9, weight_decay=self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return the learning rate: `lr`, in each part of the run lr / 10 after a half and lr / 100 after 3/4."""
        return ensemble_utils.two_phase_decay(step, self.baseline, plan)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of every member's loss on the others' distilled images."""
        if batch.step < ensemble_utils.baseline_steps(self.baseline, plan):
            return Method.backward(self, nets, batch, plan)
        with ensemble_utils.batch_norm_policy(nets, self.statistics):
            distilled = batch.process_group.exchanged(self.distilled(nets, batch, plan))
            attacked = [self._attacked(net, batch) for net in nets] if self.adversarial else []
        weight = self._weight(batch)
        total = batch.x.new_zeros(())
        for index, net in enumerate(nets):
            others = [x for other, x in enumerate(distilled) if other != batch.process_group.first + index]
            loss = sum((_mean(net(x), batch.y, weight) for x in others), start=batch.x.new_zeros(()))
            if self.clean:
                loss = loss + self.clean * F.cross_entropy(net(batch.x), batch.y)
            if attacked:
                loss = loss + self.adversarial * F.cross_entropy(net(attacked[index]), batch.y)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total / len(nets)

    def distilled(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> list[Images]:
        """Return the distilled images (B C H W) of each net, made with the current weights."""
        if batch.partners is None:
            raise UsageError(f"{self.info.name} needs pairs of images: set `partners` in its batches.")
        return [
            distil(
                net,
                batch.x,
                batch.partners,
                layer,
                eps=self.eps,
                step_size=self.step_size.share(self.eps),
                steps=self.steps,
                inertia=self.inertia,
                start=ensemble_utils.uniform_noise(batch, f"start{number}") if self.random_start else None,
            )
            for number, (net, layer) in enumerate(
                zip(nets, self.layers(nets, batch, plan), strict=True), batch.process_group.first
            )
        ]

    def layers(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> list[int | str]:
        """Return the layer of each member at a step."""
        return ensemble_utils.drawn_layers(nets, batch, plan, self.layer, self.draw, f"{self.info.name}/layer")

    def _attacked(self, net: nn.Module, batch: Batch) -> Images:
        threat = ThreatModel.parse(self.threat)
        return ensemble_utils.ascend(
            lambda x: F.cross_entropy(net(x), batch.y, reduction="none"),
            ensemble_utils.random_start(batch.x, threat, batch.rng),
            batch.x,
            threat,
            steps=self.adversarial_steps,
            step_size=0.25,
        )

    def _weight(self, batch: Batch) -> Tensor:
        """Return the weight (B) of each pair: 0 for excluded pairs, with a mean of 1 over the whole batch."""
        if not self.distinct or batch.partner_labels is None:
            return torch.ones_like(batch.y, dtype=torch.float32)
        is_distinct = (batch.y != batch.partner_labels).float()
        (share,) = batch.process_group.mean([is_distinct.mean()])
        return is_distinct / torch.where(share > 0, share, 1)


@method("dverge+at", paper="arXiv:2009.14720")
@dataclass(frozen=True, slots=True)
class DVERGEAT(DVERGE):
    """DVERGE with adversarial training of each member: `dverge --adversarial 1` under the paper's name for it."""

    adversarial: NonNegative = 1.0


def _mean(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean of the cross-entropy."""
    return (weight * F.cross_entropy(logits, labels, reduction="none")).mean()
