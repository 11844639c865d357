"""Files of a received run with matching hashes: none runs forever or fills the memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import make_examples, make_report, write_run

from robustkit.cli import run
from robustkit.core.errors import UsageError
from robustkit.runs import run_folder
from robustkit.runs.ledger import Ledger

ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT"
TABLES = {
    "view": (
        "DROP TABLE chunks",
        f"CREATE VIEW chunks AS {ENDLESS} n stage, n chunk, 1 forwards, 1 backwards, 1 seconds, '[]' flags FROM t",
    ),
    "trigger": ("CREATE TRIGGER t AFTER INSERT ON chunks BEGIN DELETE FROM verdicts; END",),
    "column": ("ALTER TABLE meta ADD COLUMN big GENERATED ALWAYS AS (zeroblob(1000000000)) VIRTUAL",),
    "check": ("CREATE TABLE more (n CHECK (length(hex(zeroblob(400000000))) > 0))",),
    "index": ("CREATE INDEX more ON chunks (hex(zeroblob(400000000)))",),
    "virtual": ("CREATE VIRTUAL TABLE more USING fts5(text)",),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_ledger_with_other_tables_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path, "run") as ledger:
        ledger.seal()
    with closing(sqlite3.connect(path)) as db:
        for statement in TABLES[kind]:
            db.execute(statement)
        db.commit()
    for use in (
        lambda: Ledger.open(path, "run"),
        lambda: Ledger.read(path, "run"),
        lambda: Ledger.is_unattacked(path),
    ):
        with pytest.raises(UsageError, match=r"ledger.sqlite is damaged: its '\w+' is not that of a ledger"):
            use()


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "long": lambda arrays: arrays.update(index=np.arange(9**5)),
    "of texts": lambda arrays: arrays.update(prediction=np.array(["a"] * len(arrays["index"]))),
    "of objects": lambda arrays: arrays.update(classes=np.array([{}], object)),
    "unlike": lambda arrays: arrays.update(clean=arrays["clean"][:, :, :5]),
    "flat": lambda arrays: arrays.update(adversarial=arrays["adversarial"].reshape(-1)),
    "of no shape": lambda arrays: arrays.update(shape=np.arange(4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_examples_are_refused(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report()
    arrays = make_examples(report)
    path = write_run(tmp_path / "r", report, arrays)
    CHANGES[change](arrays)
    np.savez(path / run_folder.EXAMPLES, **arrays)
    for verb in (["report", str(path)], ["export", str(path), "--csv", str(tmp_path / "v.csv")]):
        assert run(verb) == 2
        assert "examples.npz" in capsys.readouterr().err


def test_arrays_of_a_run_are_not_compressed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report()
    path = write_run(tmp_path / "r", report, make_examples(report))
    np.savez_compressed(path / run_folder.EXAMPLES, **make_examples(report))
    assert run(["report", str(path)]) == 2
    assert "examples.npz cannot be read: it is compressed, which no run's is" in capsys.readouterr().err
    np.savez_compressed(path / run_folder.ADVERSARIAL, index=[0], x=np.zeros((1, 1, 8, 8), np.float32), y=[0])
    with pytest.raises(UsageError, match="is compressed"):
        run_folder.read_adversarial(path)
    np.savez(path / run_folder.ADVERSARIAL, index=[0], x=np.zeros((2, 1, 8, 8), np.float32), y=[0])
    with pytest.raises(UsageError, match=r"its 'x' is float32 of shape \(2, 1, 8, 8\)"):
        run_folder.read_adversarial(path)
