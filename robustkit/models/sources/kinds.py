"""The forms of model strings; and the error for one that has none of them. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from robustkit.core.errors import UsageError
from robustkit.models.sources.source import own_sources
from robustkit.models.strings import ModelString

# What a model string can be beside `PREFIX:NAME` of a model source, with one line for `robustkit list models`.
FORMS: Mapping[str, str] = {
    "ensemble:[A;B]": "several models as one, combined by ?combine=",
    "./FILE.py:FACTORY": "what a function in a file returns",
    "MODULE:FACTORY": "what an importable function returns",
    "RUN_FOLDER": "what robustkit train wrote; RUN_FOLDER/#2 is its third member or posterior sample",
}
# Prefixes of names on Hugging Face's or torch's hub.
_HUBS = ("hf_hub", "hub", "huggingface", "torch.hub", "torchhub")


def no_such_kind(spec: ModelString) -> UsageError:
    """Return the error for a model string whose prefix is neither a kind of model nor a module."""
    near = _near(spec)
    hint = f"did you mean {near!r}? Otherwise write" if near else "write"
    *forms, last = (*(f"{source.prefix}:{source.placeholder}" for source in own_sources()), *FORMS)
    return UsageError(
        f"there is no kind of model {spec.source!r}, nor a module of that name, for {spec.arch!r}: {hint} "
        f"{', '.join(forms)} or {last}."
    )


def _near(spec: ModelString) -> str | None:
    """Return the model string that was probably meant: its kind spelt right, or the kind that has the net."""
    sources = {source.prefix: source for source in own_sources()}
    for prefix in difflib.get_close_matches(spec.source.lower(), sources, n=1):
        if not sources[prefix].nets or spec.name in sources[prefix].nets:
            return f"{prefix}:{spec.name}"
    if spec.source not in _HUBS:
        return None
    # OWNER/NET.TAG, whose net may be spelt in another way. To list timm's takes seconds.
    net = _letters(spec.name.rpartition("/")[2].partition(".")[0])
    for prefix, source in sources.items():
        for name in source.names():
            if _letters(name) == net:
                return f"{prefix}:{name}"
    return None


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()
