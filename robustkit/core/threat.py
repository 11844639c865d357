"""Threat models: the images that an attacker may use, a norm ball around the clean image inside the [0, 1] box."""

from __future__ import annotations

import functools
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from robustkit.core.errors import UsageError
from robustkit.core.numbers import exact, shown
from robustkit.core.projections import clip_l1, clip_l2, steepest_l1
from robustkit.core.shapes import Images, Mask, PerRow

MAX_EPS = 1e9
# Written in place of eps for minimum-norm attacks.
MINIMAL = "min"
EXAMPLE_EPS = {"linf": "8/255", "l2": "0.5", "l1": "12"}
# Floats are read as fractions with denominators up to this, such as 8/255.
MAX_DENOMINATOR = 1000

# Projects shifts (B, D), float64, onto ball and box: (shift, low, high, radius (B, 1)), where low <= 0 <= high.
Clip = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class Draws(Protocol):
    """Random numbers of a random start, independent for each row (see `robustkit.core.rng`)."""

    def uniform(self, *shape: int) -> Tensor:
        """Return draws from [0, 1), shape (B, *shape)."""

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal draws, shape (B, *shape)."""


@dataclass(frozen=True)
class ThreatModel(ABC):
    """All images within `eps` of the clean one in some norm, and inside [0, 1].

    Membership is exact: distances are computed in float64 from the stored numbers and compared with `eps` without
    tolerance, and `project` returns points that pass.

    Args:
        eps: radius, an exact fraction in pixel units of [0, 1].
        minimal: whether the attacker looks for the nearest adversarial image; `eps` is then larger than any
            distance.
    """

    eps: Fraction
    minimal: bool = field(default=False, kw_only=True)
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        """Store eps as a fraction, a float by its shortest decimal; raise UsageError for an invalid radius."""
        try:
            object.__setattr__(self, "eps", exact(self.eps))
        except ValueError as error:
            raise UsageError(
                f"threat of norm {self.norm}: eps {shown(self.eps)} {error}; write a fraction or a decimal, "
                f"e.g. {self.norm}:8/255."
            ) from None
        if self.eps < 0:
            raise UsageError(f"threat '{self}': eps must not be negative; write e.g. {self.norm}:{-self.eps}.")
        if self.eps > MAX_EPS:
            raise UsageError(f"threat of norm {self.norm}: eps is above {MAX_EPS:g}, larger than any image.")

    @staticmethod
    def parse(text: str) -> ThreatModel:
        """Return the threat written as NORM:EPS, e.g. `linf:8/255`, `l2:0.5`, `l1:12`; or as NORM:min.

        Raises:
            UsageError: for another form, norm or number.
        """
        norm, colon, number = text.strip().partition(":")
        kinds: dict[str, type[ThreatModel]] = {"linf": Linf, "l2": L2, "l1": L1}
        kind = kinds.get(norm.strip().lower())
        if kind is None or not colon:
            raise UsageError(
                f"threat {shown(text)}: write NORM:EPS with a norm of linf, l2 or l1, e.g. linf:8/255 or l2:0.5."
            )
        if number.strip().lower() == MINIMAL:
            return kind(Fraction(1 if kind is Linf else int(MAX_EPS)), minimal=True)
        try:
            eps = exact(number)
        except ValueError as error:
            raise UsageError(
                f"threat {shown(text)}: eps {shown(number)} {error}; write a fraction or a decimal, "
                f"e.g. {kind.norm}:8/255."
            ) from None
        return kind(eps)

    @staticmethod
    def of(threat: ThreatModel | str | float | tuple[str, float | str]) -> ThreatModel:
        """Return a threat from a threat, a string (see `parse`), a pair (norm, eps), or an eps in linf.

        A float close to a fraction with a small denominator, such as 8/255, is read as that fraction.

        Raises:
            UsageError: for anything else.
        """
        if isinstance(threat, ThreatModel):
            return threat
        if isinstance(threat, str):
            return ThreatModel.parse(threat)
        pair: Any = threat if isinstance(threat, (tuple, list)) else ("linf", threat)
        if len(pair) != 2 or type(pair[1]) is bool or not isinstance(pair[1], (numbers.Real, str)):
            raise UsageError(
                f"threat {threat!r}: write NORM:EPS, e.g. 'linf:8/255', or a pair such as ('l2', 0.5)."
            )
        norm, eps = pair
        if not isinstance(eps, str) and math.isfinite(eps):
            near = Fraction(float(eps)).limit_denominator(MAX_DENOMINATOR)
            eps = near if float(near) == float(eps) else eps
        return ThreatModel.parse(f"{norm}:{eps}")

    def __str__(self) -> str:
        if self.minimal:
            return f"{self.norm}:{MINIMAL}"
        decimal, levels = f"{float(self.eps):.6g}", f"{float(255 * self.eps):.6g}"
        if Fraction(decimal) == self.eps:
            return f"{self.norm}:{decimal}"
        # Parts of 8-bit levels are written as 0.3/255 rather than 1/850.
        over = "." in levels and self.eps.denominator % 17 == 0 and Fraction(levels) == 255 * self.eps
        return f"{self.norm}:{f'{levels}/255' if over else self.eps}"

    def bounded(self) -> ThreatModel:
        """Return the threat itself; raise UsageError if it is minimal."""
        if self.minimal:
            raise UsageError(
                f"threat '{self}' is a search for minimum norms, which evaluate, plan and verify support; an eps "
                f"is needed "
                f"here, e.g. {self.norm}:{EXAMPLE_EPS[self.norm]}."
            )
        return self

    def typical(self) -> ThreatModel:
        """Return a threat of the same norm with an eps that papers use."""
        return type(self)(exact(EXAMPLE_EPS[self.norm]))

    def worth(self, x_adv: Images, x: Images) -> PerRow:
        """Return the value (B) of successful points: infinity, or 1 / distance if the threat is minimal."""
        if self.minimal:
            return 1 / self.distance(x_adv, x)
        return torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)

    def distance(self, x_adv: Images, x: Images) -> PerRow:
        """Return the distance (B) of each row, float64."""
        return self._length((x_adv.double() - x.double()).flatten(1))

    def contains(self, x_adv: Images, x: Images, radius: PerRow | None = None) -> Mask:
        """Return which rows (B) are inside ball and box, exactly. NaN is outside.

        Args:
            x_adv: the points (B C H W).
            x: the clean images (B C H W).
            radius: a radius (B) for each row, if it is not eps.
        """
        inside_box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        return inside_box & (self.distance(x_adv, x) <= self._radii(x, radius))

    @abstractmethod
    def project(self, x_adv: Images, x: Images, radius: PerRow | None = None) -> Images:
        """Return the nearest points (Euclidean) in the intersection of ball and box.

        Rows inside are returned bit for bit. Other rows are inside afterwards: rounding to the image's dtype never
        increases a coordinate's distance.

        Args:
            x_adv: the points (B C H W).
            x: the clean images (B C H W).
            radius: a radius (B) for each row, if it is not eps.
        """

    def bounds(self, x: Images) -> tuple[Images, Images] | None:
        """Return the least and the largest value of each coordinate (B C H W) around clean images; None in l2, l1.

        Where there are such bounds, clamping to them is `project`.
        """
        return None

    def retract(self, x_adv: Images, x: Images, radius: PerRow | None = None) -> Images:
        """Return points in the intersection like `project`, in l2 by a faster method.

        In l2 the perturbation is scaled to the radius and then clipped to the box. This needs no sorting, but the
        result is not the nearest point.
        """
        return self.project(x_adv, x, radius)

    def _into(self, x_adv: Images, x: Images, radius: PerRow | None, clip: Clip) -> Images:
        x_adv = x_adv.to(x.dtype)
        shift = x_adv.double() - x.double()
        low, high = -x.double(), 1 - x.double()
        radii = self._radii(x, radius)
        moved = clip(shift.flatten(1), low.flatten(1), high.flatten(1), radii[:, None]).view_as(shift)
        nearest = (x.double() + moved).to(x.dtype)
        grown = (nearest.double() - x.double()).abs() > moved.abs()
        nearest = torch.where(grown, torch.nextafter(nearest, x), nearest).clamp(0, 1)
        return torch.where(per_row(self.contains(x_adv, x, radius), x), x_adv, nearest)

    @abstractmethod
    def ascent(self, gradient: Images, *, density: float = 0.0) -> Images:
        """Return the direction (B C H W) of norm 1 that increases a linear loss most; zero for a zero gradient.

        Args:
            gradient: gradient (B C H W) of the loss in the image.
            density: for l1 only, whose steepest direction is a single coordinate: the share of the coordinates,
                largest gradients first, over which the step is distributed evenly (SLIDE, arXiv:1904.13000).
        """

    def step(self, x: Images, gradient: Images, length: float, *, density: float = 0.0) -> Images:
        """Return the images after a step of this length along `ascent`; `project` must follow.

        In l1 no coordinate moves outside the box; coordinates with the next largest gradients get the rest of the
        length. So the step is the steepest one within the box.
        """
        return x + length * self.ascent(gradient, density=density)

    def step_inside(
        self, x: Images, clean: Images, gradient: Images, length: float, *, density: float = 0.0
    ) -> Images:
        """Return the images after `step`, projected onto ball and box around the clean images."""
        return self.project(self.step(x, gradient, length, density=density), clean)

    @abstractmethod
    def random_start(self, x: Images, rng: Draws) -> Images:
        """Return points drawn uniformly from the ball, then projected onto ball and box."""

    @abstractmethod
    def diameter(self, shape: tuple[int, ...]) -> float:
        """Return the largest distance between two images of this shape (C, H, W)."""

    @abstractmethod
    def _length(self, flat: Tensor) -> Tensor: ...

    def _radii(self, x: Tensor, radius: PerRow | None) -> PerRow:
        """Return the radius (B) of each row, float64."""
        if radius is None:
            return torch.full((len(x),), self.radius, dtype=torch.float64, device=x.device)
        return radius.double()

    @functools.cached_property
    def radius(self) -> float:
        """Eps rounded down to a float32 number, so that distances computed in float32 do not exceed eps either."""
        near = torch.tensor(float(self.eps), dtype=torch.float32)
        return float(near if float(near) <= self.eps else near.nextafter(torch.zeros_like(near)))

    def _shrink(self, shift: Tensor, radius: Tensor) -> Tensor:
        """Scale shifts (B, D) down to the radius (B, 1) if they exceed it, even by rounding.

        The margin covers other summation orders, as on other hardware or with another batch size.
        """
        length = self._length(shift)[:, None].clamp(min=1e-300)
        return shift * (radius * (1 - 1e-12) / length).clamp(max=1)


@dataclass(frozen=True)
class Linf(ThreatModel):
    """Every coordinate may change by at most eps."""

    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        """Refuse eps above 1, which allows every image; usually /255 was forgotten."""
        super().__post_init__()
        if self.eps > 1:
            raise UsageError(
                f"threat '{self}': eps is in pixel units of [0, 1], so above 1 it allows every image; "
                f"did you mean linf:{self.eps}/255?"
            )

    def ascent(self, gradient: Images, *, density: float = 0.0) -> Images:  # noqa: D102
        return gradient.sign()

    def random_start(self, x: Images, rng: Draws) -> Images:  # noqa: D102
        shift = (2 * rng.uniform(*x.shape[1:]) - 1) * float(self.eps)
        return self.project(x + shift.to(x.dtype), x)

    def diameter(self, shape: tuple[int, ...]) -> float:  # noqa: D102
        return 1.0

    def _length(self, flat: Tensor) -> Tensor:
        return flat.abs().amax(1)

    def project(self, x_adv: Images, x: Images, radius: PerRow | None = None) -> Images:  # noqa: D102
        return x_adv.to(x.dtype).clamp(*self._interval(x, self._radii(x, radius)))

    def bounds(self, x: Images) -> tuple[Images, Images]:  # noqa: D102
        return self._interval(x, self._radii(x, None))

    @staticmethod
    def _interval(x: Images, radii: PerRow) -> tuple[Images, Images]:
        """Return the ends of each coordinate's interval that the image's dtype can represent."""
        exact, radii = x.double(), per_row(radii, x)
        low = (exact - radii).clamp(min=0).to(x.dtype)
        high = (exact + radii).clamp(max=1).to(x.dtype)
        low = torch.where(exact - low.double() > radii, torch.nextafter(low, x), low)
        high = torch.where(high.double() - exact > radii, torch.nextafter(high, x), high)
        return low, high


@dataclass(frozen=True)
class L2(ThreatModel):
    """The Euclidean norm of the perturbation is at most eps."""

    norm: ClassVar[str] = "l2"

    def ascent(self, gradient: Images, *, density: float = 0.0) -> Images:  # noqa: D102
        return unit(gradient)

    def random_start(self, x: Images, rng: Draws) -> Images:  # noqa: D102
        # A uniform point on the sphere, without two of its coordinates, is uniform in the ball.
        size = math.prod(x.shape[1:])
        draws = rng.normal(size + 2)
        shift = float(self.eps) * draws[:, :size] / draws.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return self.project(x + shift.view(x.shape).to(x.dtype), x)

    def diameter(self, shape: tuple[int, ...]) -> float:  # noqa: D102
        return math.sqrt(math.prod(shape))

    def _length(self, flat: Tensor) -> Tensor:
        return flat.square().sum(1).sqrt()

    def project(self, x_adv: Images, x: Images, radius: PerRow | None = None) -> Images:  # noqa: D102
        def clip(shift: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
            return self._shrink(clip_l2(shift, low, high, radius), radius)

        return self._into(x_adv, x, radius, clip)

    def retract(self, x_adv: Images, x: Images, radius: PerRow | None = None) -> Images:  # noqa: D102
        def clip(shift: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
            return torch.clamp(self._shrink(shift, radius), low, high)

        return self._into(x_adv, x, radius, clip)


@dataclass(frozen=True)
class L1(ThreatModel):
    """The sum of the absolute changes is at most eps."""

    norm: ClassVar[str] = "l1"

    def ascent(self, gradient: Images, *, density: float = 0.0) -> Images:  # noqa: D102
        return steepest_l1(gradient, torch.full_like(gradient, math.inf), density)

    def step(self, x: Images, gradient: Images, length: float, *, density: float = 0.0) -> Images:  # noqa: D102
        room = torch.where(gradient > 0, 1 - x, x).clamp(min=0) / max(length, 1e-300)
        return x + length * steepest_l1(gradient, room, density)

    def random_start(self, x: Images, rng: Draws) -> Images:  # noqa: D102
        # Normalised exponentials, one more than there are coordinates, are uniform in the simplex.
        size = math.prod(x.shape[1:])
        draws = rng.uniform(2 * size + 1)
        weight = -torch.log1p(-draws[:, : size + 1])
        sign = torch.where(draws[:, size + 1 :] < 0.5, -1.0, 1.0)
        shift = float(self.eps) * sign * weight[:, :size] / weight.sum(1, keepdim=True).clamp(min=1e-30)
        return self.project(x + shift.view(x.shape).to(x.dtype), x)

    def diameter(self, shape: tuple[int, ...]) -> float:  # noqa: D102
        return float(math.prod(shape))

    def _length(self, flat: Tensor) -> Tensor:
        return flat.abs().sum(1)

    def project(self, x_adv: Images, x: Images, radius: PerRow | None = None) -> Images:  # noqa: D102
        def clip(shift: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
            return self._shrink(clip_l1(shift, low, high, radius), radius)

        return self._into(x_adv, x, radius, clip)


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """Return a (B,) tensor reshaped to (B, 1, ...) so that it broadcasts with `like`."""
    return value.view(-1, *[1] * (like.dim() - 1))


def unit(gradient: Images) -> Images:
    """Return each row divided by its Euclidean norm; zero rows stay zero."""
    # Scaled first, so that tiny gradients do not underflow when squared; the largest is then 1.
    largest = gradient.flatten(1).abs().amax(1)
    scaled = gradient / per_row(torch.where(largest == 0, 1.0, largest), gradient)
    return scaled / per_row(scaled.flatten(1).norm(dim=1).clamp(min=1), gradient)
