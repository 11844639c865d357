"""A net whose layers vote: the self-ensemble of Fort & Lakshminarayanan 2024 (arXiv:2408.05446).

A backbone sees an image as a multi-resolution stack; linear probes at its layers and the backbone itself predict,
and an aggregator makes one answer of them. The notebook draws one stack for the probes and another for the
backbone; here one pass with one draw serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits
from robustkit.defenses.multiresolution.probes import flat, probes, seen
from robustkit.defenses.multiresolution.stack import MultiResolution
from robustkit.models.ensembles.aggregation import logits as mean_logits
from robustkit.models.ensembles.aggregation import parse_aggregator
from robustkit.models.layers.features import evaluating
from robustkit.models.randomness import Noise, drawn

# What a net answers with while it is trained.
BACKBONE, PROBES = "backbone", "probes"


class SelfEnsemble(nn.Module):
    """A backbone on stacks, with probes; maps images on [0, 1] to logits.

    Attributes:
        noise: the policy of its random numbers, which anyone may set.
        combine: the aggregator's name, which anyone may set.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        stack: MultiResolution,
        layers: Sequence[str],
        image: Images,
        *,
        pooled: bool = False,
        size: int = 0,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        """Put new probes on a backbone that takes stacks.

        Args:
            backbone: takes (B R*C H W).
            stack: what makes those of images.
            layers: names of the backbone's modules, without the one that the logits come from.
            image: one (1 C H W), to measure layers with.
            pooled: whether probes see the mean over places of a feature map.
            size: height and width that stacks are enlarged to, bicubic; 0 leaves them.
            mean: subtracted from each channel of each image of a stack.
            std: divides it afterwards.
        """
        super().__init__()
        self.backbone = backbone
        self.stack = stack
        self.layers = tuple(layers)
        self.pooled = pooled
        self.size = size
        self.noise = Noise()
        self.combine = usual_combine(len(self.layers) + 1)
        for name, values in (("mean", mean), ("std", std)):
            each = torch.tensor(values, dtype=torch.float32).expand(image.shape[1])
            self.register_buffer(name, each.repeat(len(stack.resolutions)).view(1, -1, 1, 1))
        stacked = self.shown(image, Noise("frozen").rng(image))
        self.probes = probes(backbone, stacked, self.layers, pooled)
        self._answers: str | None = None
        self._rng: RowRng | None = None

    def shown(self, images: Images, rng: RowRng) -> Images:
        """Return normalised stacks (B R*C H W) of images, as the backbone takes them."""
        x = self.stack(images, rng)
        if self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False)
        return (x - self.mean) / self.std

    def stacked(self, images: Images) -> Tensor:
        """Return the logits (B N K) of the probes in order, and of the backbone last."""
        features, logits = seen(self.backbone, self._shown(images), self.layers)
        named = [probe(flat(each, self.pooled)) for probe, each in zip(self.probes, features, strict=True)]
        return torch.stack([*named, logits], 1)

    def forward(self, images: Images) -> Logits:
        """Return the aggregated logits."""
        # Traced, hooks would be lost.
        if not isinstance(images, Tensor):
            raise TypeError("a self-ensemble is not to be traced.")
        if self._answers == BACKBONE:
            logits: Tensor = self.backbone(self._shown(images))
            return logits
        if self._answers == PROBES:
            return self._mean_of_probes(images)
        return parse_aggregator(self.combine)(self.stacked(images).float())

    def views(self) -> dict[str, Callable[[Images], Logits]]:
        """Return what to search gradients of: the mean logits, with every draw at its middle or held still."""
        return {f"mean-logit-{kind}": partial(self._under, Noise(kind)) for kind in ("calm", "frozen")}

    def _under(self, noise: Noise, images: Images) -> Logits:
        with drawn(self, noise):
            return mean_logits(self.stacked(images).float())

    @contextmanager
    def answering(self, part: str, rng: RowRng) -> Iterator[None]:
        """Let one part answer for a while, on stacks of this draw: `backbone` alone, or `probes`.

        The probes' answer is their mean log-probability, whose negative at the label is the mean of their
        cross-entropies. Backbone and running statistics are left alone then.
        """
        self._answers, self._rng = part, rng
        try:
            yield
        finally:
            self._answers, self._rng = None, None

    def _shown(self, images: Images) -> Images:
        return self.shown(images, self.noise.rng(images) if self._rng is None else self._rng)

    def _mean_of_probes(self, images: Images) -> Logits:
        with evaluating(self.backbone), torch.no_grad():
            features, _ = seen(self.backbone, self._shown(images), self.layers)
        named = [probe(flat(each, self.pooled)) for probe, each in zip(self.probes, features, strict=True)]
        return torch.stack(named).float().log_softmax(2).mean(0)


def usual_combine(predictors: int) -> str:
    """Return the published aggregator of so many predictors: the third largest of eight, the second of a few."""
    return f"crossmax:{min(3, max(2, (predictors + 1) // 2))}"


def self_ensemble(net: nn.Module) -> SelfEnsemble:
    """Return the self-ensemble that a net is or holds.

    Raises:
        UsageError: if there is none.
    """
    for part in net.modules():
        if isinstance(part, SelfEnsemble):
            return part
    raise UsageError(f"a {type(net).__name__} is no self-ensemble; train it with `robustkit train multires`.")
