"""How a report states unresolved images, and what a minimum-norm page leaves out."""

from __future__ import annotations

import io
import re

import pytest
import torch
from nets import Small, labelled
from rich.console import Console

from robustkit import evaluate
from robustkit.registry import parse_suite
from robustkit.reporting.html.evaluation import page
from robustkit.reporting.html.trust import NEEDS_EPS, rows
from robustkit.reporting.terminal.evaluation import show, unresolved
from robustkit.runs.report_parts import Strictness
from robustkit.runs.spec import RunSpec


def spec(suite: str) -> RunSpec:
    """A run's spec with this suite in linf."""
    model = {"string": "m", "fingerprint": "f"}
    return RunSpec(model, {"string": "d", "n": 9, "fingerprint": "f"}, "linf:0.1", _records(suite), 0)


def _records(suite: str) -> list[dict[str, object]]:
    return [entry.spec for entry in parse_suite(suite, "linf")]


@pytest.mark.parametrize(
    ("images", "in_full", "suite", "words"),
    [
        (2, 3, "auto", "AutoAttack's attacks would fool at most 2 images (0.2 %) more"),
        (1, 3, "rapid", "AutoAttack's attacks would fool at most 1 image (0.1 %) more"),
        (0, 3, "auto", "AutoAttack's attacks would fool no image more"),
        (0, 7, "auto", "unresolved: no image; 7 of 7 robust images"),
        (2, 3, "pgd,apgd(loss=margin)*", "the attacks marked * that were not run on them would fool"),
    ],
)
def test_the_sentence_names_the_quantity_of_the_bound(images: int, in_full: int, suite: str, words: str) -> None:
    assert words in unresolved(Strictness(images, images / 1000, 0.002, 7, in_full), spec(suite))


def test_table_and_page_end_with_the_bound() -> None:
    net = Small().eval()
    x, y = labelled(net, 12, (3, 9, 7))
    found = evaluate(net, x, y, "linf:0.05", suite="pgd(steps=2),apgd(loss=ce,steps=3)*,apgd-t(steps=3)*")
    out = io.StringIO()
    show(found, Console(file=out, width=80))
    table = out.getvalue().partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert table[-1].startswith("unresolved")
    # Nothing is cut off on a terminal of 80 columns.
    assert not any("…" in line for line in table)
    assert "Unresolved" in page(found, None)
    # These arms are not AutoAttack's.
    assert dict((flag.code, flag) for _, flag in rows(found))["audit-broke"].level == "not measured"


def test_a_minimum_norm_page_leaves_out_questions_about_an_eps() -> None:
    net = Small().eval()
    x, y = labelled(net, 6, (3, 9, 7))
    found = evaluate(net, x, y, "l2:min", suite="fmn(steps=20)")
    assert not NEEDS_EPS & {flag.code for _, flag in rows(found)}
    assert torch.isfinite(torch.tensor([far or 0.0 for far in found.minimum.distances])).all()
    # The path of the curve is a line, not an area.
    assert re.search(r"\.curve \{[^}]*fill: none", page(found, None))
