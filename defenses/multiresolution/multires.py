"""A multi-resolution self-ensemble (Fort & Lakshminarayanan 2024, arXiv:2408.05446): everything everywhere.

Constants are those of the authors' notebook. All probes are trained side by side on batches as large as the
backbone's, where the notebook trains one after the other on 64 images at a time; the backbone's running statistics
stay meanwhile, which drift there. Attacks see batch norms in eval mode, as published, while dropout, which the
notebook's net has not, stays on. Zhang et al. (2024, arXiv:2411.14834) break it: a high number of an attack on the
answer itself is masking.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.limits import Limits
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.defenses.multiresolution.probes import usual_layers
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
MOST_HEIGHTS = 16


@method("multires", paper="arXiv:2408.05446")
@dataclass(frozen=True, slots=True)
class MultiRes(WrappingMethod):
    """Trains a backbone on stacks, then for the last `probing` of the epochs linear probes at its `layers`.

    `preset` is `notebook` or `paper`; `resolutions` (32+16+8+4), `noise`, `jitter` (pixels), `contrast` (0.7:1.5)
    and `colour` change it. `stem` is `fresh`, or `inflated` from the net's weights; stacks are enlarged to
    `enlarge` pixels. `attack` makes the backbone's images adversarial: `none`, `fgsm`, or `pgd` in `steps`.
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
        """Refuse unknown words and impossible constants."""
        for field, known in (("preset", tuple(PRESETS)), ("stem", STEMS), ("attack", ATTACKS)):
            if getattr(self, field) not in known:
                raise did_you_mean(field, getattr(self, field), known)
        ThreatModel.parse(self.threat).bounded()
        self.stack(32)

    def default_size(self, samples: int) -> Size:
        """Return the notebook's size, which finetunes; on a small set one that learns from scratch."""
        return Size(7, 128, 3.3e-5) if samples > 5000 else Size(30, 64, 0.01)

    def check_plan(self, plan: Plan) -> None:
        """Refuse a run without epochs for both parts."""
        WrappingMethod.check_plan(self, plan)
        if plan.epochs < 2:
            raise UsageError(
                f"multires trains backbone and probes, not in --epochs {plan.epochs}; write 2 or more."
            )

    def stack(self, height: int) -> MultiResolution:
        """Return what makes stacks of images of a height."""
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
        """Return a self-ensemble whose backbone is the net, its first layer widened."""
        if any(isinstance(part, SelfEnsemble) for part in net.modules()):
            raise UsageError(
                "multires starts from a net for plain images, not from a self-ensemble; name another."
            )
        stack = self.stack(image.shape[2])
        count, shape = len(stack.resolutions), (self.enlarge, self.enlarge) if self.enlarge else image.shape[2:]
        shown = image.new_zeros(1, image.shape[1], *shape)
        widen(net, shown, count, self.stem)
        layers = self.layers.split("+") if self.layers else usual_layers(net, shown.repeat(1, count, 1, 1))
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
        """Let the self-ensemble combine its predictors by another aggregator."""
        one = self_ensemble(net)
        parse_aggregator(text)(torch.zeros(1, len(one.layers) + 1, 2))
        one.combine = text

    def supports_member_parallel(self) -> bool:
        """Return that members have nothing to do with each other."""
        return True

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return Adam; weights without a gradient stay as they are."""
        return torch.optim.Adam(parameters, lr=plan.lr)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of every member's backbone, or of its probes."""
        epochs = min(max(round(self.probing * plan.epochs), 1), plan.epochs - 1)
        part = BACKBONE if batch.step < (plan.epochs - epochs) * plan.steps_per_epoch else PROBES
        total = batch.x.new_zeros(())
        for number, net in enumerate(nets, batch.process_group.first):
            one = self_ensemble(net)
            x = self._attacked(net, one, batch, number) if part == BACKBONE and self.attack != "none" else batch.x
            with one.answering(part, _draw(batch, f"stack{number}")):
                answer = net(x)
            if part == BACKBONE:
                loss, weight = F.cross_entropy(answer, batch.y), 1
            else:
                # The mean of the probes' losses, of which each is to have a gradient as by itself.
                loss, weight = F.nll_loss(answer, batch.y), len(one.probes)
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total / len(nets)

    def _attacked(self, net: nn.Module, one: SelfEnsemble, batch: Batch, number: int) -> Images:
        """Return adversarial images of a backbone; every gradient is on a draw of its own."""
        threat, draws = ThreatModel.parse(self.threat), itertools.count()
        single = self.attack == "fgsm"

        def loss(x: Images) -> Tensor:
            with one.answering(BACKBONE, _draw(batch, f"attack{number}").at(restart=next(draws))):
                return F.cross_entropy(net(x), batch.y, reduction="none")

        start = batch.x if single else ensemble_utils.random_start(batch.x, threat, batch.rng)
        steps, step_size = (1, 1.0) if single else (self.steps, self.step_size.share(float(threat.eps)))
        with ensemble_utils.batch_norm_policy([net], "frozen"):
            return ensemble_utils.ascend(loss, start, batch.x, threat, steps=steps, step_size=step_size)


def _draw(batch: Batch, what: str) -> RowRng:
    return replace(batch.rng, stream=f"{batch.rng.stream}/{what}")


def _heights(text: str) -> tuple[int, ...]:
    parts = text.split("+")
    if len(parts) > MOST_HEIGHTS or not all(part.isdecimal() and len(part) < 5 for part in parts):
        raise UsageError(
            f"multires: resolutions={text[:30]} is none; write at most {MOST_HEIGHTS} heights of up to 9999 "
            "pixels with plus, e.g. 32+16+8+4."
        )
    return tuple(map(int, parts))


def _range(name: str, text: str) -> Range:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise UsageError(f"multires: {name}={text} is no range; write LOW:HIGH, e.g. 0.7:1.5.") from None
