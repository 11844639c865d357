"""The contract of attacks, defenses and training methods, as functions that check any class; a model server.

As `check_estimator` of scikit-learn: they raise AssertionError with what is wrong, and return None if nothing is.

    from robustkit.testing import check_attack
    check_attack(MyAttack(steps=20))
"""

from __future__ import annotations

from robustkit.testing.attacks import check_attack
from robustkit.testing.defenses import check_defense
from robustkit.testing.methods import check_method
from robustkit.testing.server import ModelServer

__all__ = ["ModelServer", "check_attack", "check_defense", "check_method"]
