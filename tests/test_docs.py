"""Docs: links and paths exist, glossary terms have one meaning, the version is the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import robustkit

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
TOPS = ("attacks/", "defenses/", "docs/", "examples/", "robustkit/", "scripts/", "tests/", ".github/")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_links_lead_to_files_and_headings() -> None:
    lost = []
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                lost.append(f"{page.name}: {link}")
    assert lost == []


def test_paths_in_the_docs_exist() -> None:
    lost = []
    for page in PAGES:
        for path in re.findall(r"`([\w./-]+)`", page.read_text()):
            if path.startswith(TOPS) and not (ROOT / path).exists() and not re.search(r"NAME|VERB", path):
                lost.append(f"{page.name}: {path}")
    assert lost == []


def test_a_term_is_defined_once() -> None:
    rows = re.findall(r"^\| (.+?) \| .+ \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    terms = [term for row in rows if row not in ("term", "---") for term in re.split(r", ", row)]
    assert len(terms) > 60
    assert len(terms) == len(set(terms))


def test_the_version_is_the_same_everywhere() -> None:
    version = robustkit.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_page_or_workflow_installs_the_other_robustkit() -> None:
    """On PyPI the name robustkit belongs to another project; ours is adversarial-robustkit."""
    files = [*PAGES, ROOT / "noxfile.py", *(ROOT / ".github").rglob("*.yml")]
    assert [file.name for file in files if re.search(r"install\b[^\n`]*[ \"']robustkit\b", file.read_text())] == []


def test_the_attack_of_the_readme_is_its_file() -> None:
    text = (ROOT / "README.md").read_text()
    name, excerpt = re.findall(r"```text\n(attacks/\S+)\n\n(.*?)```", text, re.DOTALL)[0]
    lines = [line[4:] for line in excerpt.splitlines() if line.strip()]
    assert len(lines) > 5
    assert [line for line in lines if line not in (ROOT / name).read_text().splitlines()] == []
