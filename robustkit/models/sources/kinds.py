"""The error for a model string whose kind does not exist."""

from __future__ import annotations

import difflib

from robustkit.core.errors import UsageError
from robustkit.models.sources import from_timm
from robustkit.models.strings import TIMM, TORCHVISION, ZOO, ModelString
from robustkit.models.zoo.catalog import ZOO as CATALOG

_FORMS = (
    "robustkit:NAME, timm:NAME, torchvision:NAME, ensemble:[A;B], ./FILE.py:FACTORY, MODULE:FACTORY or the folder "
    "of a training run"
)
# Prefixes of names on Hugging Face's or torch's hub.
_HUBS = ("hf", "hf-hub", "hf_hub", "hub", "huggingface", "torch.hub", "torchhub")


def no_such_kind(spec: ModelString) -> UsageError:
    """Return the error for a model string whose prefix is neither a kind of model nor a module."""
    near = _near(spec)
    hint = f"did you mean {near!r}? Otherwise write" if near else "write"
    return UsageError(
        f"there is no kind of model {spec.source!r}, nor a module of that name, for {spec.arch!r}: {hint} "
        f"{_FORMS}."
    )


def _near(spec: ModelString) -> str | None:
    """Return the model string that was probably meant: its kind spelt right, or the kind that has the net."""
    for kind in difflib.get_close_matches(spec.source.lower(), (ZOO, TIMM, TORCHVISION), n=1):
        if kind != ZOO or spec.name in CATALOG:
            return f"{kind}:{spec.name}"
    if spec.source not in _HUBS:
        return None
    # OWNER/NET.TAG, whose net may be spelt in another way. To list timm's takes seconds.
    net = _letters(spec.name.rpartition("/")[2].partition(".")[0])
    for kind, names in ((ZOO, list(CATALOG)), (TIMM, from_timm.names())):
        for name in names:
            if _letters(name) == net:
                return f"{kind}:{name}"
    return None


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()
