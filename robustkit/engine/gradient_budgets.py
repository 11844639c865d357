"""An attack at other gradient budgets: with as many steps as the budget allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from robustkit.attack_api import Composition
from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.core.step_size import REACH_TOLERANCE, StepSize
from robustkit.registry import spec
from robustkit.runs.craft_record import Point

# From here on a ledger's stages are budgets.
STAGE = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Gradients per image: `once` for a run, and `step` for each of its steps."""

    once: int
    step: int

    @classmethod
    def of(cls, attack: Composition, spend: Callable[[Any], int]) -> Prices:
        """Return the prices of an attack, from the gradients of one image (`spend`) in one step and in two.

        Raises:
            UsageError: if a step costs no gradient.
        """
        one, two = (spend(with_steps(attack, steps, 1.0)) for steps in (1, 2))
        if two <= one:
            raise UsageError(f"{attack.name} costs no gradient for each step; leave --budgets out.")
        return cls(max(2 * one - two, 0), two - one)

    def point(self, attack: Composition, budget: int, eps: float) -> tuple[Point, Composition | None]:
        """Return how the attack runs at a budget and an eps; without an attack where one step costs more.

        The steps keep their size unless so few would not reach eps: then each is eps / steps.
        """
        steps = (budget - self.once) // self.step
        if steps < 1:
            return Point(budget, None, None, None), None
        changed = with_steps(attack, steps, eps)
        size = getattr(changed.rule, "step_size", None)
        return Point(budget, steps, size and size.share(eps), None), changed


def check(attack: Any) -> None:
    """Raise UsageError for an attack without a field `steps`."""
    rule = attack.rule if isinstance(attack, Composition) else None
    if rule is None or "steps" not in {field.name for field in dataclasses.fields(rule)}:
        name = attack.name if isinstance(attack, Composition) else spec(attack)["name"]
        raise UsageError(
            f"{name} has no number of steps that --budgets could set; use an attack in steps such as mi-fgsm, or "
            "leave --budgets out."
        )


def falls_short(attack: Any, eps: float) -> Flag | None:
    """Return a flag for an attack whose steps together cannot reach from an image to the edge of the ball.

    None for those that can, for those whose steps follow from their number, and for steps of no fixed length.
    """
    rule = attack.rule if isinstance(attack, Composition) else attack
    size = getattr(rule, "step_size", None)
    if size is None or not rule.info.ascent or getattr(rule, "update", None) == "plain":
        return None
    steps, share = rule.steps, rule.steps * size.share(eps)
    if share > 1 - REACH_TOLERANCE:
        return None
    return Flag(
        "steps-fall-short",
        "warning",
        share,
        f"of eps is all that {steps} steps of {size} can change",
        f"give more steps, or step_size={1 / steps:.3g}eps",
    )


def with_steps(attack: Composition, steps: int, eps: float) -> Composition:
    """Return the attack with another number of steps, of at least eps / steps each."""
    changes: dict[str, Any] = {"steps": steps}
    size = getattr(attack.rule, "step_size", None)
    if size is not None and size.share(eps) < 1 / steps:
        changes["step_size"] = StepSize(1 / steps)
    return dataclasses.replace(attack, rule=dataclasses.replace(attack.rule, **changes))
