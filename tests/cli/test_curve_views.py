"""The curve on the command line: requested in three ways, printed, drawn, exported, refused."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from reports import make_examples, make_report

from robustkit.cli import run
from robustkit.reporting.exports.verdicts import rows, to_csv, to_parquet
from robustkit.reporting.html.command import command
from robustkit.reporting.html.evaluation import page
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Cost, Curve

SMALL = ["evaluate", "--limit", "24", "--suite", "pgd(steps=5)"]
EPS = 8 / 255


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_curve(report: Report) -> Report:
    """A hand-made report with distances that fit its verdicts."""
    far = {"clean": 0.0, None: 1.7 * EPS}
    distances = [*(far.get(verdict.attack, 0.4 * EPS) for verdict in report.verdicts[:-1]), None]
    radii = [EPS * k / 8 for k in range(1, 17)]
    return replace(report, curve=Curve.of(radii, distances, Cost(400, 300, 0.5)))


@pytest.mark.slow
def test_curve_of_the_built_in_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--curve"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\neps +0\.0375 +0\.075 +0\.15 +0\.225 +0\.3 *\nrobust acc( +\d+\.\d %){5} *\n", out)
    assert re.search(r"\nmedian smallest fooling eps \S+   [\d,]+ passes per image   \S+ s\n", out)
    (folder,) = Path("runs").iterdir()
    before = (folder / "report.json").read_bytes()
    assert run([*SMALL, "--threat", "linf:curve"]) == 0  # digits' own eps is linf:0.15
    captured = capsys.readouterr()
    assert (captured.out, list(Path("runs").iterdir())) == (out, [folder])
    assert "this is its stored result" in captured.err
    assert (folder / "report.json").read_bytes() == before
    assert "Robust accuracy against eps" in (folder / "report.html").read_text()
    assert run(["verify", str(folder)]) == 0


def test_a_curve_added_later_updates_the_page() -> None:
    assert run([*SMALL, "--out", "r"]) == 0
    assert "against eps" not in Path("r/report.html").read_text()
    assert run([*SMALL, "--out", "r", "--curve"]) == 0
    assert "against eps" in Path("r/report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "threat"), [("l2", "l2:0.5"), ("l1", "l1:12"), ("linf", "linf:0.15")])
def test_the_default_eps_of_a_norm(norm: str, threat: str) -> None:
    words = ["evaluate", "--limit", "6", "--suite", "fgsm" if norm != "l1" else "pgd(steps=2)", "--no-html"]
    assert run([*words, "--threat", f"{norm}:curve", "--out", "r"]) == 0
    report = json.loads(Path("r/report.json").read_text())
    assert report["spec"]["threat"] == threat
    assert len(report["curve"]["distances"]) == 6


@pytest.mark.parametrize(
    ("threat", "sentence"),
    [
        ("linf:curv", "eps 'curv' is not a number; write a fraction or a decimal, e.g. linf:8/255."),
        ("l3:curve", "write NORM:EPS with a norm of linf, l2 or l1, e.g. linf:8/255 or l2:0.5."),
    ],
)
def test_an_unknown_eps_is_refused_in_one_sentence(
    threat: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, "--threat", threat]) == 2
    assert capsys.readouterr().err == f"error: threat '{threat}': {sentence}\n"


@pytest.mark.parametrize("case", ["usual", "all wrong", "one image", "wide"])
def test_the_page_shows_the_curve(case: str) -> None:
    report = with_curve(
        {
            "usual": make_report(),
            "all wrong": make_report(8, 0, wrong=8),
            "one image": make_report(1, 0, wrong=0, attacks=("pgd",)),
            "wide": make_report(5000, 900, wrong=70),
        }[case]
    )
    text = page(report, make_examples(report))
    section = text[text.index("<h2>Robust accuracy against eps</h2>") :].partition("</section>")[0]
    assert section.count('class="curve"') == 16
    assert len(re.findall("<circle ", section)) == 17
    assert section.count('class="mark"') == 1
    assert section.count('class="band"') == 2  # in the chart and in its legend
    assert "eps 8/255" in section
    assert not re.search(r"nan|inf[^oi]", re.sub(r"<[^s/][^>]*>", "", section).replace("linf", ""))
    path = re.search(r'<path d="M([^"]*)Z" class="band"', section)
    assert path
    assert len(path[1].split("L")) == 34
    assert "against eps" not in page(make_report(), None)


def test_export_has_a_column_for_the_curve() -> None:
    report = with_curve(make_report())
    table = rows(report, make_examples(report))
    read = list(csv.DictReader(io.StringIO(to_csv(table).decode(), newline="")))
    assert [row["smallest_distance"] for row in read] == [
        "" if distance is None else str(distance) for distance in report.curve.distances
    ]
    assert "smallest_distance" not in rows(make_report(), None)[0]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(io.BytesIO(to_parquet(table))).to_pylist() == table


def test_the_repeated_command_has_the_curve_flag() -> None:
    assert command(with_curve(make_report())).endswith(" --curve")
    assert command(with_curve(make_report(model="python:Net"))).endswith(", curve=True)")
