"""`report`, `compare` and `export` on the command line: files, output and refusals."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reports import FLAG, make_examples, make_report, write_run

from robustkit.cli import run
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report

SMALL = ["evaluate", "--limit", "24", "--threat", "linf:0.2", "--suite", "pgd(steps=5)", "--out", "r"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def finished(name: str, report: Report | None = None, *, examples: bool = True) -> Path:
    report = report or make_report()
    return write_run(Path(name), report, make_examples(report) if examples else None)


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert run(list(command)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


def test_evaluate_writes_the_page_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--no-html"]) == 0
    assert not Path("r/report.html").exists()
    assert "report.html" not in capsys.readouterr().out
    sealed = {path.name: path.read_bytes() for path in Path("r").iterdir()}
    assert run(SMALL) == 0  # finished before: the page was missing, nothing else changes
    assert "report   r/report.html" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("r").iterdir() if path.name != "report.html"} == sealed
    Path("r/report.html").write_text("mine")
    assert run(SMALL) == 0
    assert Path("r/report.html").read_text() == "mine"
    assert run(["verify", "r"]) == 0
    assert run(["report", "r"]) == 0
    assert Path("r/report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_examples_of_a_run() -> None:
    assert run([*SMALL, "--no-html"]) == 0
    report = run_folder.read_report(Path("r"))
    examples = run_folder.read_examples(Path("r"), report)
    assert examples is not None
    adversarial = run_folder.read_adversarial(Path("r"))
    assert (examples["index"] == adversarial["index"]).all()
    assert examples["distance"].dtype == np.float64
    assert 0 < examples["distance"].max() <= 0.2
    labels = np.array([verdict.label for verdict in report.verdicts])
    assert (examples["prediction"] != labels[examples["index"]]).all()
    shown = examples["shown"].tolist()
    assert len(shown) == len(set(shown)) == min(16, len(examples["index"]))
    rows = [examples["index"].tolist().index(index) for index in shown]
    assert (examples["adversarial"] == adversarial["x"][rows]).all()
    moved = np.abs(examples["adversarial"].astype(np.float64) - examples["clean"]).max((1, 2, 3))
    assert moved == pytest.approx(examples["distance"][rows], rel=1e-12)
    margins = [abs(report.verdicts[index].margin) for index in shown]
    hard = [margin for margin, hard in zip(margins, examples["hard"], strict=True) if hard]
    easy = margins[len(hard) :]
    assert hard == sorted(hard)
    assert easy == sorted(easy, reverse=True)
    assert max(hard) <= min(easy)
    assert report.files["examples.npz"] == run_folder.sha256(Path("r/examples.npz"))


def test_the_page_of_a_run_names_the_command_that_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    from robustkit.reporting.html.command import command

    assert run([*SMALL, "--no-html"]) == 0
    report = run_folder.read_report(Path("r"))
    assert run([*shlex.split(command(report))[1:], "--out", "again"]) == 0
    assert run_folder.read_report(Path("again")).verdicts == report.verdicts
    assert run_folder.read_report(Path("again")).run_id == report.run_id
    assert Path("again/examples.npz").read_bytes() == Path("r/examples.npz").read_bytes()


def test_report_without_flags_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    finished("r", make_report(flags=(FLAG,)))
    assert run(["report", "r"]) == 0
    out = capsys.readouterr().out
    assert "worst case" in out
    assert out.splitlines()[-1] == "report   r/report.html"
    assert run(["report", "r", "--html", "a.html", "--png", "b.png"]) == 0
    assert capsys.readouterr().out == "report   a.html\ncard     b.png\n"
    assert Path("a.html").read_bytes() == Path("r/report.html").read_bytes()
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path().iterdir()) == ["a.html", "b.png", "r"]


def test_views_import_no_torch() -> None:
    finished("r")
    commands = [
        ["report", "r", "--png", "c.png", "--html", "c.html"],
        ["compare", "r", "r"],
        ["export", "r", "--csv", "x"],
    ]
    code = (
        f"import sys; from robustkit.cli import run; codes = [run(words) for words in {commands!r}]\n"
        "heavy = {'torch', 'torchvision', 'timm', 'foolbox', 'pyautoattack', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(max(codes) if not heavy else f'imported {heavy}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_folder_of_an_earlier_version_renders() -> None:
    finished("r", examples=False)
    assert run(["report", "r"]) == 0
    assert run(["export", "r", "--csv", "v.csv"]) == 0


@pytest.mark.parametrize("verb", [["report", "r"], ["export", "r", "--csv", "v.csv"], ["compare", "r", "r"]])
def test_unfinished_runs_are_refused(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(capsys, *verb)
    Path("r").mkdir()
    assert "no run folder: it has no report.json" in refused(capsys, *verb)
    Path("r/spec.json").write_text("{}")
    assert "is not finished" in refused(capsys, *verb)
    Path("r/report.json").write_text("{")
    assert "cannot be read" in refused(capsys, *verb)
    Path("r/report.json").write_text("[]")
    assert "format" in refused(capsys, *verb)
    body = make_report().to_json()
    Path("r/report.json").write_text(json.dumps({**body, "verdicts": body["verdicts"][:-1]}))
    assert "is damaged" in refused(capsys, *verb)
    del body["stages"]
    Path("r/report.json").write_text(json.dumps(body))
    assert "is damaged" in refused(capsys, *verb)


@pytest.mark.parametrize("verb", [["report", "r"], ["export", "r", "--csv", "v.csv"]])
def test_damaged_examples_are_refused(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    place = finished("r")
    whole = (place / "examples.npz").read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:200] + b"\x00" * 40 + whole[240:]):
        (place / "examples.npz").write_bytes(content)
        assert "examples.npz" in refused(capsys, *verb)
    (place / "examples.npz").write_bytes(whole)
    report = replace(make_report(), files={"examples.npz": "0" * 64})
    (place / "report.json").write_text(json.dumps(report.to_json()))
    assert "has changed since the run" in refused(capsys, *verb)


@pytest.mark.parametrize(
    "flags",
    [["report", "r", "--html"], ["report", "r", "--png"], ["export", "r", "--csv"], ["export", "r", "--parquet"]],
)
def test_files_that_cannot_be_written_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    finished("r")
    Path("folder").mkdir()
    assert "cannot write nowhere/f: No such file or directory" in refused(capsys, *flags, "nowhere/f")
    assert "cannot write folder: it is a folder" in refused(capsys, *flags, "folder")
    Path("file").write_text("x")
    assert "cannot write file/f" in refused(capsys, *flags, "file/f")
    assert sorted(path.name for path in Path().iterdir()) == ["file", "folder", "r"]


def test_export_needs_exactly_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    finished("r")
    assert "use one of them" in refused(capsys, "export", "r", "--csv", "a", "--parquet", "b")
    assert "--csv FILE or --parquet FILE" in refused(capsys, "export", "r")
    assert run(["export", "r", "--csv", "v.csv"]) == 0
    assert capsys.readouterr().out == "40 rows   v.csv\n"
    with Path("v.csv").open(newline="") as file:
        assert sum(row["robust"] == "true" for row in csv.DictReader(file)) == 24


def test_parquet_without_pyarrow_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished("r")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(capsys, "export", "r", "--parquet", "v.parquet")
    assert not os.path.exists("v.parquet")


def test_compare_lists_the_images_that_only_one_run_lost(capsys: pytest.CaptureFixture[str]) -> None:
    finished("a", make_report(60, 30, wrong=4))
    finished("b", make_report(60, 3, wrong=4, model="robustkit:mnist-cnn"))
    assert run(["compare", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert "A   43.3 %  (31.6 – 55.9)   robustkit:digits-cnn   a" in out
    assert "B   88.3 %  (77.8 – 94.2)   robustkit:mnist-cnn   b" in out
    assert "the same 60 images, linf:8/255" in out
    assert "A − B = −45.0 points, 95 % interval " in out
    assert "Newcombe" in out
    assert "McNemar      exact two-sided p = 1.49e-08" in out
    assert "not robust in A only   27 images: 7, 8, 9, " in out
    assert " and 7 more" in out
    assert "not robust in B only   no image" in out
    assert "warning" not in out
    assert run(["compare", "b", "a", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["difference"]["value"] == pytest.approx(0.45)
    assert body["difference"]["low"] < 0.45 < body["difference"]["high"]
    assert body["mcnemar_p"] == pytest.approx(2**-26)
    assert (body["only_b_loses"]["count"], len(body["only_b_loses"]["first"])) == (27, 20)
    assert (body["format"], body["n"], body["warnings"]) == (1, 60, [])


def test_compare_refuses_runs_on_different_data(capsys: pytest.CaptureFixture[str]) -> None:
    finished("a")
    finished("b", make_report(30, fingerprint="ee" * 32, data="/d/other.npz"))
    assert "different data (40 images of digits:test and 30 images of other.npz)" in refused(
        capsys, "compare", "a", "b"
    )
    finished("c", make_report(threat="l2:0.5"))
    assert run(["compare", "a", "c"]) == 0
    assert "warning      the threats differ: linf:8/255 for A, l2:0.5 for B" in capsys.readouterr().out
    finished("d", make_report(attacks=("fgsm",)))
    assert run(["compare", "a", "d"]) == 0
    assert "warning      the attacks differ" in capsys.readouterr().out
