"""Oracles: they return the gradients of a rule during one run on one batch; and wrappers around another oracle."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from robustkit.attack_api.posterior_surrogates import SampleSchedule
from robustkit.attack_api.rows import Rows
from robustkit.attack_api.surrogates import Surrogates, Weights
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel


class Oracle(ABC):
    """Returns gradients during one run on one batch. It may keep values from earlier steps of the run."""

    @property
    @abstractmethod
    def surrogates(self) -> Surrogates:
        """The models that the gradients are of."""

    @property
    def steps(self) -> int:
        """How many steps the run takes; `rows.rng.step` counts them from 1."""
        return 1

    @abstractmethod
    def gradient(
        self,
        rows: Rows,
        x: Images,
        members: Sequence[int] | None = None,
        weights: Weights = None,
    ) -> Images:
        """Return each row's gradient at x.

        Args:
            rows: the clean images, goals and random numbers. `rows.rng` is for this call alone: a caller with
                several calls in a step gives each its own (`split_rng`).
            x: where the gradient is taken (B C H W).
            members: numbers of the surrogates to use, all by default.
            weights: of those members, in place of the ensemble's own; see `Surrogates.gradient`.
        """


class OracleWrapper(Oracle):
    """An oracle that gets its gradients from another one; a subclass defines `gradient`.

    Example:
        >>> class Negated(OracleWrapper):
        ...     def gradient(self, rows, x, members=None, weights=None):
        ...         return -self.inner.gradient(rows, x, members, weights)
        >>> Negated(SurrogateOracle(Surrogates((lambda x: x.flatten(1),)), "ce", steps=10)).steps
        10
    """

    def __init__(self, inner: Oracle) -> None:
        """Wrap an oracle."""
        self.inner = inner

    @property
    def surrogates(self) -> Surrogates:
        """The models that the gradients are of."""
        return self.inner.surrogates

    @property
    def steps(self) -> int:
        """How many steps the run takes."""
        return self.inner.steps


class SurrogateOracle(Oracle):
    """The gradient of a loss on surrogates."""

    def __init__(self, surrogates: Surrogates, loss: str, steps: int = 1, rng: RowRng | None = None) -> None:
        """Take gradients on these surrogates.

        Args:
            surrogates: the models.
            loss: a name of `robustkit.core.criteria`.
            steps: how many steps the run takes.
            rng: shuffles the samples of posteriors; without it they come as listed.
        """
        self.loss, self._steps = loss, steps
        self._schedule = SampleSchedule(surrogates, rng)

    @property
    def surrogates(self) -> Surrogates:
        """The models; of a posterior the sample that was used last."""
        return self._schedule.current

    @property
    def steps(self) -> int:
        """How many steps the run takes."""
        return self._steps

    def gradient(
        self,
        rows: Rows,
        x: Images,
        members: Sequence[int] | None = None,
        weights: Weights = None,
    ) -> Images:
        """Return the surrogates' gradient at x."""
        chosen = range(len(self.surrogates)) if members is None else members
        surrogates = self._schedule.next(chosen, rows.rng.step)
        return surrogates.gradient(x, rows.aim, self.loss, rows.rng, members, weights)


# Returns one of several transformed copies of the images (B C H W); the copy's number says which.
Transform = Callable[[Rows, Images, int], Images]


class TransformedOracle(OracleWrapper):
    """The mean over several transforms of the images of the gradient, in the images themselves."""

    def __init__(self, inner: Oracle, name: str, copies: int, transform: Transform) -> None:
        """Take the gradient at each of `copies` transforms; `name` separates its random numbers from others."""
        super().__init__(inner)
        self.name, self.copies, self.transform = name, copies, transform

    def gradient(
        self,
        rows: Rows,
        x: Images,
        members: Sequence[int] | None = None,
        weights: Weights = None,
    ) -> Images:
        """Return the mean of the inner gradients, each pulled back through its transform."""
        total = torch.zeros_like(x)
        for number in range(self.copies):
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                moved = self.transform(rows, point, number)
            inner = self.inner.gradient(split_rng(rows, self.name, number), moved.detach(), members, weights)
            total = total + torch.autograd.grad(moved, point, inner)[0]
        return total / self.copies


def split_rng(rows: Rows, name: str, number: int = 0) -> Rows:
    """Return the rows with random numbers of their own for one of several calls in a step."""
    return replace(rows, rng=replace(rows.rng, stream=f"{rows.rng.stream}/{name}{number}"))


def shared_rng(rows: Rows, name: str) -> RowRng:
    """Return a generator of one row that all images share, whatever the batch, for choices made for all."""
    rng = split_rng(rows, name).rng
    return replace(rng, ids=torch.zeros(1, dtype=torch.int64))


def per_pixel(threat: ThreatModel, x: Images) -> float:
    """Return the change of each pixel if all pixels change equally by a total of eps."""
    size, eps = x[0].numel() if len(x) else 1, float(threat.eps)
    return {"linf": eps, "l2": eps / math.sqrt(size), "l1": eps / size}[threat.norm]


def random_neighbour(rows: Rows, x: Images, radius: float) -> Images:
    """Return points drawn uniformly from the cube of `radius` times `per_pixel` around x."""
    reach = radius * per_pixel(rows.threat, x)
    return x + reach * (2 * rows.rng.uniform(*x.shape[1:]).to(x) - 1)
