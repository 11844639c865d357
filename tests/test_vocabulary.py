"""Retired words do not come back: identifiers of the code, and words of docs, README and pages.

docs/glossary.md has the words to use. A word is matched as a whole, in lower and upper case as it is listed here.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Retired everywhere: in code (names, comments, docstrings, messages) and in prose.
EVERYWHERE = """
Apart BatchWise Bench Deck Dice Doubts EASY FEW Flight Foreman Hire Jury Lane MOST Meter NEAR Outlook PATIENCE
Panel Passengers Peers Pilot Redrawn Rung SOME SURE Scout Scribe Sitting Tally USUAL USUAL_THREAT Way Workforce
Workshop abroad boarded bureau by_others company deepen deepened dice flights flown fly flying foreman gauges
hiring honest jury landed landing last_resort lattice lookout mending mends meter nobody noughts passengers
pilot props/img redraw redrawn rungs scout scribe second_opinion stand_ins stood strays survives_everything
survivor swapped tally unlikeness usual_model usual_threat withstand withstands withstood workforce
workshop
""".split()
# Retired as names of functions, classes, methods and attributes only.
NAMES = [
    "As",
    "Hand",
    "Question",
    "alive",
    "deal",
    "enters",
    "fell",
    "look",
    "maker",
    "said",
    "settle",
    "surround",
]
# Retired in prose: docs, README and the other pages of the repository, templates of reports.
IN_PROSE = """
aboard anew anybody behind bench dear deck dice fell flight foreman honest lane nobody outlook parked pilot rung
said somebody stand stands stood survivor survivors told whoever withstands withstood
""".split()
# Words that remain in these files, because users write them or a stream of random numbers is seeded by them.
ALLOWED: dict[str, set[str]] = {}


def code() -> list[Path]:
    folders = [ROOT / name for name in ("attacks", "defenses", "examples", "scripts")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    files += [file for file in (ROOT / "robustkit").rglob("*.py") if not {"attacks", "defenses"} & set(file.parts)]
    return files


def prose() -> list[Path]:
    pages = [file for file in ROOT.glob("*.md") if file.name != "CHANGELOG.md"]  # which says what was renamed
    return [*pages, *(ROOT / "docs").glob("*.md"), *(ROOT / "robustkit").rglob("*.html")]


def found(files: list[Path], words: list[str], before: str = r"(?<![\w-])") -> list[str]:
    """Return file, line and word of each retired word in these files."""
    retired = re.compile(rf"{before}({'|'.join(map(re.escape, words))})(?![\w-])")
    hits = []
    for file in files:
        name, text = file.relative_to(ROOT).as_posix(), file.read_text()
        for match in retired.finditer(text):
            if match[1] not in ALLOWED.get(name, ()):
                hits.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[1]}")
    return hits


def test_retired_words_are_not_in_code() -> None:
    assert found(code(), EVERYWHERE) == []
    assert found(code(), NAMES, r"(?:\bdef |\bclass |\.)") == []


def test_retired_words_are_not_in_prose() -> None:
    pages = prose()
    assert len(pages) > 20
    assert found(pages, EVERYWHERE + IN_PROSE) == []
