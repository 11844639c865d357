"""Data strings, `NAME[:REST][?field=value&...]`, read and written back. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.data.catalog import CATALOG

FIELDS = ("classes", "layout", "corruption")
_QUERY = re.compile(r"\?(?=[A-Za-z_]\w*=)")


@dataclass(frozen=True)
class DataString:
    """A data string in its parts.

    Attributes:
        head: all before the query: `digits:test`, `folder:val`, `test.npz`.
        options: the query's fields, percent-decoded.
    """

    head: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> DataString:
        """Return the parts of a data string; the query begins at the last `?` that a `field=` follows.

        Raises:
            UsageError: a field is unknown, empty, or there twice.
        """
        marks = list(_QUERY.finditer(text))
        if not marks:
            return cls(text)
        options: dict[str, str] = {}
        for name, value in parse_qsl(text[marks[-1].end() :].replace("+", "%2B"), keep_blank_values=True):
            if name not in FIELDS:
                raise did_you_mean("field of data strings", name, FIELDS)
            if name in options or not value:
                what = "twice" if name in options else "without a value"
                raise UsageError(f"data {text!r} has the field {name!r} {what}; write {name}=VALUE once.")
            options[name] = value
        return cls(text[: marks[-1].start()], options)

    @property
    def name(self) -> str:
        """The part before the colon: `digits`, `folder`; of a plain path the whole path."""
        return self.head.partition(":")[0]

    @property
    def rest(self) -> str | None:
        """The part after the colon, a split or a path; None without a colon."""
        return self.head.partition(":")[2] if ":" in self.head else None

    @property
    def is_path(self) -> bool:
        """Whether the part after the colon is a path."""
        return self.name in CATALOG and CATALOG[self.name].is_path

    @property
    def is_pictures(self) -> bool:
        """Whether these are image files."""
        listed = self.head.lower().endswith((".csv", ".jsonl"))
        return listed or (self.name in CATALOG and CATALOG[self.name].is_pictures)

    @property
    def query(self) -> str:
        """The query with its `?`; empty if there is none."""
        fields = "&".join(f"{name}={quote(value, safe=',:/+@ ')}" for name, value in self.options.items())
        return f"?{fields}" if fields else ""
