"""A linear stand-in for the part of a model that has no gradient, fitted to the model's own decisions.

Nearest neighbours in numpy, votes and tables have no gradient, and no smooth rule replaces all of them. What they
are computed from has one: the tensors that leave torch, and those that indices are chosen from. The view is a
ridge regression of the model's decisions on these tensors, at a few images and at mixes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.shapes import Images, Logits

# Of two images that are mixed, the share of the first: near one, and near the other.
SHARES = (0.3, 0.7)
# The penalty, as a share of the mean squared length of the features.
RIDGE = 1e-2


def side_by_side(sources: Sequence[Tensor], count: int) -> Tensor:
    """Return tensors (B ...) as one (B D), each row of each of length 1; ones of another B are left out.

    Raises:
        RuntimeError: if no tensor is left.
    """
    flat = [source.flatten(1) for source in sources if source.dim() > 1 and len(source) == count]
    if not flat:
        raise RuntimeError("nothing that depends on the images leaves torch or is chosen from.")
    return torch.cat([F.normalize(source, dim=1) for source in flat], 1)


def fit(features: Callable[[Images], Tensor], model: Callable[[Images], Logits], x: Images) -> Tensor:
    """Return weights (D K) by which features predict a model's decisions at images x (B C H W) and at their mixes.

    Costs as many passes through the model and through the features as there are pairs of images, four times.
    """
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    mixes = [share * x[first] + (1 - share) * x[second] for share in SHARES]
    at = torch.split(torch.cat([x, *mixes]), len(x))
    with torch.no_grad():
        answers = torch.cat([model(part) for part in at])
        z = torch.cat([features(part).detach() for part in at])
    wanted = F.one_hot(answers.argmax(1), answers.shape[1]).to(z)
    gram = z @ z.T
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=z.device, dtype=z.dtype)
    weights: Tensor = z.T @ torch.linalg.solve(gram + ridge, wanted - wanted.mean(0))
    return weights
