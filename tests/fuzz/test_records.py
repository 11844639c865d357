"""Changed records of runs are refused in one sentence or read as the same values."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changes import changed, damaged
from hypothesis import given
from outcome import fuzzed, outcome

import robustkit
from robustkit.cli import run
from robustkit.core.errors import UsageError
from robustkit.core.schema import parse
from robustkit.runs.corruption_record import Corruptions
from robustkit.runs.craft_record import Craft, Matrix
from robustkit.runs.diversity_record import Diversity
from robustkit.runs.evaluation_record import Report
from robustkit.runs.training_record import Trained

pytestmark = pytest.mark.slow

NET = "robustkit:digits-cnn"
DATA = ("--data", "digits:test", "--limit", "4")
EVALUATE = ("evaluate", *DATA, "--suite", "pgd(steps=2)", "--no-html", "--out", "e")
CRAFT = ("craft", *DATA, "--attack", "fgsm", "--target", f"{NET}?defense=bit-depth:4", "--out", "c")
WEIGHTS = Path(robustkit.__file__).parent / "weights" / "digits-cnn.safetensors"
START = ("--arch", f"{NET}@{WEIGHTS}", "--lr", "0.001", "--limit", "64", "--epochs", "1", "--members", "2")
TRAIN = ("train", "deep-ensemble", *START, "--out", "t")
RUNS = (
    EVALUATE,
    CRAFT,
    ("matrix", "--models", NET, "--models", f"{NET}?mean=0.1&std=1", "--attack", "fgsm", *DATA, "--out", "m"),
    TRAIN,
    ("corrupt", *DATA, "--corruptions", "fog", "--severities", "2", "--out", "k"),
    ("diversity", "t/", "--data", "digits:test", "--limit", "40", "--steps", "2", "--restarts", "1", "--out", "d"),
)
KINDS: dict[str, Callable[[Any], Any]] = {
    "e/report.json": Report.from_json,
    "c/transfer.json": Craft.from_json,
    "m/matrix.json": Matrix.from_json,
    "d/diversity.json": Diversity.from_json,
    "k/corruptions.json": Corruptions.from_json,
    "t/model.json": Trained.from_json,
}
# The commands that read each file; a run that is to go on has lost what says that it is finished.
READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "e/report.json": (("report", "e"), ("verify", "e"), ("export", "e", "--csv", "v.csv"), ("compare", "e", "e")),
    "e/spec.json": (("verify", "e"), EVALUATE),
    "e/ledger.sqlite": (("verify", "e"), EVALUATE),
    "e/adversarial.npz": (("verify", "e"),),
    "e/examples.npz": (("report", "e"),),
    "c/transfer.json": (("report", "c"), ("transfer", "c"), CRAFT),
    "c/spec.json": (("transfer", "c"), CRAFT),
    "c/ledger.sqlite": (CRAFT,),
    "m/matrix.json": (("report", "m"),),
    "d/diversity.json": (("report", "d"),),
    "k/corruptions.json": (("report", "k"),),
    "t/model.json": (("report", "t"), ("evaluate", "t/", *DATA, "--suite", "fgsm", "--out", "x")),
    "t/metrics.jsonl": (("report", "t"),),
    "t/spec.json": (("report", "t"),),
    "t/model.safetensors": (("evaluate", "t/", *DATA, "--suite", "fgsm", "--out", "x"),),
}
FINISHED = {
    "e/ledger.sqlite": "e/report.json",
    "c/ledger.sqlite": "c/transfer.json",
    "t/metrics.jsonl": "t/model.json",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in RUNS:
            assert run(list(command)) == 0
    return folder


def says(body: Any, again: Any) -> bool:
    """Whether a record says what its file does, but for what has a default, and keys that no version wrote yet."""
    if isinstance(body, dict) and isinstance(again, dict):
        return all(says(body[key], again[key]) for key in body.keys() & again.keys())
    if isinstance(body, list) and isinstance(again, list):
        return len(body) == len(again) and all(map(says, body, again))
    return bool(body == again)


@pytest.mark.parametrize("name", KINDS)
def test_accepted_records_have_the_same_values(name: str, runs: Path) -> None:
    text = (runs / name).read_text()
    assert KINDS[name](json.loads(text)).to_json() == json.loads(text)

    @fuzzed
    @given(changed(text))
    def try_out(text: str) -> None:
        with contextlib.suppress(UsageError):
            body = parse(text, name)
            assert says(body, KINDS[name](body).to_json()), text

    try_out()


@pytest.mark.parametrize("name", READERS)
def test_verbs_that_read_changed_records_end_in_one_sentence(name: str, runs: Path, tmp_path: Path) -> None:
    content = (runs / name).read_bytes()
    changes = damaged(content)
    if name.endswith((".json", ".jsonl")):
        changes = changed(content.decode()).map(lambda text: text.encode(errors="surrogatepass"))

    @fuzzed
    @given(changes)
    def try_out(content: bytes) -> None:
        for command in READERS[name]:
            work = tmp_path / "work"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(runs, work)
            (work / name).write_bytes(content)
            if name in FINISHED:
                (work / FINISHED[name]).unlink()
            outcome(command, work)

    try_out()
