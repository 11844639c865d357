"""The page of scripts/gpu_acceptance.py: one self-contained HTML file with a table for each section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:.5rem 0}"
    "td,th{border:1px solid #aaa;padding:.2rem .6rem;text-align:left}"
    ".error{white-space:pre-wrap;border-left:4px solid #b00;padding-left:.6rem}"
)


def page(record: Mapping[str, Any]) -> str:
    """Return the page of a record, which has the keys that `main` writes to acceptance.json."""
    around, sections = record["environment"], record["sections"]
    failed = [section["name"] for section in sections if section["error"]]
    verdict = f"Failed: {', '.join(failed)}." if failed else f"All {len(sections)} sections ran."
    quick = " Tiny sizes: the figures say nothing about the GPU." if record["quick"] else ""
    facts = [{"what": name, "value": value} for name, value in _flat(around).items()]
    parts = [_section(section) for section in sections]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>robustkit on a GPU</title>'
        f"<style>{STYLE}</style></head><body><h1>robustkit on {escape(str(around['device_name']))}</h1>"
        f"<p>{escape(record['date'])}. {escape(verdict)}{quick}</p>{''.join(parts)}"
        f"<h2>Environment</h2>{table(facts)}</body></html>\n"
    )


def _section(section: Mapping[str, Any]) -> str:
    error = f'<p class="error">{escape(section["error"])}</p>' if section["error"] else ""
    return (
        f"<h2>{escape(section['name'])}</h2><p>{escape(section['about'])} "
        f"{section['seconds']:.1f} s of at most {section['budget']} s.</p>{error}{table(section['rows'])}"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table whose columns are all their keys, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_text(row.get(name)))}</td>' for name in columns)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>" if rows else ""


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with names such as `versions.torch`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return found
