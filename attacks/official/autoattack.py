"""AutoAttack's own attacks and suites (Croce & Hein 2020, arXiv:2003.01690), run by the authors' package.

The attack code, the order and the hyper-parameters are pyautoattack's. Every call creates a new attack object, so
no state passes from one batch or run to the next. Departures, each where the package would raise an IndexError:
targets are at most K - 1, and with K < 4 (targeted) or K < 3 classes the DLR loss is the one of
`robustkit.core.criteria`. A setting of None is that of AutoAttack's `standard` suite for the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from robustkit.attack_api import Model
from robustkit.core import criteria
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.limits import Limits
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits, PerRow
from robustkit.core.threat import ThreatModel
from robustkit.registry import attack, suite
from robustkit.registry.ranges import Count

PAPER = "arXiv:2003.01690"
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@suite("autoattack", paper="arXiv:2003.01690")
def standard(norm: str) -> list[str]:
    """AutoAttack `standard`: apgd-ce, apgd-t, fab-t, square."""
    return ["autoattack:apgd-ce", "autoattack:apgd-t", "autoattack:fab-t", "autoattack:square"]


@suite("autoattack-plus", paper="arXiv:2003.01690")
def plus(norm: str) -> list[str]:
    """AutoAttack `plus`: six attacks, with five restarts for those that restart."""
    settings = "restarts=5,large_start=false"
    return [
        f"autoattack:apgd-ce({settings})",
        f"autoattack:apgd-dlr({settings})",
        "autoattack:fab(restarts=5)",
        "autoattack:square",
        "autoattack:apgd-t(targets=9,large_start=false)",
        "autoattack:fab-t",
    ]


@suite("autoattack-rand", paper="arXiv:2003.01690")
def rand(norm: str) -> list[str]:
    """AutoAttack `rand`, for randomised defenses: apgd-ce and apgd-dlr, gradients averaged over 20 draws."""
    settings = "restarts=1,eot_iter=20,large_start=false"
    return [f"autoattack:apgd-ce({settings})", f"autoattack:apgd-dlr({settings})"]


@dataclass(frozen=True, slots=True)
class _APGD:
    steps: Count = 100
    restarts: Count | None = None
    eot_iter: Count = 1
    large_start: bool | None = None

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return a fooling image per row, or the clean one."""
        from pyautoattack.autopgd_base import APGDAttack

        l1 = threat.norm == "l1"
        official = APGDAttack(
            model,
            n_iter=self.steps,
            n_restarts=self.restarts or (5 if l1 else 1),
            eot_iter=self.eot_iter,
            use_largereps=l1 if self.large_start is None else self.large_start,
            loss=self.info.name.rpartition("-")[2],  # type: ignore[attr-defined]
            **_common(x, threat, rng),
        )
        if _classes(model, x) < 3:
            official.dlr_loss = criteria.dlr
        return _perturb(official, x, goal)

    def budget(self, num_classes: int, norm: str) -> int:
        """Return the forwards that one surviving image costs."""
        return (self.restarts or (5 if norm == "l1" else 1)) * (self.steps + 3) * self.eot_iter


@attack(
    "autoattack:apgd-ce",
    paper="arXiv:2003.01690",
    norms=("linf", "l2", "l1"),
    access="gradient",
    coupled=True,
)
@dataclass(frozen=True, slots=True)
class APGDCE(_APGD):
    """Official Auto-PGD on cross-entropy."""


@attack(
    "autoattack:apgd-dlr",
    paper="arXiv:2003.01690",
    norms=("linf", "l2", "l1"),
    access="gradient",
    coupled=True,
)
@dataclass(frozen=True, slots=True)
class APGDDLR(_APGD):
    """Official Auto-PGD on the difference of logits ratio."""


@attack(
    "autoattack:apgd-t",
    paper="arXiv:2003.01690",
    norms=("linf", "l2", "l1"),
    access="gradient",
    coupled=True,
)
@dataclass(frozen=True, slots=True)
class APGDT:
    """Official targeted Auto-PGD, one run for each of the likeliest other classes."""

    steps: Count = 100
    restarts: Count = 1
    targets: Count | None = None
    eot_iter: Count = 1
    large_start: bool | None = None

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return a fooling image per row, or the clean one."""
        from pyautoattack.autopgd_base import APGDAttack_targeted

        l1 = threat.norm == "l1"
        classes = _classes(model, x)
        official = APGDAttack_targeted(
            model,
            n_iter=self.steps,
            n_restarts=self.restarts,
            n_target_classes=min(self.targets or (5 if l1 else 9), classes - 1),
            eot_iter=self.eot_iter,
            use_largereps=l1 if self.large_start is None else self.large_start,
            **_common(x, threat, rng),
        )
        if classes < 4:

            def dlr_targeted(logits: Logits, labels: Labels) -> PerRow:
                return criteria.dlr(logits, labels, official.y_target)

            official.dlr_loss_targeted = dlr_targeted
        return _perturb(official, x, goal)

    def budget(self, num_classes: int, norm: str) -> int:
        """Return the forwards that one surviving image costs."""
        targets = min(self.targets or (5 if norm == "l1" else 9), num_classes - 1)
        return targets * self.restarts * (self.steps + 3) * self.eot_iter


@dataclass(frozen=True, slots=True)
class _FAB:
    steps: Count = 100
    restarts: Count = 1

    def _official(self, model: Model, x: Images, threat: ThreatModel, rng: RowRng, **more: Any) -> Any:
        from pyautoattack.fab_pt import FABAttack_PT

        common = _common(x, threat, rng)
        del common["logger"]
        return FABAttack_PT(model, n_iter=self.steps, n_restarts=self.restarts, **common, **more)


@attack("autoattack:fab", paper="arXiv:1907.02044", norms=("linf", "l2", "l1"), access="gradient", coupled=True)
@dataclass(frozen=True, slots=True)
class FAB(_FAB):
    """Official fast adaptive boundary attack, towards the nearest of all classes."""

    restarts: Count = 5

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return a fooling image per row, or the clean one."""
        return _perturb(self._official(model, x, threat, rng), x, goal)

    def budget(self, num_classes: int, norm: str) -> int:
        """Return the forwards that one surviving image costs."""
        return self.restarts * (2 * self.steps + 2)


@attack("autoattack:fab-t", paper="arXiv:1907.02044", norms=("linf", "l2", "l1"), access="gradient", coupled=True)
@dataclass(frozen=True, slots=True)
class FABT(_FAB):
    """Official targeted FAB, one run for each of the likeliest other classes."""

    targets: Count = 9

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return a fooling image per row, or the clean one."""
        targets = min(self.targets, _classes(model, x) - 1)
        return _perturb(self._official(model, x, threat, rng, targeted=True, n_target_classes=targets), x, goal)

    def budget(self, num_classes: int, norm: str) -> int:
        """Return the forwards that one surviving image costs."""
        return min(self.targets, num_classes - 1) * self.restarts * (2 * self.steps + 3)


@attack("autoattack:square", paper="arXiv:1912.00049", norms=("linf", "l2", "l1"), access="score", coupled=True)
@dataclass(frozen=True, slots=True)
class Square:
    """Official Square attack: random search by scores alone."""

    queries: Annotated[int, Limits(1, 100_000_000)] = 5000
    restarts: Count = 1

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return a fooling image per row, or the clean one."""
        from pyautoattack.square import SquareAttack

        common = _common(x, threat, rng)
        del common["logger"]
        official = SquareAttack(
            model,
            p_init=0.8,
            n_queries=self.queries,
            n_restarts=self.restarts,
            resc_schedule=False,
            **common,
        )
        with torch.no_grad():
            return _perturb(official, x, goal)

    def budget(self, num_classes: int, norm: str) -> int:
        """Return the forwards that one surviving image costs."""
        return self.restarts * self.queries


def _common(x: Images, threat: ThreatModel, rng: RowRng) -> dict[str, Any]:
    """Return the settings that all of the package's attacks share."""
    return {
        "norm": NORMS[threat.norm],
        "eps": float(threat.eps),
        "seed": rng.seed,
        "device": x.device,
        "verbose": False,
        "logger": _Silent(),
    }


def _classes(model: Model, x: Images) -> int:
    """Return the number of classes, by one forward pass if the model does not say."""
    known: int | None = getattr(model, "num_classes", None)
    return known or model(x[:1]).shape[1]


def _perturb(official: Any, x: Images, goal: Goal) -> Images:
    if goal.targets is not None:
        raise UsageError("AutoAttack's attacks aim at any wrong class; use one of robustkit's own for targets.")
    result: Images = official.perturb(x, goal.labels)
    return result.detach()


class _Silent:
    """Discards the package's message that gradients at a start are zero.

    It includes points that are already fooled, whose loss is flat; `robustkit.checks` measures zero gradients
    itself.
    """

    def warning(self, message: str) -> None:
        """Drop it."""
