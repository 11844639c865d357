"""Surrogates that are many nets: posterior samples of one architecture, a fresh one for each gradient.

Which samples come when is drawn for all images alike, and from the first one again for every batch: what becomes
of an image does not depend on the others.
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
    """A member of `Surrogates` that is many nets. Called as a model it answers as all of them together."""

    def __len__(self) -> int:
        """How many nets."""

    def __call__(self, x: Images) -> Logits:
        """Return the logits of all nets together."""

    def sample(self, number: int) -> Model:
        """Return one of the nets as a member of its own."""


class Deck:
    """Deals samples of populations during one run on one batch; other members stay what they are.

    Each population is gone through in one order, again and again; members that are the same population share
    it. `surrogates.order` and `surrogates.fresh` say how.
    """

    def __init__(self, surrogates: Surrogates, rng: RowRng | None) -> None:
        """Shuffle by the run's dice; without any the samples come as listed."""
        self.now = self._surrogates = surrogates
        self._populations: list[Population] = []
        # For each member its population's place in that list.
        self._places: dict[int, int] = {}
        for number, member in enumerate(surrogates.members):
            if isinstance(member, Population):
                known = [place for place, one in enumerate(self._populations) if one is member]
                self._places[number] = known[0] if known else len(self._populations)
                if not known:
                    self._populations.append(member)
        dice = rng if surrogates.order == "shuffled" else None
        self._orders = [_order(len(one), dice, place) for place, one in enumerate(self._populations)]
        self._dealt = [0] * len(self._populations)
        self._step: object = None
        self._fixed: set[int] = set()
        # Who is asked for anything but gradients before the first was dealt answers as that one.
        self._put({number: self._orders[place][0] for number, place in self._places.items()})

    def deal(self, members: Sequence[int], step: object) -> Surrogates:
        """Return the surrogates with the next samples in the places of these members, others as they were.

        If `fresh` is at each step, a member that has got its sample in this step keeps it.
        """
        if self._surrogates.fresh == "gradient" or step != self._step:
            self._step, self._fixed = step, set()
        wanted = [number for number in members if number in self._places and number not in self._fixed]
        self._fixed.update(wanted)
        self._put({number: self._next(self._places[number]) for number in wanted})
        return self.now

    def _next(self, place: int) -> int:
        order = self._orders[place]
        self._dealt[place] += 1
        return order[(self._dealt[place] - 1) % len(order)]

    def _put(self, samples: Mapping[int, int]) -> None:
        if samples:
            members = list(self.now.members)
            for number, sample in samples.items():
                members[number] = self._populations[self._places[number]].sample(sample)
            self.now = replace(self.now, members=members)


def spread(surrogates: Surrogates, copies: int | None) -> Surrogates:
    """Return surrogates with a population as so many members; for None with its nets as the members.

    They share its weight.
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


def _order(count: int, dice: RowRng | None, place: int) -> list[int]:
    if dice is None:
        return list(range(count))
    shared = replace(dice, stream=f"{dice.stream}/deck{place}", ids=torch.zeros(1, dtype=torch.int64))
    order: list[int] = shared.uniform(count)[0].argsort(stable=True).tolist()
    return order
