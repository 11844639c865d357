"""The request for a craft run: surrogates, images, attack, and how the surrogates are combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from robustkit import registry
from robustkit.attack_api import Composition, Surrogates, compose
from robustkit.attack_api.surrogates import COMBINATIONS
from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.sanity import check_eps
from robustkit.engine.model.loaded_models import Net
from robustkit.runs.craft_record import CHOICES, CraftSpec

DEFAULT_ATTACK, DEFAULT_COMBINE = "auto", "consensus"


@dataclass(frozen=True)
class CraftRequest:
    """What to craft and how; `spec` identifies it before anything has run (see `crafting.run.run_craft`).

    Attributes:
        nets: the surrogates.
        samples: clean images and labels.
        threat: the threat model.
        attack: an attack with techniques, e.g. `mi-fgsm+di`.
        combine: how the surrogates are made one, see `attack_api.surrogates`.
        weights: of the surrogates; None for equal ones.
        targeted: how target classes are chosen; None for an untargeted attack.
        seed: of all random numbers.
        device: where to compute.
        batch_size: images at once; None for the default.
        streaming: keep one net in memory at a time (True), or all (False); None decides by the free memory.
        workers: processes that share the work.
        ray: address of a Ray cluster on which the workers run.
        deterministic: use deterministic kernels only.

    The last five are not part of the identity: they change the images by float rounding at most.
    """

    nets: Sequence[Net]
    samples: Samples
    threat: ThreatModel
    attack: str = DEFAULT_ATTACK
    combine: str = DEFAULT_COMBINE
    weights: Sequence[float] | None = None
    targeted: str | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    streaming: bool | None = None
    workers: int | None = None
    ray: str | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Check that the values fit each other; the options of a verb check the range of each by itself."""
        self.threat.bounded()
        if not self.nets:
            raise UsageError("no surrogate to craft on; give at least one with --surrogate.")
        if self.combine not in COMBINATIONS:
            raise did_you_mean("combination", self.combine, COMBINATIONS)
        if self.targeted is not None and self.targeted not in CHOICES:
            raise did_you_mean("choice of target classes", self.targeted, CHOICES)
        if not len(self.samples):
            raise UsageError(f"{self.samples.name} holds no images.")
        if self.parts[0].info.coupled:
            raise UsageError(
                f"attack {self.attack!r} draws its random numbers by the batch, so a resumed run would differ; "
                "craft with one of our own, such as mi-fgsm."
            )
        Surrogates([lambda x: x] * len(self.nets), self.combine, self.weights)
        check_eps(self.threat, tuple(self.samples.images([0]).shape[1:]))

    @cached_property
    def parts(self) -> list[Any]:
        """The attack and its techniques."""
        return registry.parse_attack(self.attack, self.threat.norm)

    @cached_property
    def composed(self) -> Any:
        """The attack with its techniques as one callable."""
        return compose(self.parts)

    @cached_property
    def spec(self) -> CraftSpec:
        """Everything that determines the images."""
        one = isinstance(self.composed, Composition)
        body = self.composed.spec() if one else {**registry.spec(self.composed), "techniques": []}
        return CraftSpec(
            surrogates=[net.identity for net in self.nets],
            combine=self.combine,
            weights=None if self.weights is None else [float(weight) for weight in self.weights],
            attack={**body, "string": self.attack},
            targeted=self.targeted,
            data={
                "string": self.samples.name,
                "n": len(self.samples),
                "fingerprint": self.samples.fingerprint,
            },
            threat=str(self.threat),
            seed=self.seed,
        )
