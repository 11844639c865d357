"""A page from its template: one file that needs nothing else.

Each template extends base.html, which has what all pages share, and names the style sheets it needs besides
page.css; parts.html has the pieces that several draw.
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
    """Return the page."""
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
    """Return a text without signs that would show another text than it is; our own drawings as they are."""
    return printable(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value
