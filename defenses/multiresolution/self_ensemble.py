"""The self-ensemble of Fort & Lakshminarayanan 2024 (arXiv:2408.05446): probes on the layers of one net.

A backbone takes an image as a multi-resolution stack. Linear probes on its layers and the backbone itself predict
logits, which an aggregator combines. The notebook draws one stack for the probes and another for the backbone;
here one pass with one draw gives both.
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
from robustkit.defenses.multiresolution.probes import flat, layer_outputs, probes
from robustkit.defenses.multiresolution.stack import MultiResolution
from robustkit.models.ensembles.aggregation import logits as mean_logits
from robustkit.models.ensembles.aggregation import parse_aggregator
from robustkit.models.layers.features import evaluating
from robustkit.models.randomness import Noise, drawn

# The parts that are trained, one after the other.
BACKBONE, PROBES = "backbone", "probes"


class SelfEnsemble(nn.Module):
    """A backbone on stacks, with probes; maps images (B C H W) in [0, 1] to logits (B K).

    Attributes:
        noise: the policy of its random numbers; it can be set.
        combine: the name of the aggregator; it can be set.
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
        """Add new probes to a backbone that takes stacks.

        Args:
            backbone: a net that takes stacks (B R*C H W).
            stack: function from images to stacks.
            layers: names of the backbone's modules, without the one that returns the logits.
            image: one image (1 C H W), to measure the layers with.
            pooled: whether probes get the spatial mean of a feature map.
            size: height and width that stacks are resized to, bicubic; 0 for their own size.
            mean: mean of each channel, for the normalisation.
            std: standard deviation of each channel, for the normalisation.
        """
        super().__init__()
        self.backbone = backbone
        self.stack = stack
        self.layers = tuple(layers)
        self.pooled = pooled
        self.size = size
        self.noise = Noise()
        self.combine = default_aggregator(len(self.layers) + 1)
        for name, values in (("mean", mean), ("std", std)):
            each = torch.tensor(values, dtype=torch.float32).expand(image.shape[1])
            self.register_buffer(name, each.repeat(len(stack.resolutions)).view(1, -1, 1, 1))
        example_stack = self.normalised_stack(image, Noise("frozen").rng(image))
        self.probes = probes(backbone, example_stack, self.layers, pooled)
        self._trained_part: str | None = None
        self._rng: RowRng | None = None

    def normalised_stack(self, images: Images, rng: RowRng) -> Images:
        """Return normalised stacks (B R*C H W) of images, the inputs of the backbone."""
        x = self.stack(images, rng)
        if self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False)
        return (x - self.mean) / self.std

    def stacked(self, images: Images) -> Tensor:
        """Return the logits (B N K) of the probes in order and then of the backbone."""
        features, logits = layer_outputs(self.backbone, self._input(images), self.layers)
        predictions = [probe(flat(each, self.pooled)) for probe, each in zip(self.probes, features, strict=True)]
        return torch.stack([*predictions, logits], 1)

    def forward(self, images: Images) -> Logits:
        """Return the aggregated logits."""
        # Tracing would drop the hooks that read the layers.
        if not isinstance(images, Tensor):
            raise TypeError("a self-ensemble cannot be traced.")
        if self._trained_part == BACKBONE:
            logits: Tensor = self.backbone(self._input(images))
            return logits
        if self._trained_part == PROBES:
            return self._mean_of_probes(images)
        return parse_aggregator(self.combine)(self.stacked(images).float())

    def views(self) -> dict[str, Callable[[Images], Logits]]:
        """Return views for gradient attacks: the mean logits, with random numbers at their means or frozen."""
        return {f"mean-logit-{kind}": partial(self._mean_logits, Noise(kind)) for kind in ("calm", "frozen")}

    def _mean_logits(self, noise: Noise, images: Images) -> Logits:
        """Return the mean logits of the parts under a policy of random numbers."""
        with drawn(self, noise):
            return mean_logits(self.stacked(images).float())

    @contextmanager
    def training_part(self, part: str, rng: RowRng) -> Iterator[None]:
        """Make `forward` return the output of one part inside the context: the `backbone`, or the `probes`.

        The output of the probes is their mean log-probability, whose negative at the label is the mean of their
        cross-entropies. The backbone and its running statistics do not change then.

        Args:
            part: `backbone` or `probes`.
            rng: random numbers of the stacks.
        """
        self._trained_part, self._rng = part, rng
        try:
            yield
        finally:
            self._trained_part, self._rng = None, None

    def _input(self, images: Images) -> Images:
        return self.normalised_stack(images, self.noise.rng(images) if self._rng is None else self._rng)

    def _mean_of_probes(self, images: Images) -> Logits:
        with evaluating(self.backbone), torch.no_grad():
            features, _ = layer_outputs(self.backbone, self._input(images), self.layers)
        predictions = [probe(flat(each, self.pooled)) for probe, each in zip(self.probes, features, strict=True)]
        return torch.stack(predictions).float().log_softmax(2).mean(0)


def default_aggregator(predictors: int) -> str:
    """Return the published aggregator for a number of predictors: the third largest of 8, the second of fewer."""
    return f"crossmax:{min(3, max(2, (predictors + 1) // 2))}"


def self_ensemble(net: nn.Module) -> SelfEnsemble:
    """Return the self-ensemble that a net is or contains.

    Raises:
        UsageError: if there is none.
    """
    for part in net.modules():
        if isinstance(part, SelfEnsemble):
            return part
    raise UsageError(f"a {type(net).__name__} is not a self-ensemble; train it with `robustkit train multires`.")
