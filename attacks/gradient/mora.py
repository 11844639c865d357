"""MORA (Yu et al. 2022, arXiv:2211.08008): an attack on ensembles that weights members near their boundary.

It needs the members' logits (B N K), the view `stack` of an ensemble; a plain model is an ensemble of one.
Departures from the authors' code: the ensemble's own output does not count as a further member, probabilities are
averaged over N, and the term of the second class has the sign of the paper's formula; starts are uniform in the
ball; logarithms are finite if a member's probability is 0 or 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State
from robustkit.core.errors import did_you_mean
from robustkit.core.shapes import Logits
from robustkit.core.threat import per_row
from robustkit.models.ensembles.aggregation import probabilities
from robustkit.registry import attack
from robustkit.registry.ranges import Count

# The factor of the members' logits before the softmax, for each way of combining them.
SHARPNESS = {"probabilities": 0.2, "vote": 0.8, "logits": 0.0}
# The weight of the members' loss relative to the ensemble's, in each restart.
SHARES = (0.5, 0.0, 0.25, 0.75, 1.0)
MOMENTUM, LARGEST_GAP, TINY = 0.75, 10.0, 1e-8


@dataclass(frozen=True, slots=True)
class _MORA(RowWise):
    steps: Count = 100
    restarts: Count | None = 5
    combine: str = "probabilities"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown combination."""
        if self.combine not in SHARPNESS:
            raise did_you_mean("combine", self.combine, tuple(SHARPNESS))

    def init(self, rows: Rows) -> State:
        """Return random points of the ball."""
        x = rows.threat.random_start(rows.x, rows.rng)
        return {"x": x, "before": x, "clock": torch.zeros(len(x), dtype=torch.float64, device=x.device)}

    def objective(self, rows: Rows, state: State, logits: Tensor) -> Tensor:
        """Return the loss of ensemble and weighted members together; logits are (B N K), or (B K) of one."""
        stack = logits[:, None] if logits.dim() == 2 else logits
        labels, targets = rows.aim.labels, rows.aim.targets
        whole = self._whole(stack)
        rival = targets
        if rival is None:
            rival = whole.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)
        members = stack / (_gaps(stack).amax(1) / LARGEST_GAP).clamp(min=1)[:, None, None]
        weights = self._weights(stack.detach(), members.detach(), labels, rival)
        led = (weights[:, :, None] * members).sum(1) / (weights.sum(1, keepdim=True) + TINY)
        restart = np.broadcast_to(np.asarray(rows.rng.restart), len(stack)) % (self.restarts or 1)
        share = rows.upload(np.array(SHARES)[restart % len(SHARES)], stack.dtype)
        if targets is not None and self.combine == "logits":
            share = torch.zeros_like(share)
        blend = (1 - share[:, None]) * whole / _gaps(whole).clamp(min=TINY)[:, None] + share[:, None] * led
        if targets is None:
            return F.cross_entropy(blend, labels, reduction="none")
        return -F.cross_entropy(blend, targets, reduction="none")

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Step along the gradient with momentum and a decreasing step size."""
        x, threat, clock = state["x"], rows.threat, state["clock"]
        size = threat.radius * (1 + torch.cos(math.pi * clock / self.steps))
        stepped = rows.retract(x + per_row(size.to(x.dtype), x) * threat.ascent(answer.gradient))
        moved = rows.with_momentum(x, stepped, state["before"], rows.steps_taken == 1, MOMENTUM)
        return {"x": rows.retract(moved), "before": x, "clock": clock + 1}

    def _whole(self, stack: Tensor) -> Logits:
        """Return the ensemble's output from its members' logits."""
        if self.combine == "logits":
            return stack.mean(1)
        if self.combine == "vote":
            stack = stack / _gaps(stack).clamp(min=TINY)[:, :, None]
        return probabilities(stack)

    def _weights(self, stack: Tensor, members: Tensor, labels: Tensor, rival: Tensor) -> Tensor:
        """Return the members' weights (B N), by the chain rule of the ensemble's margin; 0 for those fooled."""
        count = stack.shape[1]
        sharp, mean = (SHARPNESS[self.combine] * stack).softmax(2), members.softmax(2).mean(1)
        own, other = (
            sharp.gather(2, index[:, None, None].expand(-1, count, 1))[:, :, 0] for index in (labels, rival)
        )
        right, wrong = (mean.gather(1, index[:, None]).clamp(min=TINY) for index in (labels, rival))
        weights = other * (own / right + (1 - other) / wrong)
        if self.combine == "logits":
            return weights
        return weights * (stack.argmax(2) == labels[:, None])


@attack("mora", paper="arXiv:2211.08008", norms=("linf", "l2"), access="gradient")
@dataclass(frozen=True, slots=True)
class MORA(_MORA):
    """Ascent on the losses of the ensemble and of weighted members, in five restarts with different ratios.

    `combine` is how the ensemble predicts: probabilities, logits or vote.
    """


@attack("mora-t", paper="arXiv:2211.08008", norms=("linf", "l2"), access="gradient")
@dataclass(frozen=True, slots=True)
class MORAT(_MORA):
    """MORA towards each of the `targets` likeliest other classes; for mean logits the members have no weight.

    For the other fields see `mora`.
    """

    restarts: Count | None = 1
    targets: Count = 9

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options, with one attempt for each target."""
        return LoopOptions(self.steps, self.targets, self.restarts or 1)


def _gaps(logits: Tensor) -> Tensor:
    """Return the largest logit less the second largest, without a gradient."""
    top = logits.detach().topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]
