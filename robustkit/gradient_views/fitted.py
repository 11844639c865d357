"""A linear substitute for the undifferentiable part of a model, fitted to the model's decisions.

Nearest neighbours in numpy, votes and tables have no gradient, and smooth rules do not cover all of them. Their
inputs have gradients: the tensors that leave torch, and those that indices are selected from. The substitute is
a ridge regression of the model's decisions on these tensors, at some images and at mixtures of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.shapes import Images, Logits

# Shares of the first image in mixtures of two: one near the second image, one near the first.
MIX_SHARES = (0.3, 0.7)
# The ridge penalty, relative to the mean squared norm of the features.
RIDGE = 1e-2


def concatenated(sources: Sequence[Tensor], count: int) -> Tensor:
    """Return tensors (B ...) concatenated to (B D), each row of each tensor normalised to norm 1.

    Args:
        sources: tensors; those without `count` rows are left out.
        count: B.

    Raises:
        RuntimeError: if no tensor is left.
    """
    flat = [source.flatten(1) for source in sources if source.dim() > 1 and len(source) == count]
    if not flat:
        raise RuntimeError("no tensor that depends on the images leaves torch or is selected from.")
    return torch.cat([F.normalize(source, dim=1) for source in flat], 1)


def fit(features: Callable[[Images], Tensor], model: Callable[[Images], Logits], x: Images) -> Tensor:
    """Return weights (D K) that predict a model's decisions from features.

    They are fitted at images and at two mixtures of each pair of images. Each of these points costs a pass
    through the model and one through the features.

    Args:
        features: function from images (B C H W) to features (B D).
        model: function from images to logits (B K).
        x: images (B C H W).
    """
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    mixes = [share * x[first] + (1 - share) * x[second] for share in MIX_SHARES]
    points = torch.split(torch.cat([x, *mixes]), len(x))
    with torch.no_grad():
        logits = torch.cat([model(part) for part in points])
        z = torch.cat([features(part).detach() for part in points])
    decisions = F.one_hot(logits.argmax(1), logits.shape[1]).to(z)
    gram = z @ z.T
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=z.device, dtype=z.dtype)
    weights: Tensor = z.T @ torch.linalg.solve(gram + ridge, decisions - decisions.mean(0))
    return weights
