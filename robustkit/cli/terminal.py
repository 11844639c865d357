"""The terminal for tables and lines; names from files cannot send control sequences or fake output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from robustkit.core.errors import printable


class Terminal(Console):
    """A console that prints texts literally.

    Names of models, files and members of archives may come from other people. Their control characters and line
    breaks are escaped: only line breaks at the ends of a printed text are our own.
    """

    def __init__(self, **options: Any) -> None:
        """Create a rich Console without markup and emoji codes, which names may contain."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text, or a cell of a table, with unprintable characters escaped."""
        inner = text.strip("\n")
        before, _, after = text.partition(inner) if inner else (text, "", "")
        return super().render_str(f"{before}{printable(inner)}{after}", **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Yield segments, also those of rich's own columns, with unprintable characters escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))
