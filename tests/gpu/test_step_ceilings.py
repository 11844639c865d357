"""What one step costs beside the net: no more kernel launches and host synchronisations than these ceilings.

`python scripts/tools/step_costs.py` prints today's figures, and the lines that make them. Lower a ceiling with the
change that makes it possible.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/tools"))

from step_costs import NAMES, step_costs

# The most launches and synchronisations per step. A read of results, every fourth step, counts in part.
CEILINGS = {
    "pgd": (52, 1),
    "race": (66, 1),
    "apgd": (81, 1),
    "apgd-t": (106, 1),
    "fab-t": (186, 5),
    "square": (132, 1),
    "several at once": (242, 2),
    "craft mi-fgsm": (77, 1),
    "craft cwa": (179, 3),
    "train standard": (79, 0),
    "train dverge": (1191, 0),
}
SLOW = {"apgd-t", "fab-t", "craft cwa", "train dverge"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES])
def test_a_step_costs_at_most_its_ceiling(name: str) -> None:
    launches, syncs = CEILINGS[name]
    costs = step_costs(name)
    assert costs.syncs <= syncs, costs.text("sync")
    assert costs.launches <= launches, costs.text("launch")
