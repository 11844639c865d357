"""The table of scripts/benchmarks/flags.py: what is a miss, a false alarm and neither."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
from flags import exceeds, table


def row(name, truth, autoattack, auto, flags=(), images=24, half=""):
    return {"name": name, "net": "digits", "images": images, "half": half, "truth": truth} | {
        "autoattack": autoattack,
        "auto": auto,
        "flags": list(flags),
    }


def test_one_image_or_two_points_more_than_the_truth_are_not_too_high():
    assert not exceeds(row("a", 3, 4, 3), "autoattack")
    assert exceeds(row("a", 3, 5, 3), "autoattack")
    assert not exceeds(row("a", 100, 104, 100, images=200), "autoattack")
    assert exceeds(row("a", 100, 105, 100, images=200), "autoattack")


def test_misses_and_false_alarms_are_counted_and_named():
    rows = [
        row("seen", 2, 9, 2, ["zero-gradient"]),
        row("missed", 2, 9, 9, half="open"),
        row("harmless", 2, 2, 2, ["randomised"], half="aside"),
        row("unmasked: plain", 5, 5, 5),
        row("unmasked: suspected", 5, 5, 5, ["not-converged"]),
    ]
    lines = table(rows)
    assert "| of the first gauntlet | 1 of 1 | 0 of 0 | 0 of 1 |" in lines
    assert "| later, open half | 0 of 1 | 0 of 0 | 1 of 1 |" in lines
    assert "| later, kept aside | 0 of 0 | 1 of 1 | 0 of 1 |" in lines
    assert not any("kept aside" in line for line in table(rows[:2]))
    assert "unmasked nets flagged: 1 of 2" in lines
    assert "precision: 2 of 3 flagged rows are masks" in lines
    assert "recall: 1 of 2 masks that mislead AutoAttack are flagged" in lines
    assert "missed: missed around digits" in lines
    assert "false alarm: unmasked: suspected: not-converged" in lines
