"""Any attack of foolbox (Rauber et al. 2017, arXiv:1707.04131) as `foolbox:NAME(field=value)`."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from robustkit.attack_api import Model
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits
from robustkit.core.threat import ThreatModel
from robustkit.registry import attack


@attack(
    "foolbox",
    paper="arXiv:1707.04131",
    norms=("linf", "l2", "l1"),
    access="any",
    coupled=True,
    family=True,
)
@dataclass(frozen=True, slots=True)
class Foolbox:
    """Any of foolbox's attacks, as `foolbox:NAME(field=value)`, e.g. `foolbox:L2DeepFoolAttack`.

    It is run once, at the threat's eps. It uses torch's global random numbers, which are seeded for each batch.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def member(cls, tail: str, **fields: Any) -> Foolbox:
        """Return the attack `foolbox:tail`; UsageError for an unknown name or field, or a number out of range."""
        for field, number in fields.items():
            least = 1 if field.endswith("steps") else 0
            if isinstance(number, (int, float)) and not least <= number < math.inf:
                raise UsageError(f"foolbox:{tail}: {field}={number} must be at least {least}.")
        value = cls(f"foolbox:{tail}", tuple(sorted(fields.items())))
        value._build()
        return value

    def fields(self) -> dict[str, Any]:
        """Return the fields that were given."""
        return dict(self.arguments)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that the attack is made for."""
        from foolbox.distances import LpDistance

        distance = getattr(self._build(), "distance", None)
        known = {1: "l1", 2: "l2", float("inf"): "linf"}
        if isinstance(distance, LpDistance):
            return (known.get(distance.p, f"l{distance.p:g}"),)
        return ("linf", "l2", "l1")

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return foolbox's clipped images, fooling or not."""
        import foolbox

        wrapped = foolbox.PyTorchModel(_Module(model).eval(), bounds=(0, 1), device=x.device)
        criterion = (
            foolbox.criteria.Misclassification(goal.labels)
            if goal.targets is None
            else foolbox.criteria.TargetedMisclassification(goal.targets)
        )
        _, clipped, _ = self._build()(wrapped, x, criterion, epsilons=float(threat.eps))
        result: Images = clipped
        return result.detach()

    def _build(self) -> Any:
        import foolbox.attacks

        tail = self.name.partition(":")[2]
        known = {
            name: kind
            for name, kind in vars(foolbox.attacks).items()
            if inspect.isclass(kind) and callable(kind) and not inspect.isabstract(kind) and name[0].isupper()
        }
        if tail not in known:
            raise did_you_mean("foolbox attack", tail, known)
        allowed = inspect.signature(known[tail]).parameters
        for field in self.fields():
            if field not in allowed:
                raise did_you_mean(f"field of {self.name}", field, allowed)
        try:
            return known[tail](**self.fields())
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.name} cannot be made: {error}.") from error


class _Module(nn.Module):
    """Module around a model, as foolbox requires. The model is not its child, so its mode does not change."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.held = (model,)

    def forward(self, x: Images) -> Logits:
        return self.held[0](x)
