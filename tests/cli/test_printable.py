"""Names with escape sequences, line breaks and direction marks are printed as text."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from reports import FLAG, make_examples, make_report, write_run

from robustkit.cli import run
from robustkit.cli.progress import Display, RunsDisplay, TrainDisplay
from robustkit.cli.terminal import Terminal
from robustkit.core.errors import RunError, UsageError, printable
from robustkit.core.flags import Flag
from robustkit.reporting.exports.verdicts import to_csv

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\u2066\rrobust 99 %\nworst case 100.0 %"
FORBIDDEN = "\x1b\x07\x9b\u202e\u2066\r\x08\x00"


def is_printable(text: str) -> bool:
    return not any(sign in text for sign in FORBIDDEN) and "\nworst case 100.0 %" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – … 日本 ü", "plain – … 日本 ü"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x9b\x00\x7f", "\\x9b\\x00\\x7f"),
        ("\u202e\u2067\u200f\u2028", "\\u202e\\u2067\\u200f\\u2028"),
        ("\udcff", "\\udcff"),
        ("[red]x[/red] :100:", "[red]x[/red] :100:"),
    ],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    for kind in (UsageError, RunError):
        assert str(kind(f"no file {text!s}")) == f"no file {printable(text, keep=chr(10))}"
    file = io.StringIO()
    Terminal(file=file, width=200).print(f"\n{text}", highlight=False, soft_wrap=True)
    assert file.getvalue() == f"\n{shown}\n"


def test_columns_of_a_live_display_are_escaped() -> None:
    file = io.StringIO()
    runs = RunsDisplay()
    runs.console = Terminal(file=file, force_terminal=True, width=300)
    lane = runs.of_run(f"[red]{EVIL}")
    lane.stage(EVIL, 4, 3, 4)
    lane.advance(2.0, 3)
    runs.bar.refresh()
    lane.close()
    runs.close()
    assert "[red]" in file.getvalue()
    assert "\\x1b[2J" in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()
    assert "\u202e" not in file.getvalue()


@pytest.mark.parametrize("display", [Display, TrainDisplay])
def test_messages_are_escaped(display: type[Display], capsys: pytest.CaptureFixture[str]) -> None:
    display().say(f"row 1: crafting on {EVIL}")
    assert is_printable(capsys.readouterr().err)


def test_a_received_record_is_printed_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flag = Flag(EVIL, "warning", 3, EVIL, EVIL)
    report = make_report(model=f"robustkit:{EVIL}", data=f"x/{EVIL}", attacks=(f"pgd{EVIL}",), flags=(FLAG, flag))
    report = replace(report, environment={**report.environment, "device_name": EVIL, "commit": EVIL})
    write_run(Path("r"), report, make_examples(report))
    for command in (["report", "r"], ["compare", "r", "r"], ["report", "r", "--png", "c.png"], ["verify", "r"]):
        run(command)
        out, err = capsys.readouterr()
        assert is_printable(out), command
        assert is_printable(err), command
    page = Path("r/report.html").read_text()
    assert not any(sign in page for sign in FORBIDDEN)
    assert "\\x1b[2J" in page
    assert run(["compare", "r", "r", "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_names_in_an_archive_are_printed_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(f"{EVIL}.jpg"), io.BytesIO())
    data = f"webdataset:{tmp_path}/a.tar"
    assert run(["evaluate", "robustkit:digits-cnn", "--data", data, "--threat", "linf:0.1"]) == 2
    err = capsys.readouterr().err
    assert is_printable(err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+2", "@SUM(1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0"])
def test_no_exported_cell_is_a_formula(text: str) -> None:
    content = to_csv([{"attack": text, "margin": -1.5, "robust": True}]).decode()
    assert list(csv.reader(io.StringIO(content, newline=""))) == [
        ["attack", "margin", "robust"],
        [f"'{printable(text)}", "-1.5", "true"],
    ]
