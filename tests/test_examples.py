"""Every program in examples/ runs and prints a result."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
# They take more than two seconds of processor time.
SLOW = {
    "adversarial_training",
    "compare_models",
    "masked_gradient",
    "model_behind_endpoint",
    "robustness_curve",
    "transfer_attack",
}


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if file.stem in SLOW else []) for file in EXAMPLES],
)
def test_an_example_runs(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_table_lists_every_example() -> None:
    table = (Path(__file__).parents[1] / "examples" / "README.md").read_text()
    assert len(EXAMPLES) == 11
    assert [file.name for file in EXAMPLES if f"`{file.name}`" not in table] == []
