"""Mean, variance and last deviations of weights along a run, and draws from the normal fitted to them.

SWAG (Maddox et al. 2019, arXiv:1902.02476). The variance is kept by Welford's update, where the paper keeps the
mean of squares and clamps a difference of nearly equal numbers at 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from robustkit.sampling.noise import normal_like

Weights = dict[str, Tensor]

# Name endings of a batch norm's running statistics, which are not weights.
STATISTICS = ("running_mean", "running_var")


class Moments:
    """Running moments of the weights in a net's states.

    Other tensors (running statistics, integers) are those of the last state.

    Args:
        states: the first states.
        rank: number of last deviations from the mean that are kept.
    """

    def __init__(self, states: Iterable[Mapping[str, Tensor]] = (), rank: int = 0) -> None:
        """Start with these states."""
        self.rank = rank
        self.count = 0
        self.mean: Weights = {}
        self.squares: Weights = {}
        self.deviations: list[Weights] = []
        self.others: Weights = {}
        for state in states:
            self.add(state)

    @torch.no_grad()
    def add(self, state: Mapping[str, Tensor]) -> None:
        """Add a state; its deviation is that from the mean which includes it."""
        weights = {name: tensor for name, tensor in state.items() if is_weight(name, tensor)}
        self.others = {name: tensor.clone() for name, tensor in state.items() if name not in weights}
        if not self.count:
            self.mean = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
            self.squares = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        self.count += 1
        column: Weights = {}
        for name, mean in self.mean.items():
            before = weights[name] - mean
            mean.add_(before / self.count)
            column[name] = weights[name] - mean
            self.squares[name].addcmul_(before, column[name])
        if self.rank:
            self.deviations = [*self.deviations, column][-self.rank :]

    def variance(self) -> Weights:
        """Return the mean square of each weight's distance from its mean."""
        return {name: square / self.count for name, square in self.squares.items()}

    @torch.no_grad()
    def draw(self, number: int, scale: float, seed: int) -> Weights:
        """Return a state with draw `number` of the fitted normal, standard deviations times `scale`.

        With deviations each of the low-rank and the diagonal part has half of the variance, as in SWAG; without,
        the diagonal has all of it. At scale 0 the result is the mean.
        """
        columns = len(self.deviations)
        diagonal = scale * math.sqrt(0.5 if columns > 1 else 1.0)
        noise = normal_like(list(self.mean.values()), seed, "moments", number)
        variance = self.variance()
        drawn = {
            name: mean + diagonal * variance[name].sqrt() * its
            for (name, mean), its in zip(self.mean.items(), noise, strict=True)
        }
        if columns > 1:
            places = normal_like([torch.empty(columns)], seed, "deviations", number)[0]
            shares = (places * scale * math.sqrt(0.5 / (columns - 1))).tolist()
            for share, deviation in zip(shares, self.deviations, strict=True):
                for name, tensor in deviation.items():
                    drawn[name].add_(tensor, alpha=share)
        return drawn | self.others


def is_weight(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor of a net's state can be averaged and drawn as a weight."""
    return tensor.is_floating_point() and not name.endswith(STATISTICS)
