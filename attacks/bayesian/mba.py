"""More Bayesian substitutes (Li et al. 2023, arXiv:2302.05086): fine-tuning to flat loss, then samples.

Each step descends g + flatness (g' - g) / radius, where g' is the gradient at the weights moved by `radius` along
g / |g|: to first order in the radius the gradient of the loss plus flatness |g|. As in the authors' code both
passes are in train mode, and the norm is over all weights. Departures: each draw gets running statistics of its
own, while theirs uses those of the mean; a run stores `draws` nets, while their attack draws new ones at each
step; the net to fine-tune is trained by the epochs before the last `collect_epochs`, as in `lgv`. With several
processes each one moves along the gradient of its own images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.attacks.bayesian.lgv import Collecting
from robustkit.core.limits import Limits
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.sampling import Moments, is_evenly_spaced
from robustkit.training.method import Batch, Method, Plan, Size
from robustkit.training.posterior_method import State

# Sets of at most this many images are small.
SMALL_DATA = 5000


@method("mba", paper="arXiv:2302.05086")
@dataclass(frozen=True, slots=True)
class MBA(Collecting):
    """Fine-tuning to flat loss at a high rate; `draws` from a diagonal normal fitted to `snapshots` are stored.

    The high rate is `lr` times `collect_rate`: by default the paper's 0.5, and 0.1 on small sets, where nets
    without batch norm diverge at 0.5. With `flatness` 0 the steps are those of SGD. `scale` multiplies the
    standard deviations of the normal.
    """

    draws: Count = 20
    snapshots: Count = 300
    scale: NonNegative = 1.5
    flatness: NonNegative = 1.0
    radius: Annotated[float, Limits(1e-6)] = 0.1
    collect_epochs: Count = 10
    collect_rate: NonNegative | None = None
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 5e-4
    batch_norm: str = "re-estimate"

    def default_size(self, samples: int) -> Size:
        """Return a common training size and the paper's epochs after it; a shorter run on a small set."""
        if samples > SMALL_DATA:
            return Size(epochs=100 + self.collect_epochs, batch_size=256, lr=0.1)
        return Size(epochs=40 + self.collect_epochs, batch_size=64, lr=0.05)

    def share(self, plan: Plan) -> float:
        """Return the rate of the last epochs as a share of `lr`."""
        default_rate = 0.5 if plan.samples > SMALL_DATA else 0.1
        return default_rate if self.collect_rate is None else self.collect_rate

    def keeps(self, step: int, plan: Plan) -> bool:
        """Return whether the weights after a step count: `snapshots` evenly spaced steps of the last epochs."""
        first = self.first(plan)
        length = plan.steps - first
        return is_evenly_spaced(step - first, length, min(self.snapshots, length))

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the flat loss in the last epochs, and the plain gradient before them."""
        loss = Method.backward(self, nets, batch, plan)
        if self.flatness and batch.step >= self.first(plan):
            for net in nets:
                flatten(net, batch, self.flatness, self.radius)
        return loss

    def samples(self, kept: Iterable[State], plan: Plan) -> Iterator[State]:
        """Return draws from the diagonal normal that was fitted to the stored weights."""
        moments = Moments(kept)
        for number in range(self.draws):
            yield moments.draw(number, self.scale, plan.seed)


def flatten(net: nn.Module, batch: Batch, flatness: float, radius: float) -> None:
    """Replace a net's gradients g by g + flatness (g' - g) / radius, with g' taken at weights moved along g."""
    weights = [weight for weight in net.parameters() if weight.grad is not None]
    before = [weight.detach().clone() for weight in weights]
    # The step is that of the whole batch; the later average over its parts is linear in both gradients.
    plain = batch.process_group.mean([weight.grad.clone() for weight in weights if weight.grad is not None])
    with torch.no_grad():
        size = torch.stack([gradient.square().sum() for gradient in plain]).sum().sqrt()
        for weight, gradient in zip(weights, plain, strict=True):
            weight.add_(gradient * (radius / (size + 1e-20)))
    moved = torch.autograd.grad(F.cross_entropy(net(batch.x), batch.y), weights)
    with torch.no_grad():
        for weight, old, gradient, further in zip(weights, before, plain, moved, strict=True):
            weight.copy_(old)
            weight.grad = gradient + flatness / radius * (further - gradient)
