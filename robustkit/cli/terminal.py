"""The terminal as our tables and lines are printed on it: names that others chose cannot command or imitate it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from robustkit.core.errors import printable


class Terminal(Console):
    """A console that shows every text as it is written.

    Names of models, files and members of archives come from others. Their control characters are escaped, and
    their line breaks too: of a text that is printed, only those at its ends are our own.
    """

    def __init__(self, **options: Any) -> None:
        """Take the options of rich's Console, without markup and emoji codes, which names may contain."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text, or a cell of a table, with what is not printable escaped."""
        inner = text.strip("\n")
        before, _, after = text.partition(inner) if inner else (text, "", "")
        return super().render_str(f"{before}{printable(inner)}{after}", **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Yield segments, those of rich's own columns too, with what is not printable escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))
