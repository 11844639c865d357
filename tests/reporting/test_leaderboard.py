"""The leaderboard: order, paired differences to the next model above, and the page."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from reports import FLAG, make_report
from rich.console import Console

from robustkit.reporting.html.leaderboard import page
from robustkit.reporting.leaderboard import Leaderboard
from robustkit.reporting.paired import compare
from robustkit.reporting.terminal.leaderboard import show

FIRM = make_report(fooled=4, model="robustkit:a@w.pt")
WEAK = make_report(fooled=20, model="robustkit:b", flags=(FLAG,))
TIED = make_report(fooled=22, wrong=2, model="robustkit:c")
FAILED = ("gone", "robustkit:d@/no.pt", "there is no weights file '/no.pt': check the path.")


def board() -> Leaderboard:
    found = [("weak", "evaluate-2", WEAK), ("<firm>", "evaluate-1", FIRM), ("tied", "evaluate-3", TIED)]
    return Leaderboard.of("0a1b2c3d", found, [FAILED])


def test_rows_are_ordered_with_paired_differences() -> None:
    rows = board().rows
    assert [row.name for row in rows] == ["<firm>", "tied", "weak"]
    assert [row.robust_accuracy for row in rows[1:]] == [TIED.robust_accuracy, WEAK.robust_accuracy]
    assert rows[0].behind is None
    found = compare(FIRM, TIED)
    behind = rows[1].behind
    assert (behind.value, behind.low, behind.high, behind.p) == (
        found.difference,
        found.low,
        found.high,
        found.p,
    )
    assert rows[2].behind is None
    assert rows[0].gradients_per_image == pytest.approx(FIRM.cost.backwards / FIRM.n)
    assert rows[2].warnings == ["zero-gradient"]


def test_flagged_models_are_ranked_separately() -> None:
    best = make_report(fooled=0, model="robustkit:e", flags=(FLAG,))
    info = make_report(fooled=4, model="robustkit:f", flags=(replace(FLAG, level="info"),))
    found = [("best", "1", best), ("weak", "2", WEAK), ("firm", "3", FIRM), ("told", "4", info)]
    rows = Leaderboard.of("0", found, []).rows
    assert [(row.name, row.rank) for row in rows] == [("firm", 1), ("told", 1), ("best", 1), ("weak", 2)]
    assert [row.behind is None for row in rows] == [True, False, True, False]
    out = io.StringIO()
    show(Leaderboard.of("0", found[:2], []), Console(file=out, width=200, markup=False))
    assert out.getvalue().index("ranked separately") < out.getvalue().index("best")
    html = page(Leaderboard.of("0", found[:2], []))
    assert "Every model has flags: each number of 40 images of digits:test at linf:8/255 may be too high" in html


@pytest.mark.parametrize(
    ("fooled", "ranks"), [((4, 4, 8), [1, 1, 3]), ((4, 8, 8), [1, 2, 2]), ((4, 4, 4), [1, 1, 1])]
)
def test_ties_share_a_rank(fooled: tuple[int, ...], ranks: list[int]) -> None:
    found = [(f"net{number}", str(number), make_report(fooled=count)) for number, count in enumerate(fooled)]
    board = Leaderboard.of("0", found, [])
    assert [row.rank for row in board.rows] == ranks
    assert [row["rank"] for row in board.to_json()["rows"]] == ranks
    assert ("are equal:" in page(board)) == (ranks[1] == 1)


def test_headline_and_caption_depend_on_p() -> None:
    """One image of 40 apart: p is 1, and nobody is called first for it."""
    near = [("one", "1", make_report(fooled=4)), ("two", "2", make_report(fooled=5))]
    far = [("one", "1", make_report(fooled=4)), ("two", "2", make_report(fooled=24))]
    first = "one: 80.0 % robust accuracy of 40 images of digits:test at linf:8/255"
    assert f"{first}, not significantly more than two (p = 1)" in page(Leaderboard.of("0", near, []))
    assert "not clearly" not in page(Leaderboard.of("0", far, []))
    for text in (page(board()), _table(board())):
        assert "here p is 0.05 or more, these images do not show which of the two is more robust" in text
        assert "holds 0" not in text


def _table(board: Leaderboard) -> str:
    out = io.StringIO()
    show(board, Console(file=out, width=200, markup=False))
    return out.getvalue()


def test_runs_on_different_images_are_not_compared() -> None:
    other = make_report(fooled=5, fingerprint="ef" * 32)
    apart = replace(make_report(fooled=6), verdicts=[replace(FIRM.verdicts[0], index=99)], n=1)
    for report in (other, apart):
        rows = Leaderboard.of("0", [("a", "x", FIRM), ("b", "y", report)], []).rows
        assert [row.behind for row in rows] == [None, None]


def test_the_json_of_the_leaderboard() -> None:
    body = board().to_json()
    assert next(iter(body.items())) == ("format", 1)
    assert json.loads(json.dumps(body)) == body
    assert body["rows"][1]["behind"]["n"] == 40
    assert body["failed"] == [{"name": "gone", "model": FAILED[1], "reason": FAILED[2]}]


def test_the_table_of_the_leaderboard() -> None:
    out = io.StringIO()
    show(board(), Console(file=out, width=200, markup=False), "x/leaderboard.html", "robustkit compare a b")
    text = out.getvalue()
    assert re.search(r"^1 +<firm> .*  80\.0 % .* –  .* –$", text, re.MULTILINE)
    assert re.search(r"^2 +tied +95\.0 % +40\.0 % +26\.3 – 55\.4 +40\.0 ", text, re.MULTILINE)
    assert "flags    weak: zero-gradient" in text
    assert "failed   gone: there is no weights file" in text
    assert text.endswith("report   x/leaderboard.html\nnext     robustkit compare a b\n")


def test_the_page_of_the_leaderboard() -> None:
    html = page(board())
    assert "&lt;firm&gt;: 80.0 % robust accuracy of 40 images of digits:test at linf:8/255" in html
    assert html.count('class="chart"') == 3
    assert 'href="evaluate-2/report.html"' in html
    assert "zero-gradient" in html
    assert "weak=robustkit:b" in html
    assert not re.search(r"<script|https?://|<link|<img", html)
