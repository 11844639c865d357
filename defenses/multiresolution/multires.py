"""A multi-resolution self-ensemble (Fort & Lakshminarayanan 2024, arXiv:2408.05446): everything everywhere.

Constants are those of the authors' notebook. All probes are trained together, on batches as large as the
backbone's; the notebook trains them one after another, on 64 images at a time. The backbone's running
statistics do not change during this; in the notebook they drift. During attacks batch norms are in eval mode,
as published, and dropout, which the notebook's net does not have, stays on. Zhang et al. (2024,
arXiv:2411.14834) broke the defense: high robust accuracy under attacks on its output is due to gradient masking.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError, check_choices
from robustkit.core.limits import Limits
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.defenses.multiresolution.probes import default_layers
from robustkit.defenses.multiresolution.self_ensemble import BACKBONE, PROBES, SelfEnsemble, self_ensemble
from robustkit.defenses.multiresolution.stack import PRESETS, MultiResolution, Range
from robustkit.defenses.multiresolution.stem import STEMS, widen
from robustkit.models.ensembles.aggregation import parse_aggregator
from robustkit.registry import method
from robustkit.registry.ranges import Count, CountOrZero, NonNegative
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Plan, Size
from robustkit.training.wrapping_method import WrappingMethod

ATTACKS = ("none", "fgsm", "pgd")
MAX_RESOLUTIONS = 16


@method("multires", paper="arXiv:2408.05446")
@dataclass(frozen=True, slots=True)
class MultiRes(WrappingMethod):
    """Trains a backbone on stacks, and in the last epochs, the share `probing`, linear probes on its `layers`.

    `preset` is `notebook` or `paper`; `resolutions` (32+16+8+4), `noise`, `jitter` (pixels), `contrast` (0.7:1.5)
    and `colour` change its constants. `stem` is `fresh`, or `inflated` from the weights of the net. Stacks are
    resized to `enlarge` pixels. `attack` trains the backbone on adversarial images: `none`, `fgsm`, or `pgd` in
    `steps`.
    """

    preset: str = "notebook"
    resolutions: str = ""
    noise: NonNegative | None = None
    jitter: CountOrZero | None = None
    contrast: str = ""
    colour: str = ""
    layers: str = ""
    pooled: bool = False
    stem: str = "fresh"
    enlarge: Annotated[int, Limits(0, 4096)] = 0
    probing: Annotated[float, Limits(0, 1, open="both")] = 1 / 7
    attack: str = "none"
    threat: str = "linf:8/255"
    steps: Count = 7
    step_size: StepSize = StepSize(0.25)

    ensembles = True

    def __post_init__(self) -> None:
        """Refuse unknown values and constants out of range."""
        check_choices(self, preset=PRESETS, stem=STEMS, attack=ATTACKS)
        ThreatModel.parse(self.threat).bounded()
        self.stack(32)

    def default_size(self, samples: int) -> Size:
        """Return the notebook's size, for fine-tuning; on a small set a size for training from scratch."""
        return Size(7, 128, 3.3e-5) if samples > 5000 else Size(30, 64, 0.01)

    def check_plan(self, plan: Plan) -> None:
        """Refuse a run with fewer epochs than parts."""
        WrappingMethod.check_plan(self, plan)
        if plan.epochs < 2:
            raise UsageError(
                f"multires trains backbone and probes: --epochs must be at least 2, got {plan.epochs}."
            )

    def stack(self, height: int) -> MultiResolution:
        """Return the stack for images of a height."""
        changed: dict[str, Any] = {}
        if self.resolutions:
            changed["resolutions"] = _heights(self.resolutions)
        if self.noise is not None:
            changed |= {"noise_small": self.noise, "noise_large": self.noise}
        if self.jitter is not None:
            changed["jitter"] = self.jitter
        changed |= {name: _range(name, text) for name in ("contrast", "colour") if (text := getattr(self, name))}
        return MultiResolution.preset(self.preset, height, **changed)

    def wrap(
        self,
        net: nn.Module,
        image: Images,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> SelfEnsemble:
        """Return a self-ensemble whose backbone is the net with a widened first layer."""
        if any(isinstance(part, SelfEnsemble) for part in net.modules()):
            raise UsageError(
                "multires starts from a net for plain images, not from a self-ensemble; use another net."
            )
        stack = self.stack(image.shape[2])
        count, shape = len(stack.resolutions), (self.enlarge, self.enlarge) if self.enlarge else image.shape[2:]
        shown = image.new_zeros(1, image.shape[1], *shape)
        widen(net, shown, count, self.stem)
        layers = self.layers.split("+") if self.layers else default_layers(net, shown.repeat(1, count, 1, 1))
        return SelfEnsemble(
            net,
            stack,
            layers,
            image,
            pooled=self.pooled,
            size=self.enlarge,
            mean=mean or (0.0,),
            std=std or (1.0,),
        )

    def set_aggregator(self, net: nn.Module, text: str) -> None:
        """Set the aggregator of the self-ensemble."""
        ensemble = self_ensemble(net)
        parse_aggregator(text)(torch.zeros(1, len(ensemble.layers) + 1, 2))
        ensemble.combine = text

    def supports_member_parallel(self) -> bool:
        """Return True: members are independent of each other."""
        return True

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return Adam, which does not change weights without a gradient."""
        return torch.optim.Adam(parameters, lr=plan.lr)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of every member's backbone, or of its probes."""
        epochs = min(max(round(self.probing * plan.epochs), 1), plan.epochs - 1)
        part = BACKBONE if batch.step < (plan.epochs - epochs) * plan.steps_per_epoch else PROBES
        total = batch.x.new_zeros(())
        for number, net in enumerate(nets, batch.process_group.first):
            ensemble = self_ensemble(net)
            attacks = part == BACKBONE and self.attack != "none"
            x = self._attacked(net, ensemble, batch, number) if attacks else batch.x
            with ensemble.training_part(part, _draw(batch, f"stack{number}")):
                output = net(x)
            if part == BACKBONE:
                loss, weight = F.cross_entropy(output, batch.y), 1
            else:
                # The loss is the mean over the probes; the weight gives each the gradient of a loss of its own.
                loss, weight = F.nll_loss(output, batch.y), len(ensemble.probes)
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total / len(nets)

    def _attacked(self, net: nn.Module, ensemble: SelfEnsemble, batch: Batch, number: int) -> Images:
        """Return adversarial images of a backbone; every gradient has new random numbers."""
        threat, draws = ThreatModel.parse(self.threat), itertools.count()
        single = self.attack == "fgsm"

        def loss(x: Images) -> Tensor:
            with ensemble.training_part(BACKBONE, _draw(batch, f"attack{number}").at(restart=next(draws))):
                return F.cross_entropy(net(x), batch.y, reduction="none")

        start = batch.x if single else ensemble_utils.random_start(batch.x, threat, batch.rng)
        steps, step_size = (1, 1.0) if single else (self.steps, self.step_size.share(float(threat.eps)))
        with ensemble_utils.batch_norm_policy([net], "frozen"):
            return ensemble_utils.ascend(loss, start, batch.x, threat, steps=steps, step_size=step_size)


def _draw(batch: Batch, what: str) -> RowRng:
    return replace(batch.rng, stream=f"{batch.rng.stream}/{what}")


def _heights(text: str) -> tuple[int, ...]:
    parts = text.split("+")
    if len(parts) > MAX_RESOLUTIONS or not all(part.isdecimal() and len(part) < 5 for part in parts):
        raise UsageError(
            f"multires: resolutions={text[:30]} must be at most {MAX_RESOLUTIONS} heights of up to 9999 pixels, "
            "joined by plus signs, e.g. 32+16+8+4."
        )
    return tuple(map(int, parts))


def _range(name: str, text: str) -> Range:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise UsageError(f"multires: {name}={text} must be a range LOW:HIGH, e.g. 0.7:1.5.") from None
