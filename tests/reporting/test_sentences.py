"""What pages and tables state: misclassified images are not fooled ones, checks are not the clean pass."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from reports import make_report
from rich.console import Console
from test_craft_page import craft, judgement

from robustkit.cli import run
from robustkit.reporting import costs
from robustkit.reporting.charts.cascade import cascade
from robustkit.reporting.html import craft as craft_page
from robustkit.reporting.html import evaluation as evaluation_page
from robustkit.reporting.html.command import commands
from robustkit.reporting.terminal import evaluation
from robustkit.runs import invocation
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Passes

# 4 of 40 images are wrong as they are, 12 fall to attacks.
CHECKED = replace(make_report(), checks=Passes(13, 9))


def printed(report: Report) -> list[str]:
    out = io.StringIO()
    evaluation.show(report, Console(file=out, width=200, markup=False))
    return out.getvalue().splitlines()


def test_misclassified_images_are_not_counted_as_fooled() -> None:
    lines = {line.split("  ")[0]: line for line in printed(CHECKED)}
    assert re.search(r" 4 wrong  +\d", lines["clean"])
    assert re.search(r"  12  +\d", lines["worst case"])
    page = evaluation_page.page(CHECKED, None)
    assert (
        '<tr class="total"><td>all</td><td data-label="images in">40</td><td data-label="fooled">12</td>' in page
    )
    assert "4 wrong" in page
    assert "lost in this stage" not in page


def test_the_first_bar_is_the_clean_stage() -> None:
    kinds = re.findall(r'class="(robust|fooled|clean)"', str(cascade(CHECKED)))
    assert kinds == ["robust", "clean", "robust", "fooled", "robust", "fooled"]
    assert re.findall(r'class="(robust|fooled|clean)"', str(cascade(make_report(wrong=0))))[:2] == [
        "robust",
        "robust",
    ]


def test_the_checks_have_a_row_of_their_own() -> None:
    clean, checks, *attacks = costs.rows(CHECKED)
    stage = CHECKED.stages[0]
    assert (clean.passes, checks.passes) == (stage.forwards + stage.backwards - 22, 22)
    assert clean.seconds + checks.seconds == pytest.approx(stage.seconds)
    assert (checks.attack, checks.fooled, checks.rate) == ("checks", "–", None)
    assert sum(row.passes for row in costs.rows(CHECKED)) == CHECKED.cost.forwards + CHECKED.cost.backwards
    assert len(attacks) == len(CHECKED.stages) - 1
    # A record of before has no such number, and no such row.
    assert [row.attack for row in costs.rows(make_report())] == ["clean", "pgd", "autoattack:square"]
    assert Report.from_json(CHECKED.to_json()) == CHECKED
    assert "checks" not in make_report().to_json()


def test_a_report_has_the_cost_of_the_checks_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--limit", "9", "--suite", "fgsm", "--out", "my run"]
    assert run(words) == 0
    report = json.loads(Path("my run/report.json").read_text())
    clean, fgsm = report["stages"]
    assert clean["forwards"] - report["checks"]["forwards"] == 9
    assert clean["backwards"] == report["checks"]["backwards"]
    assert clean["forwards"] + fgsm["forwards"] == report["cost"]["forwards"]
    assert report["environment"]["command"] == "robustkit evaluate --limit 9 --suite fgsm --out 'my run'"
    page = Path("my run/report.html").read_text()
    given, expanded = re.findall(r"<pre>(robustkit evaluate.*?)</pre>", page, re.DOTALL)
    assert given == "robustkit evaluate --limit 9 --suite fgsm --out &#39;my run&#39;"
    assert "fgsm(loss=ce)" in expanded
    assert page.index("<summary>the same with every field written out") < page.index(expanded)
    assert re.search(r"^checks +– +– +– ", capsys.readouterr().out, re.MULTILINE)


def test_the_command_is_recorded_without_logins_and_only_on_the_command_line() -> None:
    assert invocation.command() is None
    with invocation.record_command(["evaluate", "a b", "--ray", "ray://me:secret@host:1"]):
        assert invocation.command() == "robustkit evaluate 'a b' --ray 'ray://…@host:1'"
    assert invocation.command() is None


@pytest.mark.parametrize("text", ["rm -rf ~", "robustkit 'evaluate", "echo robustkit", "", None, 7])
def test_a_recorded_command_that_is_not_robustkit_is_not_shown(text: object) -> None:
    assert commands({"command": text}, "robustkit evaluate m") == {
        "command": "robustkit evaluate m",
        "expanded": "",
    }
    shown = commands({"command": "robustkit evaluate x; rm -rf ~\n$(id)"}, "e")["command"]
    assert shlex.split(shown) == ["robustkit", "evaluate", "x;", "rm", "-rf", "~", "$(id)"]
    assert "'x;'" in shown
    assert "'$(id)'" in shown


def test_the_verdict_of_a_craft_run_names_the_targets() -> None:
    page = craft_page.page(craft(), None)
    assert re.search(r"66\.7 % of the images that \S+ classified correctly fool it\.", page)
    both = craft(targets=[judgement([1, 0, 2, 3]), judgement([0, 1, 2, 3])])
    page = craft_page.page(both, None)
    assert "fooled by" not in page
    assert re.search(r"66\.7 % fool \S+, the most of 2 targets, and 0\.0 % fool \S+, the least\.", page)
