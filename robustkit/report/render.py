"""A page from its template and style sheets: one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def render(
    template: str,
    facts: Mapping[str, Any],
    styles: Sequence[str] = (),
    filters: Mapping[str, Callable[..., Any]] | None = None,
) -> str:
    """Return the page; `styles` come behind page.css, which all pages have."""
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters or {})
    here = files("robustkit.report")
    css = "".join(here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", *styles))
    text = here.joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(css=Markup(css), **facts).lstrip()
