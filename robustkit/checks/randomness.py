"""Diagnoses of models that are random or that optimise inside the forward pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from robustkit.checks.probe import Probe
from robustkit.core.flags import Flag, passed, unmeasured
from robustkit.core.shapes import Logits
from robustkit.runs.recorded_outputs import not_recording

NOISE = 1e-4
CALLS = 5
SEEDERS: dict[str, Callable[[int], object]] = {
    "torch": torch.manual_seed,
    "numpy": np.random.seed,
    "random": random.seed,
}


def randomised(probe: Probe) -> Flag:
    """Outputs that change from one call to the next; names the random generators that they depend on.

    Five calls and the tolerance, 1e-4 on normalised logits, are AutoAttack's; each call has other seeds. Sources
    are found by seeding all generators alike, then each one differently. The caller isolates the generators.
    """
    if probe.attacks and all(getattr(attack, "eot_iter", 1) > 1 for attack in probe.attacks):
        return unmeasured("randomised", "the suite averages over draws in any case", "nothing to do")
    gap = max(_gap(_normalised(probe.logits), _answer(probe, call)) for call in range(1, CALLS))
    what = "is the largest change of the normalised logits between calls"
    if gap <= NOISE:
        return passed("randomised", round(gap, 6), what)
    first = _answer(probe)
    still = _gap(first, _answer(probe)) > NOISE
    sources = [name for name in SEEDERS if not still and _gap(first, _answer(probe, differently=name)) > NOISE]
    return Flag(
        "randomised",
        "warning",
        round(gap, 6),
        f"{what}: the model is random (source: "
        f"{', '.join(sources) or 'none of the generators of torch, numpy, random'}), "
        "and a verdict is what most draws say",
        "use --suite auto or adaptive, which average gradients over draws too",
    )


def optimises_at_test_time(probe: Probe) -> Flag:
    """Gradient computations inside the forward pass."""
    with _counted() as calls, torch.no_grad(), not_recording():
        probe.model(probe.x[:2])
    if not calls:
        return passed("test-time-optimisation", 0, "gradient calls are made inside one forward pass")
    return Flag(
        "test-time-optimisation",
        "warning",
        len(calls),
        f"gradient call{'s are' if len(calls) > 1 else ' is'} made inside one forward pass: attacks do not "
        f"differentiate through them",
        "also run an adaptive attack",
    )


def _answer(probe: Probe, seed: int = 0, differently: str | None = None) -> Logits:
    """Return the normalised logits with all generators at this seed, one of them at the next."""
    for name, start in SEEDERS.items():
        start(seed + (name == differently))
    with torch.no_grad():
        return _normalised(probe.model(probe.x))


def _normalised(logits: Logits) -> Logits:
    normalised: Logits = logits / logits.norm(dim=1, keepdim=True).clamp(min=1e-10)
    return normalised


def _gap(one: Logits, other: Logits) -> float:
    return float((one - other).norm(dim=1).max())


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Count the calls of torch's gradient functions inside."""
    calls: list[str] = []
    places: list[tuple[Any, str]] = [
        (torch.autograd, "grad"),
        (torch.autograd, "backward"),
        (torch.Tensor, "backward"),
    ]
    originals = [getattr(owner, name) for owner, name in places]

    def noting(original: Any, name: str) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            calls.append(name)
            return original(*arguments, **more)

        return call

    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, noting(original, name))
        yield calls
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
