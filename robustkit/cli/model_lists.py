"""Lists of model strings, which may contain commas themselves."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.core.errors import UsageError, expand_path
from robustkit.models.strings import FILE, FOLDER, ModelString


def split_models(text: str) -> list[str]:
    """Split a list of model strings at its commas, except commas in a query or in the brackets of an ensemble."""
    parts: list[str] = []
    for piece in text.split(","):
        inside = parts and (
            parts[-1].count("[") > parts[-1].count("]")
            or ("?" in parts[-1] and not any(character in piece for character in ":/"))
        )
        if inside:
            parts[-1] += f",{piece}"
        elif piece.strip():
            parts.append(piece.strip())
    return parts


def refuse_lists(flag: str, models: Sequence[str]) -> None:
    """Raise UsageError for several models in a flag that takes one; a file name may contain a comma."""
    for text in models:
        spec, parts = ModelString.parse(text), split_models(text)
        file = spec.weights or {FILE: spec.source, FOLDER: spec.arch}.get(spec.kind, "")
        if len(parts) > 1 and not (file and expand_path(file).exists()):
            each = " ".join(f"{flag} {part}" for part in parts)
            raise UsageError(f"{flag} {text} is a list; repeat the flag for each model: {each}.")
