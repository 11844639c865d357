"""Surrogates that are many nets: posterior samples of one architecture, another one for each gradient.

The order of the samples is the same for all images, and begins with the first one again for every batch, so that
the result for an image does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch

from robustkit.attack_api.rows import Model
from robustkit.attack_api.surrogates import Surrogates
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits


@runtime_checkable
class Population(Protocol):
    """A member of `Surrogates` that is many nets; called as a model it returns their combined logits."""

    def __len__(self) -> int:
        """Return how many nets there are."""

    def __call__(self, x: Images) -> Logits:
        """Return the combined logits of all nets (B K) at images (B C H W)."""

    def sample(self, number: int) -> Model:
        """Return one of the nets as a member of its own."""


class SampleSchedule:
    """Chooses samples of populations during one run on one batch; other members are unchanged.

    The samples of each population are used in one order, repeatedly; members that are the same population share
    it. `surrogates.order` and `surrogates.fresh` set the order and when the next sample is used.
    """

    def __init__(self, surrogates: Surrogates, rng: RowRng | None) -> None:
        """Shuffle by the run's random numbers; without them the samples are used as listed."""
        self.current = self._surrogates = surrogates
        self._populations: list[Population] = []
        # For each member the index of its population in that list.
        self._positions: dict[int, int] = {}
        for number, member in enumerate(surrogates.members):
            if isinstance(member, Population):
                known = [position for position, other in enumerate(self._populations) if other is member]
                self._positions[number] = known[0] if known else len(self._populations)
                if not known:
                    self._populations.append(member)
        rng = rng if surrogates.order == "shuffled" else None
        self._orders = [_order(len(one), rng, position) for position, one in enumerate(self._populations)]
        self._used = [0] * len(self._populations)
        self._step: object = None
        self._fixed: set[int] = set()
        # The first samples, for calls before the first gradient.
        self._set_samples({number: self._orders[position][0] for number, position in self._positions.items()})

    def next(self, members: Sequence[int], step: object) -> Surrogates:
        """Return the surrogates with the next samples for these members, others as they were.

        If `fresh` is "step", a member that has its sample of this step keeps it.
        """
        if self._surrogates.fresh == "gradient" or step != self._step:
            self._step, self._fixed = step, set()
        wanted = [number for number in members if number in self._positions and number not in self._fixed]
        self._fixed.update(wanted)
        self._set_samples({number: self._next_sample(self._positions[number]) for number in wanted})
        return self.current

    def _next_sample(self, position: int) -> int:
        order = self._orders[position]
        self._used[position] += 1
        return order[(self._used[position] - 1) % len(order)]

    def _set_samples(self, samples: Mapping[int, int]) -> None:
        if samples:
            members = list(self.current.members)
            for number, sample in samples.items():
                members[number] = self._populations[self._positions[number]].sample(sample)
            self.current = replace(self.current, members=members)


def expand(surrogates: Surrogates, copies: int | None) -> Surrogates:
    """Return surrogates with each population as several members, which share its weight.

    Args:
        surrogates: with or without populations.
        copies: how many times a population becomes a member, at most once for each net; None makes each of its
            nets a member.
    """
    members: list[Model] = []
    weights: list[float] = []
    for number, member in enumerate(surrogates.members):
        parts = [member]
        if isinstance(member, Population):
            count = len(member)
            parts = [member.sample(k) for k in range(count)] if copies is None else [member] * min(copies, count)
        weight = 1.0 if surrogates.weights is None else surrogates.weights[number]
        members += parts
        weights += [weight / len(parts)] * len(parts)
    if members == list(surrogates.members):
        return surrogates
    return replace(surrogates, members=members, weights=weights, together=None)


def _order(count: int, rng: RowRng | None, position: int) -> list[int]:
    if rng is None:
        return list(range(count))
    shared = replace(rng, stream=f"{rng.stream}/deck{position}", ids=torch.zeros(1, dtype=torch.int64))
    order: list[int] = shared.uniform(count)[0].argsort(stable=True).tolist()
    return order
