"""Render a page from its template into one file without external resources.

Each template extends base.html, the frame of all pages, and includes the style sheets it needs besides page.css;
parts.html has macros that several templates use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustkit.core.errors import printable


def render(
    template: str, facts: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None
) -> str:
    """Return the page of a template of this folder.

    Args:
        template: file name, such as `page.html`.
        facts: the template's variables; a missing one raises.
        filters: functions that the template uses as filters.
    """
    environment = Environment(
        loader=PackageLoader("robustkit", "reporting/html"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(facts)


def _printable(value: Any) -> Any:
    """Return text without control and direction characters, which could make it look different; keep our SVG."""
    return printable(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value
