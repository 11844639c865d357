"""Model strings: `ARCH[@WEIGHTS][?field=value&...]`, read and written back. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote

from robustkit.errors import UsageError

ZOO, TIMM, TORCHVISION = "robustkit", "timm", "torchvision"
FILE, MODULE, FOLDER = "file", "module", "folder"

_QUERY = re.compile(r"\?(?=[A-Za-z_]\w*=)")


@dataclass(frozen=True)
class ModelString:
    """A model string in its parts.

    Attributes:
        arch: What builds the net: `robustkit:NAME`, `timm:NAME`, `torchvision:NAME`, `module:factory`,
            `file.py:factory`, or a folder that train wrote.
        weights: Path of the weights file, as written; None where the string names none.
        options: The query's fields, percent-decoded, in the order written.
    """

    arch: str
    weights: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> ModelString:
        """Return the parts of a model string.

        The query begins at the last `?` that a `field=` follows. The weights begin at the first `@` after the
        first colon, so that a folder in front of `net.py:build` may contain one.

        Raises:
            UsageError: The text is empty, or a part of it is, or a field stands in it twice.
        """
        text = text.strip()
        marks = list(_QUERY.finditer(text))
        head, query = (text[: marks[-1].start()], text[marks[-1].end() :]) if marks else (text, "")
        source, colon, rest = head.partition(":")
        name, at, weights = rest.partition("@")
        arch = source + colon + name
        if not source or (colon and not name):
            raise UsageError(f"model {text!r} names no net: write for example robustkit:digits-cnn.")
        if at and not weights:
            raise UsageError(
                f"model {text!r} names no weights file after '@': write {arch}@FILE, or leave '@' out."
            )
        return cls(arch, weights or None, _fields(text, query))

    def __str__(self) -> str:
        weights = "" if self.weights is None else f"@{self.weights}"
        query = "&".join(f"{name}={quote(value, safe=',:/+')}" for name, value in self.options.items())
        return f"{self.arch}{weights}{'?' if query else ''}{query}"

    @property
    def kind(self) -> str:
        """Which of the six kinds of net `arch` names: one of the constants of this module."""
        source, colon, _ = self.arch.rpartition(":")
        if not colon:
            return FOLDER
        if source in (ZOO, TIMM, TORCHVISION):
            return source
        return FILE if source.endswith(".py") else MODULE

    @property
    def source(self) -> str:
        """What stands before the colon: the library, the module, or the path of the file."""
        return self.arch.rpartition(":")[0]

    @property
    def name(self) -> str:
        """What stands after the colon: the net's name, or the factory's."""
        return self.arch.rpartition(":")[2]


def _fields(text: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    # A plus is itself here, not a form's blank.
    for name, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):
        if not name.isidentifier():
            raise UsageError(f"model {text!r} has a field named {name!r}: write fields as NAME=VALUE.")
        if name in options:
            raise UsageError(f"model {text!r} has the field {name!r} twice: write it once.")
        options[name] = value
    return options
