"""Randomised smoothing (Cohen et al. 2019, arXiv:1902.02918): a vote of the net over noisy copies of the image.

The logits are log(votes + (p + 1/K) / 2) with the mean probabilities p of the copies. The second term lies
between 0 and 1, so it only decides ties. The vote has no gradient. The gradient of p is that of the smoothed
classifier that Salman et al. (2019, arXiv:1906.04584) attack. The paper abstains if the vote is not
significant; this defense always predicts a class.
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
    """Vote over copies with Gaussian noise of standard deviation `sigma`, in [0, 1] pixel units.

    Each call runs the net `copies` times. A run counts this as one pass of the model.
    """

    sigma: NonNegative = 0.25
    copies: Annotated[int, Limits(1, 10_000)] = 10

    def __call__(self, model: Model, x: Images) -> Logits:
        """Return the logits (B K): the logarithm of the votes. The copies are run one after another."""
        logits = torch.stack([model(x + self.sigma * torch.randn_like(x)) for _ in range(self.copies)])
        classes = logits.shape[2]
        votes = F.one_hot(logits.argmax(2), classes).sum(0)
        return (votes + (logits.softmax(2).mean(0) + 1 / classes) / 2).log()
