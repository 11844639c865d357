"""Transfer attacks as compositions: an ascent rule, and techniques that change its gradients.

The rule (`mi-fgsm`, `pgd`, `cwa` …) is an attack whose `step` uses only the gradient of an answer. A
technique (`di`, `vmi`, `ghost` …) wraps the oracle that the rule gets its gradients from: in `mi-fgsm+vmi+di` the
rule's gradients come from `vmi`, those that `vmi` uses come from `di`, and `di` uses the surrogates' gradients at
transformed images. All rows take all steps, also after an image fools the surrogates, because the aim is to fool
other models.
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
from robustkit.attack_api.oracles import Oracle, SurrogateOracle
from robustkit.attack_api.rows import Answer, Model, Rows, State
from robustkit.attack_api.surrogates import Surrogates
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel, per_row
from robustkit.registry import Info, spec


class Technique(ABC):
    """A change of the gradient, to be subclassed by a frozen dataclass that is registered as `@technique`.

    Example:
        >>> class Halved(Technique):
        ...     def wrap(self, inner):
        ...         return TransformedOracle(inner, "halved", 1, lambda rows, x, number: x / 2)
        >>> from robustkit.attack_api.oracles import TransformedOracle
        >>> Halved().cost
        1
    """

    __slots__ = ()

    @property
    def cost(self) -> int:
        """The most gradients that it uses for one; a gradient of a single member counts as its share."""
        return 1

    def prepare(self, surrogates: Surrogates) -> Surrogates:
        """Return the surrogates to use, before a run."""
        return surrogates

    @property
    def outermost(self) -> bool:
        """Whether it wraps the whole of a rule's step, and not only the gradients that the rule gets."""
        return False

    @abstractmethod
    def wrap(self, inner: Oracle) -> Oracle:
        """Return the oracle to use in place of `inner` during one run on one batch."""

    def wrap_each(self, make: Callable[[], Oracle]) -> Oracle:
        """Return the oracle to use in place of those that `make` makes, if it is `outermost`.

        Each call of `make` returns an oracle with a memory of its own.
        """
        return self.wrap(make())


@dataclass(frozen=True)
class Composition:
    """An attack made of an ascent rule and techniques, the outermost first.

    Attributes:
        rule: an attack that is registered with `ascent=True`.
        techniques: changes of its gradients; each wraps the ones after it.
    """

    rule: Any
    techniques: tuple[Technique, ...] = ()

    @property
    def info(self) -> Info:
        """The rule's registration."""
        info: Info = self.rule.info
        return info

    @property
    def name(self) -> str:
        """The names, joined by `+`."""
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
        """Return the rule's and the techniques' names and parameters."""
        return {**spec(self.rule), "techniques": [spec(part) for part in self.techniques]}

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return the last points (B C H W), inside the threat; `model` is a model or `Surrogates`."""
        return ascend(self.rule, model, x, goal, threat, rng, self.techniques)


def compose(parts: Sequence[Any]) -> Any:
    """Return the composition of an attack and the techniques after it (see `registry.parse_attack`).

    Raises:
        UsageError: if techniques follow an attack that is no ascent rule.

    Example:
        >>> from robustkit.registry import make, make_technique
        >>> compose([make("mi-fgsm"), make_technique("di")]).name
        'mi-fgsm+di'
    """
    rule, *techniques = parts
    if rule.info.ascent:
        return Composition(rule, tuple(techniques))
    if techniques:
        name = spec(rule)["name"]
        raise UsageError(
            f"{name} takes no techniques: use an ascent rule before '+', e.g. mi-fgsm+{techniques[0].info.name}."
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
    """Take all steps of a rule from the images x; return the last points (B C H W), inside ball and box.

    The rule is run `restarts` times; the points of a later run replace earlier ones if they reach the goal on the
    surrogates (arXiv:2011.05074).

    Args:
        rule: has `steps`, `loss`, `init(rows)` and `step(rows, state, answer)` as row-wise attacks do. It may
            have `wrap(oracle)` as techniques do, around all techniques but those that are `outermost`, and a state
            with the current "point" if its next query "x" is another point.
        model: a model, or `Surrogates`.
        x: clean images (B C H W) in [0, 1].
        goal: the labels, and the targets if there are any.
        threat: the perturbations that are allowed.
        rng: random numbers, each row's own.
        techniques: changes of the gradients, the outermost first.
    """
    surrogates = Surrogates.of(model)
    for technique in techniques:
        surrogates = technique.prepare(surrogates)
    points = _run(rule, surrogates, x, goal, threat, rng, techniques)
    for restart in range(1, _restarts(rule)):
        again = _run(rule, surrogates, x, goal, threat, rng.at(restart=restart), techniques)
        with torch.no_grad():
            better = goal.reached(surrogates(again))
        points = torch.where(per_row(better, points), again, points)
    return points


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
    x = x.detach()
    rows = Rows(x, goal, threat, rng.at(step=0), goal, bounds=threat.bounds(x))
    zero = torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def query(number: int, state: State) -> Answer:
        gradient = oracle.gradient(replace(rows, rng=rng.at(step=number + 1)), state["x"])
        return Answer(zero[:, None], zero, gradient)

    def step(number: int, state: State, answer: Answer) -> State:
        following: State = rule.step(replace(rows, rng=rng.at(step=number + 1)), state, answer)
        return following

    state = drive(rule.init(rows), rule.steps, query, step)
    return rows.project(state.get("point", state["x"]))


def _chain(rule: Any, surrogates: Surrogates, techniques: Sequence[Technique], rng: RowRng) -> Oracle:
    """Return a rule's oracle: the surrogates, the techniques around them, the rule's own, the outermost ones."""

    def make() -> Oracle:
        oracle: Oracle = SurrogateOracle(surrogates, rule.loss, rule.steps, rng)
        for technique in reversed(techniques):
            if not technique.outermost:
                oracle = technique.wrap(oracle)
        return rule.wrap(oracle) if hasattr(rule, "wrap") else oracle

    for technique in reversed(techniques):
        if technique.outermost:
            make = partial(technique.wrap_each, make)
    return make()
