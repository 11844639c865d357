"""Model strings: `ARCH[@WEIGHTS][?field=value&...]`, read and written back. Imports no torch.

Several of them are one model as `ensemble:[A;B;C]?combine=logits`: each keeps its weights and its query inside the
brackets; a member may be an ensemble itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote

from robustkit.core.errors import UsageError
from robustkit.models.sources.source import is_prefix, prefix_for_file, takes_files

# What a model string names: a net of a source (`timm:NAME`), Python code, a folder of a training, an ensemble.
SOURCE, FILE, MODULE, FOLDER, ENSEMBLE = "source", "file", "module", "folder", "ensemble"
UNKNOWN = "unknown"
# Longer strings, larger ensembles and deeper brackets are refused as mistakes.
MAX_LENGTH, MAX_MEMBERS, MAX_DEPTH = 100_000, 1_000, 8

_QUERY = re.compile(r"\?(?=[A-Za-z_]\w*=)")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".index.json")
_OPEN = f"{ENSEMBLE}:["
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class ModelString:
    """A model string in its parts.

    Attributes:
        arch: What builds the net: `PREFIX:NAME` of a model source, a file such as `net.pt2`, `module:factory`,
            `file.py:factory`, a folder that train wrote, or `ensemble:[...]`.
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
        first colon, so that the folder of `net.py:build` may contain one.

        Raises:
            UsageError: The text is empty or too long, or a part of it is, or it has a field twice.
        """
        text = text.strip()
        if len(text) > MAX_LENGTH:
            raise UsageError(f"a model string of {len(text):,} characters is too long: at most {MAX_LENGTH:,}.")
        if "\0" in text:
            raise UsageError(f"model {text[:60]!r} has a NUL character, which no name or path has: leave it out.")
        if text.startswith(f"{ENSEMBLE}:"):
            return cls._joined(text)
        marks = list(_QUERY.finditer(text))
        head, query = (text[: marks[-1].start()], text[marks[-1].end() :]) if marks else (text, "")
        source, colon, rest = head.partition(":")
        name, separator, weights = (rest, "", "") if takes_files(source) else rest.partition("@")
        arch = source + colon + name
        if not source or (colon and not name):
            example = f"{source}:NAME" if source else "for example robustkit:digits-cnn"
            raise UsageError(
                f"model {text!r} names no net: write {example}; `robustkit list models` has the names."
            )
        if separator and not weights:
            raise UsageError(
                f"model {text!r} names no weights file after '@': write {arch}@FILE, or leave '@' out."
            )
        return cls(arch, weights or None, _fields(text, query))

    @classmethod
    def _joined(cls, text: str) -> ModelString:
        """Return the parts of an ensemble's string, whose query begins after the bracket that closes it."""
        depth, end = 0, 0
        for index, sign in enumerate(text):
            depth += (sign == "[") - (sign == "]")
            if depth > MAX_DEPTH:
                raise UsageError(
                    f"model {text[:60]!r}… has more than {MAX_DEPTH} brackets inside one another: write its "
                    "members side by side, as in 'ensemble:[A;B;C]'."
                )
            if sign == "]" and depth == 0:
                end = index + 1
                break
        head, rest = text[:end], text[end:]
        query = _QUERY.match(rest)
        if not head.startswith(_OPEN) or (rest and not query):
            raise UsageError(
                f"model {text!r}: write an ensemble's members in brackets with semicolons between, as in "
                "'ensemble:[A;B;C]?combine=logits'."
            )
        spec = cls(head, None, _fields(text, rest[1:]))
        if len(spec.members) < 2 or not all(spec.members):
            raise UsageError(f"model {text!r} joins fewer than two models: write two or more, as in [A;B].")
        if len(spec.members) > MAX_MEMBERS:
            raise UsageError(
                f"model {text[:60]!r}… joins {len(spec.members):,} models: write at most {MAX_MEMBERS:,}."
            )
        return spec

    @property
    def members(self) -> list[str]:
        """Model strings of an ensemble's members, as written between its brackets."""
        parts, depth = [""], 0
        for sign in self.arch[len(_OPEN) : -1]:
            depth += (sign == "[") - (sign == "]")
            if sign == ";" and depth == 0:
                parts.append("")
            else:
                parts[-1] += sign
        return [part.strip() for part in parts]

    def __str__(self) -> str:
        weights = "" if self.weights is None else f"@{self.weights}"
        query = "&".join(f"{name}={quote(value, safe=',:/+')}" for name, value in self.options.items())
        return f"{self.arch}{weights}{'?' if query else ''}{query}"

    @property
    def kind(self) -> str:
        """Which kind of net `arch` names: one of the constants of this module; UNKNOWN if none."""
        if self.arch.startswith(_OPEN):
            return ENSEMBLE
        if ":" not in self.arch:
            return SOURCE if prefix_for_file(self.arch) else FOLDER
        if is_prefix(self.source):
            return SOURCE
        if self.source.endswith(".py"):
            return FILE
        return MODULE if _MODULE.fullmatch(self.source) and self.name.isidentifier() else UNKNOWN

    @property
    def source(self) -> str:
        """The part before the colon: the library, the module, or the path of the file."""
        return self._cut[0]

    @property
    def name(self) -> str:
        """The part after the colon: the net's name, or the factory's."""
        return self._cut[1]

    @property
    def _cut(self) -> tuple[str, str]:
        """Both; the path of a file may have colons of its own, and so may what is meant for a library."""
        first, colon, rest = self.arch.partition(":")
        if not (colon and is_prefix(first)) and (prefix := prefix_for_file(self.arch)):
            return prefix, self.arch
        source, _, name = self.arch.rpartition(":")
        return (source, name) if source.endswith(".py") else (first, rest)


def joined(members: Sequence[str]) -> str:
    """Return the string of the ensemble of these models."""
    return f"{_OPEN}{';'.join(members)}]"


def _fields(text: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    # A plus is itself here, not a form's blank.
    for name, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):
        if not name.isidentifier():
            raise UsageError(f"model {text!r} has a field named {name!r}: write fields as NAME=VALUE.")
        if name in options:
            raise UsageError(f"model {text!r} has the field {name!r} twice: write it once.")
        _, separator, weights = value.rpartition("@")
        if separator and weights.endswith(_WEIGHTS):
            raise UsageError(f"model {text!r} has its weights in the query: write @{weights} in front of the '?'.")
        options[name] = value
    return options
