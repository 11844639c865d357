"""Gradients of views, by which those that search in the same direction are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.isolation import own_randomness
from robustkit.core.shapes import Images
from robustkit.gradient_views.aggregator_substitutes import find_ensemble, mean_logit, members_and_output
from robustkit.gradient_views.view_kinds import MembersView, TracedModel, View
from robustkit.runs.recorded_outputs import run_once

# Above this cosine on every image two gradients count as the same.
MIN_PARALLEL_COSINE = 0.999
# Up to this difference, as a share of the largest value, logits or gradients count as equal.
MAX_SHIFT = 1e-3


def gradients_of(view: View, x: Images, labels: Tensor, members: MembersPass | None = None) -> list[Tensor] | None:
    """Return the gradients (B P) of cross-entropy and margin; None if the view has no usable gradient.

    All views get the same random numbers.

    Args:
        view: the view.
        x: images (B C H W).
        labels: of these (B).
        members: a pass of x, which a view of an ensemble's members uses.
    """
    try:
        with torch.enable_grad(), own_randomness("slopes"):
            if members is not None and isinstance(view, MembersView):
                images = members.images
                logits = view.combined(members.outputs)
            else:
                images = x.clone().requires_grad_()
                logits = view(images)
            if logits.shape[0] != len(x) or logits.dim() != 2 or not logits.requires_grad:
                return None
            own = logits.gather(1, labels[:, None])[:, 0]
            best = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
            losses = (F.cross_entropy(logits, labels, reduction="sum"), (best - own).sum())
            gradients = [
                torch.autograd.grad(loss, images, retain_graph=True)[0].flatten(1).cpu() for loss in losses
            ]
    except Exception:
        return None
    if not all(one.isfinite().all() for one in gradients) or not any(one.any() for one in gradients):
        return None
    return gradients


@dataclass(frozen=True)
class MembersPass:
    """A pass of an ensemble: images with a gradient, and logits of its members, then its own (B N+1 K)."""

    images: Images
    outputs: Tensor

    def are(self, heads: Sequence[Tensor]) -> bool:
        """Return whether the members' logits are those of these heads."""
        members = self.outputs[:, :-1]
        return len(heads) == members.shape[1] and _are_close(torch.stack(list(heads), 1), members)


def members_pass(traced: TracedModel, x: Images, labels: Tensor) -> MembersPass | None:
    """Return a pass of the members of an ensemble; None for other models, and for members that need a tracer."""
    model = traced.model
    part = find_ensemble(model)
    if part is None or part is not model.net or model.defenses:
        return None
    try:
        with torch.enable_grad():
            images = x.clone().requires_grad_()
            members = MembersPass(images, members_and_output(model, images))
    except Exception:
        return None
    plain = gradients_of(MembersView(model, mean_logit), x, labels, members)
    mended_view = replace(traced, part=part, entry=mean_logit)
    mended = run_once("traced mean-logit", lambda: gradients_of(mended_view, x, labels))
    if plain is None or mended is None:
        return None
    return members if all(map(_are_close, plain, mended)) else None


def _are_close(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach(), other.detach()
    return torch.allclose(one, other, rtol=MAX_SHIFT, atol=MAX_SHIFT * float(one.abs().max()))


def are_parallel(one: list[Tensor], other: list[Tensor]) -> bool:
    """Return whether the gradients have the same direction on every image."""
    for a, b in zip(one, other, strict=True):
        zero = (a == 0).all(1) & (b == 0).all(1)
        if not bool(
            ((F.cosine_similarity(a.double(), b.double(), eps=1e-300) > MIN_PARALLEL_COSINE) | zero).all()
        ):
            return False
    return True
