"""Retired words do not come back: identifiers of the code, and words of docs, README and pages.

docs/glossary.md has the words to use. A word is matched as a whole, in lower and upper case as it is listed here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Retired everywhere: in code (names, comments, docstrings, messages) and in prose.
EVERYWHERE = """
Foreman foreman Scribe scribe Doubts Outlook Scout scout gauges by_others Panel Sitting Peers Apart abroad
BatchWise Passengers passengers Workshop Workforce workforce Rung Redrawn redraw deepen PATIENCE lattice hiring
bureau company lookout Hire props/img
""".split()
# Retired in prose, where the word in parentheses is used: docs, README and the other pages of the repository,
# templates of reports.
IN_PROSE = """
props/img
""".split()
# Distributed runs and their worker processes have an issue of their own.
NOT_YET = (
    "robustkit/distributed/",
    "robustkit/engine/evaluation/tasks.py",
    "robustkit/engine/evaluation/scheduler.py",
    "robustkit/engine/evaluation/evaluate_worker.py",
    "robustkit/crafting/scheduler.py",
    "robustkit/crafting/craft_worker.py",
)
# Words that remain in these files, because users write them or a stream of random numbers is seeded by them.
ALLOWED: dict[str, set[str]] = {}


def code() -> list[Path]:
    folders = [ROOT / name for name in ("attacks", "defenses", "examples", "scripts")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    files += [file for file in (ROOT / "robustkit").rglob("*.py") if not {"attacks", "defenses"} & set(file.parts)]
    return [file for file in files if not file.relative_to(ROOT).as_posix().startswith(NOT_YET)]


def prose() -> list[Path]:
    pages = [file for file in ROOT.glob("*.md") if file.name != "CHANGELOG.md"]  # which says what was renamed
    return [*pages, *(ROOT / "docs").glob("*.md"), *(ROOT / "robustkit").rglob("*.html")]


def found(files: list[Path], words: list[str]) -> list[str]:
    """Return file, line and word of each retired word in these files."""
    retired = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, words))})(?![\w-])")
    hits = []
    for file in files:
        name, text = file.relative_to(ROOT).as_posix(), file.read_text()
        for match in retired.finditer(text):
            if match[0] not in ALLOWED.get(name, ()):
                hits.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    return hits


@pytest.mark.parametrize(
    ("files", "words"), [(code(), EVERYWHERE), (prose(), EVERYWHERE + IN_PROSE)], ids=["code", "prose"]
)
def test_retired_words_are_gone(files: list[Path], words: list[str]) -> None:
    assert len(files) > 10
    assert found(files, words) == []
