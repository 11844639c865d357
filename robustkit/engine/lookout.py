"""What may stand in for a model's gradients in a run, by the names that suites use, and what that tells of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.models.classifier import Classifier
from robustkit.models.ladder import ensemble
from robustkit.models.views import Mended, Smooth, views
from robustkit.record import Flag
from robustkit.registry import VIEWS
from robustkit.shapes import Images

# Views that say nothing against a model's own gradients.
INNOCENT = {"smooth"}


@dataclass(frozen=True)
class Outlook:
    """Views by the names of suites, each one or several, and flags of what was found to hide gradients."""

    views: Mapping[str, Sequence[Callable[[Images], Tensor]]] = field(default_factory=dict)
    flags: Sequence[Flag] = ()

    @property
    def doubtful(self) -> bool:
        """Whether attacks on the model's own gradients alone will not do."""
        return bool(self.views.keys() - INNOCENT)


def look(model: Classifier, x: Images, random: bool) -> Outlook:
    """Return what a model offers to climb on beside its own gradients, by the images x (B C H W)."""
    found = views(model, x)
    sorted_in: dict[str, list[Callable[[Images], Tensor]]] = {}
    for name, view in found.items():
        known = "members" if name.startswith("member-") else name if name in VIEWS else "own"
        sorted_in.setdefault(known, []).append(view)
    part = ensemble(model)
    if part is not None:
        sorted_in["stack"] = [Stacked(model, part)]
    if random:
        sorted_in["averaged"] = [Smooth(Mended(model), sigma=0.0)]
    flags = []
    if found.mends:
        places = "; ".join(sorted({f"{mend.where or 'the model'} {mend.what}" for mend in found.mends}))
        flags.append(
            Flag(
                "masked-gradient",
                "warning",
                len(found.mends),
                f"places hide the gradient from attacks: {places}",
                "quote the number of --suite auto or adaptive, which see through them; AutoAttack's is too high",
            )
        )
    return Outlook(sorted_in, flags)


@dataclass(frozen=True)
class Stacked:
    """The predictors' logits (B N K) of an ensemble, side by side."""

    model: Classifier
    part: nn.Module

    def __call__(self, x: Images) -> Tensor:
        """Return the logits of x."""
        seen: list[Tensor] = []

        def keep(stack: Tensor, *_: Any) -> Tensor:
            seen.append(stack)
            return stack.mean(1)

        Mended(self.model, part=self.part, rung=keep)(x)
        if not seen:
            return torch.zeros(len(x), 1, self.model.num_classes or 2, device=x.device)
        return seen[-1]
