"""`robustkit evaluate --models`: the table, the files, exit codes and error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustkit.cli import run


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    path = tmp_path / "zoo.txt"
    path.write_text("robustkit:digits-cnn\ncoarse = robustkit:digits-cnn?defense=bit-depth:3\n")
    return path


def command(zoo: Path, *more: str) -> list[str]:
    arguments = ["evaluate", "--models", str(zoo), "--data", "digits:test", "--limit", "6", "--suite", "fgsm"]
    return [*arguments, "--out", str(zoo.parent / "runs"), *more]


def test_a_list_of_models_resumes_and_may_grow(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(zoo)) == 0
    out, err = capsys.readouterr()
    # The coarse one hides its gradient: whatever its number, it is ranked separately.
    assert out.index("digits-cnn ") < out.index("ranked separately") < out.index("coarse")
    assert "next     robustkit compare" in out
    with zoo.open("a") as file:
        file.write("gone = robustkit:digits-cnn@gone.safetensors\n")
    assert run(command(zoo, "--json", "--fail-under", "0.99")) == 2
    out, err = capsys.readouterr()
    assert err.count("was finished before") == 2
    assert "digits-cnn: robust accuracy" in err
    body = json.loads(out)
    assert [row["name"] for row in body["rows"]] == ["digits-cnn", "coarse"]
    assert "there is no weights file" in body["failed"][0]["reason"]
    folder = zoo.parent / "runs"
    gate = body.pop("gate")
    assert json.loads((folder / "leaderboard.json").read_text()) == body
    assert not gate["passed"]
    assert gate["reasons"][0].startswith("digits-cnn: robust accuracy")
    for page in ("leaderboard.html", *(f"{row['folder']}/report.html" for row in body["rows"])):
        assert "</html>" in (folder / page).read_text()
    zoo.write_text("robustkit:digits-cnn\n")
    assert run(command(zoo, "--fail-under", "0.99")) == 1
    assert run(command(zoo, "--fail-on-flag", "zero-gradient")) == 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["robustkit:digits-cnn"], "both a model, robustkit:digits-cnn, and a list of models; put the model into"),
        (["--data", "absent.npz"], "absent.npz"),
        (["--suite", "fgms"], "Did you mean 'fgsm'?"),
        (["--threat", "linf"], "write NORM:EPS"),
        (
            ["--time-limit", "soon"],
            "--time-limit must be a number of seconds, or a time such as 90s, 10m or 2h, got",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    zoo: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(zoo, *more)) == 2
    assert sentence in capsys.readouterr().err


def test_a_list_without_data_is_refused(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--models", str(zoo)]) == 2
    assert capsys.readouterr().err.startswith("error: no data for the list of models; use --data")
