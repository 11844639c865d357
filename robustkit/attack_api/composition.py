"""Transfer attacks as compositions: a rule of ascent, and techniques that change what gradient it is given.

The rule (`mi-fgsm`, `pgd`, `cwa` …) is an attack whose `step` reads nothing of an answer but the gradient; a
technique (`di`, `vmi`, `ghost` …) stands between it and the surrogates. `mi-fgsm+vmi+di` asks `vmi` for a
gradient, which asks `di` for each of its own, which asks the surrogates at transformed images. All rows take
all steps: an image that fools the surrogates goes on, since it is not they that are to be fooled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from robustkit.attack_api.driver import drive
from robustkit.attack_api.posterior_surrogates import Deck
from robustkit.attack_api.rows import Answer, Model, Rows, State
from robustkit.attack_api.surrogates import Surrogates, Weights
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel, per_row
from robustkit.registry import Info, spec


class Oracle(ABC):
    """What gives gradients during one run on one batch. It may remember earlier steps of that run."""

    @property
    @abstractmethod
    def surrogates(self) -> Surrogates:
        """The models at the bottom."""

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
        """Return each row's gradient at x, of all members together or of some; see `Surrogates.gradient`.

        `rows.rng` are the dice for this call alone: who asks several times in a step gives each its own
        (`dice`).
        """


class Around(Oracle):
    """An oracle that asks another one; to be subclassed with a `gradient` of its own."""

    def __init__(self, inner: Oracle) -> None:
        """Stand in front of an oracle."""
        self.inner = inner

    @property
    def surrogates(self) -> Surrogates:
        """The models at the bottom."""
        return self.inner.surrogates

    @property
    def steps(self) -> int:
        """How many steps the run takes."""
        return self.inner.steps


class Direct(Oracle):
    """The gradient of a loss itself."""

    def __init__(self, surrogates: Surrogates, loss: str, steps: int = 1, rng: RowRng | None = None) -> None:
        """Ask these surrogates for the gradient of that loss, in so many steps; `rng` shuffles posteriors."""
        self.loss, self._steps = loss, steps
        self._deck = Deck(surrogates, rng)

    @property
    def surrogates(self) -> Surrogates:
        """The models at the bottom; of a posterior the sample that was asked last."""
        return self._deck.now

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
        asked = range(len(self.surrogates)) if members is None else members
        dealt = self._deck.deal(asked, rows.rng.step)
        return dealt.gradient(x, rows.aim, self.loss, rows.rng, members, weights)


# Makes one of several copies of the images; the copy's number says which.
Transform = Callable[[Rows, Images, int], Images]


class Transformed(Around):
    """The mean gradient of the loss of several transforms of the images, in the images themselves."""

    def __init__(self, inner: Oracle, name: str, copies: int, transform: Transform) -> None:
        """Ask `inner` at each of `copies` transforms, under the technique's name."""
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
                at = x.detach().requires_grad_()
                moved = self.transform(rows, at, number)
            inner = self.inner.gradient(dice(rows, self.name, number), moved.detach(), members, weights)
            total = total + torch.autograd.grad(moved, at, inner)[0]
        return total / self.copies


class Technique(ABC):
    """A change of the gradient, to be subclassed by a frozen dataclass that is registered as `@technique`."""

    __slots__ = ()

    @property
    def cost(self) -> int:
        """The most gradients it asks for in the place of one; those of single members count as their share."""
        return 1

    def prepare(self, surrogates: Surrogates) -> Surrogates:
        """Return the surrogates to be asked, before a run."""
        return surrogates

    @property
    def outside(self) -> bool:
        """Whether it stands around all of a rule's step, and not behind it."""
        return False

    @abstractmethod
    def begin(self, inner: Oracle) -> Oracle:
        """Return what is asked instead of `inner` during one run on one batch."""

    def surround(self, make: Callable[[], Oracle]) -> Oracle:
        """Return what is asked instead of what `make` makes, each with a memory of its own, if it is `outside`."""
        return self.begin(make())


@dataclass(frozen=True)
class Composition:
    """An attack made of a rule of ascent and techniques, the outermost first."""

    rule: Any
    techniques: tuple[Technique, ...] = ()

    @property
    def info(self) -> Info:
        """What the rule says of itself."""
        info: Info = self.rule.info
        return info

    @property
    def name(self) -> str:
        """The names, joined as they are written."""
        return "+".join(spec(part)["name"] for part in (self.rule, *self.techniques))

    @property
    def gradients(self) -> int:
        """The most gradients, of all members together, that one image costs."""
        return math.prod(
            [
                *(self.rule.steps, _restarts(self.rule), getattr(self.rule, "cost", 1)),
                *(part.cost for part in self.techniques),
            ]
        )

    def spec(self) -> dict[str, Any]:
        """Return everything that determines what it does."""
        return {**spec(self.rule), "techniques": [spec(part) for part in self.techniques]}

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return where the last step ends, inside the threat; `model` is a model or `Surrogates`."""
        return ascend(self.rule, model, x, goal, threat, rng, self.techniques)


def compose(parts: Sequence[Any]) -> Any:
    """Return the attack that these parts make: an attack, then techniques (see `registry.parse_attack`).

    Raises:
        UsageError: if techniques are to change an attack that is no rule of ascent.
    """
    rule, *techniques = parts
    if rule.info.ascent:
        return Composition(rule, tuple(techniques))
    if techniques:
        name = spec(rule)["name"]
        raise UsageError(
            f"{name} takes no techniques: write a rule of ascent before '+', "
            f"e.g. mi-fgsm+{techniques[0].info.name}."
        )
    return rule


def ascend(
    rule: Any,
    model: Model,
    x: Images,
    goal: Goal,
    threat: ThreatModel,
    rng: RowRng,
    techniques: Sequence[Technique] = (),
) -> Images:
    """Take all steps of a rule from the images x; return where they end, inside ball and box.

    A rule has `steps`, `loss`, `init(rows)` and `step(rows, state, answer)` as row-wise attacks do. It may have
    `begin(oracle)` as techniques do, outermost of all but those that are `outside`, and a state that holds "point"
    where it stands if its next query "x" is elsewhere. With `restarts` above 1 it begins anew so often, and what
    a later one finds replaces the rest where it reaches the goal on the surrogates (arXiv:2011.05074).
    """
    surrogates = Surrogates.of(model)
    for technique in techniques:
        surrogates = technique.prepare(surrogates)
    found = _run(rule, surrogates, x, goal, threat, rng, techniques)
    for restart in range(1, _restarts(rule)):
        again = _run(rule, surrogates, x, goal, threat, rng.at(restart=restart), techniques)
        with torch.no_grad():
            better = goal.reached(surrogates(again))
        found = torch.where(per_row(better, found), again, found)
    return found


def _restarts(rule: Any) -> int:
    return int(getattr(rule, "restarts", None) or 1)


def _run(
    rule: Any,
    surrogates: Surrogates,
    x: Images,
    goal: Goal,
    threat: ThreatModel,
    rng: RowRng,
    techniques: Sequence[Technique],
) -> Images:
    """Take all steps of a rule once."""
    oracle = _chain(rule, surrogates, techniques, rng.at(step=0))
    rows = Rows(x.detach(), goal, threat, rng.at(step=0), goal)
    zero = torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def query(number: int, state: State) -> Answer:
        gradient = oracle.gradient(replace(rows, rng=rng.at(step=number + 1)), state["x"])
        return Answer(zero[:, None], zero, gradient)

    def step(number: int, state: State, answer: Answer) -> State:
        following: State = rule.step(replace(rows, rng=rng.at(step=number + 1)), state, answer)
        return following

    state = drive(rule.init(rows), rule.steps, query, step)
    return threat.project(state.get("point", state["x"]), rows.x)


def _chain(rule: Any, surrogates: Surrogates, techniques: Sequence[Technique], rng: RowRng) -> Oracle:
    """Return what a rule asks: the surrogates, techniques around them, what the rule begins, and those outside."""

    def make() -> Oracle:
        oracle: Oracle = Direct(surrogates, rule.loss, rule.steps, rng)
        for technique in reversed(techniques):
            if not technique.outside:
                oracle = technique.begin(oracle)
        return rule.begin(oracle) if hasattr(rule, "begin") else oracle

    for technique in reversed(techniques):
        if technique.outside:
            make = partial(technique.surround, make)
    return make()


def dice(rows: Rows, name: str, number: int = 0) -> Rows:
    """Return the rows with random numbers of their own for one of several calls in a step."""
    return replace(rows, rng=replace(rows.rng, stream=f"{rows.rng.stream}/{name}{number}"))


def shared(rows: Rows, name: str) -> RowRng:
    """Return a generator of one row that all images share, whatever the batch, for choices made for all."""
    rng = dice(rows, name).rng
    return replace(rng, ids=torch.zeros(1, dtype=torch.int64))


def per_pixel(threat: ThreatModel, x: Images) -> float:
    """Return by how much every pixel changes if all change alike and use up eps."""
    size, eps = x[0].numel() if len(x) else 1, float(threat.eps)
    return {"linf": eps, "l2": eps / math.sqrt(size), "l1": eps / size}[threat.norm]


def neighbour(rows: Rows, x: Images, radius: float) -> Images:
    """Return points drawn evenly from the cube of `radius` times `per_pixel` around x."""
    reach = radius * per_pixel(rows.threat, x)
    return x + reach * (2 * rows.rng.uniform(*x.shape[1:]).to(x) - 1)
