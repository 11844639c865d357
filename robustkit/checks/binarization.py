"""Test of an attack by planted adversarial points (binarization).

Zimmermann et al. 2022, "Increasing Confidence in Adversarial Robustness Evaluations" (NeurIPS).
For each image the model's last layer is replaced by a linear classifier on its features, which separates points
well inside the ball from one point that was planted on the ball's surface. So there is an adversarial point by
construction; if an attack does not find it, its failures on other images prove nothing. The features of an
ensemble are those of all members.

Departures from the authors' code: a control evaluates as many random points as the attack queried before it had
found every planted point; the classifiers of all images are fitted and attacked in one batch, one for each row;
classes have equal weights in the fit; the boundary is moved to the planted point (their "tight" setting) unless
`tight` is false, where random points on small images do too well; in l-infinity the planted point is a corner of
the ball whose signs keep it inside the box, where theirs rescales after clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from robustkit.attack_api import Model, RowWise
from robustkit.attack_api.driver import trace_attack
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits, Mask
from robustkit.core.threat import ThreatModel
from robustkit.runs.recorded_outputs import not_recording

MIN_RATE_TO_PASS, MAX_CONTROL_RATE = 0.95, 0.5
GAP = Fraction(1, 20)
FIT_STEPS, FIT_RATE, INERTIA, BOUNDARY_POSITION, RIDGE = 1000, 0.05, 0.9, 0.999, 1e-3
# The most features of an image; those of all points around it are in memory at once.
MAX_FEATURES = 100_000


@dataclass(frozen=True)
class Binarization:
    """Shares of the n planted points that were found by the attack, and by as many random corners."""

    rate: float
    control: float
    n: int

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, or `too easy` if it passed but random points succeed as well."""
        if self.rate < MIN_RATE_TO_PASS:
            return "fail"
        return "too easy" if self.control > MAX_CONTROL_RATE else "pass"


@dataclass(frozen=True)
class BinaryProblem:
    """A binary problem for each image: a linear classifier (weights B D, bias B), and planted points (B C H W)."""

    weight: Tensor
    bias: Tensor
    witness: Images

    def logits(self, features: Tensor) -> Logits:
        """Return the logits (B 2) of each row's own classifier; label 1 is that of the planted point."""
        score = (features * self.weight).sum(1) + self.bias
        return torch.stack([-score / 2, score / 2], 1)


def binarization(
    model: Model,
    net: nn.Module,
    x: Images,
    attack: RowWise,
    threat: ThreatModel,
    *,
    rng: RowRng,
    inner: int = 199,
    tight: bool = True,
) -> Binarization:
    """Return how often an attack, with its parameters, finds the planted adversarials of images x (B C H W).

    Args:
        model: its last linear layers are replaced; everything before them is kept.
        net: the module in it that has those layers.
        x: clean images.
        attack: with the settings of the evaluation; its first attempt is run.
        threat: that of the evaluation.
        rng: random numbers, one generator per image.
        inner: points drawn within 95 % of the ball, which share the image's label.
        tight: move the boundary as near to the planted point as it can be.

    Raises:
        UsageError: if the model has no linear layer that gives its classes, or too many features, or no linear
        classifier separates the planted points from the others: then the test has no result.
    """
    ends, width = heads(model, net, x[:1])
    if width > MAX_FEATURES:
        raise UsageError(
            f"binarization: {width:,} features of an image are too many to keep those of all points around it; "
            f"at most {MAX_FEATURES:,}."
        )
    question = binary_problems(model, ends, x, threat, rng, inner, tight)

    def binary(images: Images) -> Logits:
        # A net without a gradient has one of zero.
        return question.logits(features(model, ends, images)) + 0 * images.flatten(1).sum(1, keepdim=True)

    found, queries = _attacked(attack, binary, x, threat, rng)
    corners = torch.zeros_like(found)
    with torch.no_grad():
        for draw in range(queries):
            points = edge(x, threat, rng.at(restart=1, step=draw))
            corners = corners | (binary(points).argmax(1) == 1)
            # Even with one more success so far, as many draws as queries would not reach half of the points.
            if (int(corners.sum()) + 1) * queries <= MAX_CONTROL_RATE * len(x) * (draw + 1):
                break
    return Binarization(float(found.double().mean()), float(corners.double().mean()), len(x))


def binary_problems(
    model: Model,
    ends: Sequence[nn.Module],
    x: Images,
    threat: ThreatModel,
    rng: RowRng,
    inner: int,
    tight: bool = True,
) -> BinaryProblem:
    """Return the binary problem of each image."""
    witness = edge(x, threat, rng.at(restart=2))
    within = replace(threat, eps=threat.eps * (1 - GAP))
    points = [x, *(within.random_start(x, rng.at(restart=3, step=draw)) for draw in range(inner)), witness]
    with torch.no_grad():
        inside = features(model, ends, torch.cat(points)).view(len(points), len(x), -1)
        weight, bias = fitted(inside[:-1].transpose(0, 1), inside[-1], tight)
    return BinaryProblem(weight, bias, witness)


def edge(x: Images, threat: ThreatModel, rng: RowRng) -> Images:
    """Return random points in the box, as far away as the threat allows."""
    if threat.norm == "linf":
        eps = float(threat.eps)
        sign = torch.where(rng.uniform(*x.shape[1:]) < 0.5, -1.0, 1.0).to(x.dtype)
        sign = torch.where(x + sign * eps > 1, -1.0, torch.where(x + sign * eps < 0, 1.0, sign)).to(x.dtype)
        return threat.project(x + 2 * eps * sign, x)
    far = 10 * threat.diameter(tuple(x.shape[1:]))
    direction = rng.normal(*x.shape[1:]).to(x.dtype)
    inward = torch.where(x > 0.5, -direction.abs(), direction.abs())
    return threat.project(x + far * inward / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1), x)


def fitted(inside: Tensor, planted: Tensor, tight: bool = True) -> tuple[Tensor, Tensor]:
    """Return weights (B D) and biases (B) that separate the planted points (B D) from those inside (B M D).

    Logistic regression without a penalty, from Fisher's direction on.

    Raises:
        UsageError: if a point is on the wrong side.
    """
    mean, scale = inside.mean(1, keepdim=True), inside.std((1, 2), keepdim=True).clamp(min=1e-12)
    rows, point = ((inside - mean) / scale).double(), ((planted[:, None] - mean) / scale).double()
    weight = _direction(rows, point)
    room, bias = _between(rows, point, weight)
    if (room <= 0).any():
        weight = _regressed(rows, point, weight, bias)
    room, bias = _between(rows, point, weight, BOUNDARY_POSITION if tight else 0.5)
    if (room <= 0).any():
        raise UsageError(
            f"binarization: {int((room <= 0).sum())} of {len(room)} planted points cannot be separated from "
            f"their neighbours by {rows.shape[2]} features: use fewer inner points."
        )
    size = room / (1 if tight else 2)
    weight, bias = weight / size[:, None], bias / size
    plain = weight / scale[:, 0].double()
    return plain.to(inside.dtype), (bias - (plain * mean[:, 0].double()).sum(1)).to(inside.dtype)


def _direction(rows: Tensor, point: Tensor) -> Tensor:
    """Return Fisher's directions (B D), of length 1, from rows (B M D), of mean 0, to points (B 1 D).

    Solved among the M rows, not the D features, of which a self-ensemble has tens of thousands.
    """
    count = rows.shape[1]
    ridge = RIDGE * count * torch.eye(count, dtype=rows.dtype, device=rows.device)
    coefficients = torch.linalg.solve(rows @ rows.mT + ridge, rows @ point.mT)
    weight = (point - coefficients.mT @ rows)[:, 0]
    unit: Tensor = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit


def _regressed(rows: Tensor, point: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the weights of a logistic regression that starts at these."""
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(FIT_STEPS):
        low = ((rows @ weight[:, :, None])[:, :, 0] + bias[:, None]).sigmoid() / rows.shape[1]
        high = -(-((point[:, 0] * weight).sum(1) + bias)).sigmoid()
        slopes = [(low[:, :, None] * rows).sum(1) + high[:, None] * point[:, 0], low.sum(1) + high]
        speed = [INERTIA * before - FIT_RATE * slope for before, slope in zip(speed, slopes, strict=True)]
        weight, bias = weight + speed[0], bias + speed[1]
    return weight


def heads(model: Model, net: nn.Module, image: Images) -> tuple[list[nn.Linear], int]:
    """Return the linear layers that return the classes in a pass over an image (1 C H W), and their features.

    There is one layer for each member, and the number of features is that of all.

    Raises:
        UsageError: if there is none.
    """
    ran = dict[nn.Linear, int]()
    linear = [part for part in net.modules() if isinstance(part, nn.Linear)]
    handles = [
        part.register_forward_pre_hook(lambda module, args: ran.update({module: args[0][0].numel()}))
        for part in linear
    ]
    try:
        with torch.no_grad(), not_recording():
            classes = model(image).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    found = [part for part in ran if part.out_features == classes]
    if not found:
        raise UsageError("binarization: the model has no linear layer whose input could be read as features.")
    return found, sum(ran[part] for part in found)


def features(model: Model, ends: Sequence[nn.Module], x: Images) -> Tensor:
    """Return the inputs of the heads for images x, concatenated (B D), by a pass through the whole model.

    Raises:
        UsageError: if a head is not run once for each image.
    """
    observe = getattr(model, "observe", None)
    return observe(partial(_seen, ends), x) if observe else _seen(ends, model, x)


def _seen(ends: Sequence[nn.Module], model: Model, x: Images) -> Tensor:
    seen: list[list[Tensor]] = [[] for _ in ends]
    handles = [
        head.register_forward_pre_hook(lambda module, args, part=part: part.append(args[0]))
        for head, part in zip(ends, seen, strict=True)
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    try:
        parts = [torch.cat(part) if part else x[:0] for part in seen]
        if all(len(part) == len(x) for part in parts):
            return torch.cat([part.flatten(1) for part in parts], 1)
    except RuntimeError as error:
        raise UsageError("binarization: the input of a linear layer cannot be read inside torch.vmap.") from error
    raise UsageError("binarization: a linear layer is not run once for each image, so its features are unknown.")


def _between(rows: Tensor, point: Tensor, weight: Tensor, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the gap between the highest row and the point, and the bias of a boundary at this share of it."""
    highest = (rows @ weight[:, :, None])[:, :, 0].amax(1)
    top = (point[:, 0] * weight).sum(1)
    return top - highest, -(highest + share * (top - highest))


def _attacked(attack: RowWise, binary: Model, x: Images, threat: ThreatModel, rng: RowRng) -> tuple[Mask, int]:
    """Return the rows in which any query point of the attack gets label 1, and how many queries that took.

    Rows keep their position, because each has its own classifier.
    """
    goal = Goal(torch.zeros(len(x), dtype=torch.long, device=x.device))
    fooled = trace_attack(attack, binary, x, goal, threat, rng, enough=True).fooled
    return fooled.any(1), fooled.shape[1]
