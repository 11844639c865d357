"""A run folder from another user: no file outside it is written, whatever links it holds."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reports import make_examples, make_report, write_run

from robustkit.cli import output, run
from robustkit.core.errors import RunError, UsageError
from robustkit.posterior import UnfinishedPosterior
from robustkit.runs.ledger import Ledger
from robustkit.runs.opening import OWN
from robustkit.training.metrics import Metrics

EVALUATE = ["evaluate", "--limit", "8", "--suite", "fgsm", "--threat", "linf:0.2", "--out", "r"]
TRAIN = ["train", "standard", "--limit", "16", "--epochs", "1", "--test", "digits:test", "--out", "r"]
HOOKS = [*(f".{name}.part" for name in OWN), *(f"{name}.part" for name in OWN)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("victim").write_text("mine")


def victim_is_unchanged() -> bool:
    return Path("victim").read_text() == "mine" and not Path("victim").is_symlink()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_report_writes_no_file_but_its_own(link: Callable[..., None]) -> None:
    report = make_report()
    write_run(Path("r"), report, make_examples(report))
    for name in [*HOOKS, "report.html", ".lock"]:
        if not Path("r", name).exists():
            link(Path("victim").absolute(), Path("r", name))
    assert run(["report", "r"]) == 0
    assert run(["report", "r", "--html", "r/spec.json.html", "--png", "r/card.png"]) == 0
    assert run(["export", "r", "--csv", "r/verdicts.csv"]) == 0
    assert victim_is_unchanged()
    assert Path("r/report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("verb", [EVALUATE, TRAIN])
def test_a_new_run_in_a_folder_with_links_writes_no_file_outside(verb: list[str]) -> None:
    Path("r").mkdir()
    for name in (".lock", *HOOKS):
        if name.startswith("."):
            Path("r", name).symlink_to(Path("victim").absolute())
    assert run(verb) == 0
    assert victim_is_unchanged()


@pytest.mark.parametrize("ending", ["", "-wal", "-journal", "-shm"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_ledger_that_is_a_link_is_refused(ending: str, link: Callable[..., None]) -> None:
    with Ledger.open(Path("l.sqlite"), "run"):
        pass
    if not ending:
        Path("l.sqlite").rename("victim")
    before = Path("victim").read_bytes()
    link(Path("victim").absolute(), f"l.sqlite{ending}")
    with pytest.raises(UsageError, match=f"l.sqlite{ending} is a (hard )?link"):
        Ledger.open(Path("l.sqlite"), "run")
    with pytest.raises(UsageError, match="link"):
        Ledger.is_unattacked(Path("l.sqlite"))
    assert Path("victim").read_bytes() == before


def test_samples_are_not_written_into_a_linked_folder() -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/0000.safetensors").write_text("mine")
    Path("samples").symlink_to(Path("elsewhere").absolute())
    with pytest.raises(UsageError, match="samples is a link"):
        UnfinishedPosterior(Path()).add({"w": torch.ones(2)})
    with pytest.raises(UsageError, match="samples is a link"):
        UnfinishedPosterior(Path()).keep(0)
    assert [one.read_text() for one in Path("elsewhere").iterdir()] == ["mine"]


def test_metrics_that_are_a_link_are_replaced_and_not_followed() -> None:
    Path("metrics.jsonl").symlink_to(Path("victim").absolute())
    metrics = Metrics(Path(), [{"epoch": 1}])
    assert victim_is_unchanged()
    Path("metrics.jsonl").unlink()
    Path("metrics.jsonl").symlink_to(Path("victim").absolute())
    with pytest.raises(UsageError, match="is a link"):
        metrics.add({"epoch": 2})
    assert victim_is_unchanged()


def test_rows_of_a_matrix_are_not_written_through_links(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["matrix", "--models", "robustkit:digits-cnn,robustkit:digits-cnn?defense=bit-depth:4"]
    command += ["--data", "digits:test", "--limit", "6", "--attack", "fgsm", "--threat", "linf:0.2", "--out"]
    assert run([*command, "whole"]) == 0
    Path("elsewhere").mkdir()
    Path("r").mkdir()
    for row in Path("whole").glob("craft-*"):
        Path("r", row.name).symlink_to(Path("elsewhere").absolute())
    capsys.readouterr()
    assert run([*command, "r"]) == 2
    assert "is a link" in capsys.readouterr().err
    assert not list(Path("elsewhere").iterdir())


def test_a_linked_out_folder_is_allowed() -> None:
    Path("elsewhere").mkdir()
    Path("r").symlink_to(Path("elsewhere").absolute())
    assert run(EVALUATE) == 0
    assert Path("elsewhere/report.json").is_file()


def test_an_unwritable_page_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        error = PermissionError(errno.EROFS, os.strerror(errno.EROFS))
        raise RunError("cannot write") from error

    report = make_report()
    write_run(Path("r"), report, make_examples(report))
    monkeypatch.setattr(output, "write", refuse)
    assert run(["report", "r"]) == 0
    out, err = capsys.readouterr()
    assert "worst case" in out
    assert "report   " not in out
    assert err.startswith("cannot write r/report.html: Read-only file system; ")
    assert err.endswith("robustkit report r --html FILE\n")
