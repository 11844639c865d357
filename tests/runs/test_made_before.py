"""Run folders that commit 038c8b5 wrote, before files and names moved: they are read, verified and continued.

    robustkit evaluate --limit 6 --suite 'pgd(steps=3),square(queries=20)'
    robustkit craft --surrogate robustkit:digits-cnn --target robustkit:digits-cnn --data digits:test --limit 4 \
        --threat linf:0.2 --attack 'mi-fgsm(steps=2)'
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from robustkit.cli import run

FOLDERS = Path(__file__).parent / "made_before"


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(FOLDERS / request.param, tmp_path / request.param))


@pytest.mark.parametrize("folder", ["evaluate"], indirect=True)
def test_an_evaluation_is_verified_and_continued(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((folder / "report.json").read_text())
    assert run(["verify", str(folder)]) == 0
    assert "1 adversarials checked, all good" in capsys.readouterr().out
    suite = "pgd(steps=3),square(queries=20)"
    assert run(["evaluate", "--limit", "6", "--suite", suite, "--out", str(folder), "--no-html"]) == 0
    after = json.loads((folder / "report.json").read_text())
    assert {name: after[name] for name in ("spec", "verdicts", "cost")} == {
        name: before[name] for name in ("spec", "verdicts", "cost")
    }


@pytest.mark.parametrize("folder", ["evaluate", "craft"], indirect=True)
def test_the_page_of_a_run_is_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder), "--html", str(folder / "page.html")]) == 0
    assert "<html" in (folder / "page.html").read_text()
    assert capsys.readouterr().err == ""
