"""Randomised smoothing (Cohen et al. 2019, arXiv:1902.02918): the net's vote over noisy copies of the image.

Logits are log(votes + (p + 1/K) / 2), where p is the copies' mean probability: the second term lies between 0
and 1, so it decides ties alone. The vote has no gradient; p has, and it is that of the smoothed classifier that
Salman et al. (2019, arXiv:1906.04584) attack. The paper abstains where the vote is not significant; we always
answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from robustkit.attack_api import Model
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images, Logits
from robustkit.registry import defense
from robustkit.registry.ranges import NonNegative


@defense("smoothing", paper="arXiv:1902.02918")
@dataclass(frozen=True, slots=True)
class Smoothing:
    """Copies with Gaussian noise of deviation `sigma`, in [0, 1] pixel units, vote.

    Costs `copies` passes through the net each time, counted as one: the propagations of a run are the model's.
    """

    sigma: NonNegative = 0.25
    copies: Annotated[int, Limits(1, 10_000)] = 10

    def __call__(self, model: Model, x: Images) -> Logits:
        """Return the logarithm of the votes; copies go through the model one after the other."""
        logits = torch.stack([model(x + self.sigma * torch.randn_like(x)) for _ in range(self.copies)])
        classes = logits.shape[2]
        votes = F.one_hot(logits.argmax(2), classes).sum(0)
        return (votes + (logits.softmax(2).mean(0) + 1 / classes) / 2).log()
