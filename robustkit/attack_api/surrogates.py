"""Several models as one surrogate: used together or one by one, all on the device or one at a time.

A transfer attack gets these instead of a model. Called as a model they return the combined logits; `gradient`
returns the gradient of a loss in the images, of all members together or of some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustkit.attack_api.row_wise import finite
from robustkit.attack_api.rows import Model
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError, check_choices, did_you_mean
from robustkit.core.gradients import vector_jacobian
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits
from robustkit.core.threat import per_row

ORDERS, REDRAW_TIMES = ("shuffled", "listed"), ("gradient", "step")
COMBINATIONS = ("logits", "probabilities", "loss", "gradients", "consensus")
# The combinations in which one member's gradient depends on the logits of all, and those that normalise gradients.
SHARED, SCALED = ("logits", "probabilities", "consensus"), ("gradients", "consensus")

# Of the members, (n) or (n B), or a function of their logits (n B K) at the point where the gradient is taken.
Weights = Tensor | Callable[[Tensor], Tensor] | None
# From the logits of members (n B K) to the loss's gradient in them (n B K) and the members' weights (n B).
LogitGradients = Callable[[Tensor], tuple[Tensor, Tensor]]

# A context around a member's forward pass, made from the member and the rows' random numbers.
ForwardHook = Callable[[Any, RowRng], AbstractContextManager[object]]


@dataclass(frozen=True)
class Surrogates:
    """Models with the same classes, and how they are combined.

    Attributes:
        members: each from images (B C H W) to logits (B K). One with a method `resident()`, a context manager
            that returns the model, is on the device only inside of it; members with the same `place` are there one
            at a time.
        combine: what is averaged: `logits`; `probabilities`, whose logarithms are the logits then; the `loss` of
            each member; the `gradients`, each first divided by its mean size; or, with `consensus`, the same of
            one loss for all, that of the mean of the members' logits, each first divided by its spread.
        weights: of the members, one each, above 0; by default all the same. They are made to sum to 1.
        hold: whether the graphs of all members may be in memory at once. If not, those
            of `SHARED` cost a second forward pass for each member.
        together: all members at once, (n B C H W) to (n B K), where that is faster than one after the other.
        forward_hooks: contexts around each member's forward pass.
        pool: images of the whole run (P C H W), in an order that never changes, for techniques that mix others in.
        order: of the samples of a posterior: `shuffled`, or as `listed` (see
            `robustkit.attack_api.posterior_surrogates`).
        fresh: when a posterior's next sample is used: for each `gradient`, or for each `step` of the attack.

    Example:
        >>> import torch
        >>> pair = Surrogates((lambda x: x.flatten(1), lambda x: 3 * x.flatten(1)), weights=(3, 1))
        >>> pair(torch.ones(1, 1, 1, 2))
        tensor([[1.5000, 1.5000]])
    """

    members: Sequence[Model]
    combine: str = "logits"
    weights: Sequence[float] | None = None
    hold: bool = True
    together: Callable[[Tensor], Tensor] | None = None
    forward_hooks: tuple[ForwardHook, ...] = ()
    pool: Tensor | None = None
    order: str = "shuffled"
    fresh: str = "gradient"

    def __post_init__(self) -> None:
        """Raise UsageError for values that are not valid."""
        if not self.members:
            raise UsageError("an ensemble of surrogates needs at least one model.")
        if self.combine not in COMBINATIONS:
            raise did_you_mean("combination", self.combine, COMBINATIONS)
        check_choices(self, order=ORDERS, fresh=REDRAW_TIMES)
        if self.weights is not None and (
            len(self.weights) != len(self.members) or not all(0 < weight < float("inf") for weight in self.weights)
        ):
            raise UsageError(
                f"weights {list(self.weights)} for {len(self.members)} surrogates: pass one number above 0 each."
            )

    @classmethod
    def of(cls, model: Model | Surrogates) -> Surrogates:
        """Return a model as the only member; surrogates unchanged."""
        return model if isinstance(model, Surrogates) else cls((model,))

    def __len__(self) -> int:
        return len(self.members)

    def __call__(self, x: Images) -> Logits:
        """Return the combined logits of x: of `loss` and `gradients` those of the averaged logits."""
        logits = torch.stack([self._member(number, x) for number in range(len(self))])
        return self._combined(logits, self.shares(range(len(self)), None, x))

    def select(self, members: Sequence[int]) -> Surrogates:
        """Return these members as surrogates of their own."""
        weights = None if self.weights is None else [self.weights[number] for number in members]
        return replace(self, members=[self.members[number] for number in members], weights=weights, together=None)

    def logits(self, x: Images, members: Sequence[int] | None = None) -> Tensor:
        """Return the logits of each of these members (n B K), all by default; no gradient."""
        with torch.no_grad():
            chosen = range(len(self)) if members is None else members
            return torch.stack([self._member(number, x) for number in chosen])

    def gradient(
        self,
        x: Images,
        goal: Goal,
        loss: str,
        rng: RowRng,
        members: Sequence[int] | None = None,
        weights: Weights = None,
    ) -> Images:
        """Return each row's gradient of its own loss in x.

        Args:
            x: where the gradient is taken (B C H W).
            goal: the labels, and the targets if there are any; the loss rises towards the goal.
            loss: a name of `robustkit.core.criteria`.
            rng: the rows' random numbers, for members that are changed at random.
            members: which to use, all by default.
            weights: of those, in place of the ensemble's own; not normalised.
        """
        chosen = list(range(len(self)) if members is None else members)

        def logit_gradients(logits: Tensor) -> tuple[Tensor, Tensor]:
            shares = self.shares(chosen, weights, x, logits)
            return self._slopes(logits, goal, loss, shares), shares

        if self.together is not None and not self.forward_hooks and chosen == list(range(len(self))):
            parts, shares = self._all_at_once(x, logit_gradients)
        elif self.hold and not self._share_a_place(chosen):
            parts, shares = self._held(chosen, x, rng, logit_gradients)
        elif callable(weights) or (len(chosen) > 1 and self.combine in SHARED):
            parts, shares = self._streamed_twice(chosen, x, rng, logit_gradients)
        else:
            shares = self.shares(chosen, weights, x)
            slope = partial(self._slopes, goal=goal, loss=loss)
            parts = self._streamed(chosen, x, rng, [partial(slope, shares=share[None]) for share in shares])
        if self.combine not in SCALED:
            return sum(parts[1:], parts[0])
        scaled = [per_row(share, x) * mean_normalised(part) for share, part in zip(shares, parts, strict=True)]
        return sum(scaled[1:], scaled[0])

    def shares(self, chosen: Sequence[int], weights: Weights, x: Images, logits: Tensor | None = None) -> Tensor:
        """Return the weights of these members, (n B): those passed, unchanged, or their own, which sum to 1.

        Weights that are a function of logits (n B K) use these, or those at x.
        """
        if callable(weights):
            weights = weights(self.logits(x, chosen) if logits is None else logits.detach())
        if weights is None:
            own = [1.0 if self.weights is None else float(self.weights[number]) for number in chosen]
            weights = torch.tensor(own, dtype=torch.float64) / sum(own)
        weights = weights.to(x)
        return weights if weights.dim() == 2 else weights[:, None].expand(-1, len(x))

    def _combined(self, logits: Tensor, shares: Tensor) -> Logits:
        if self.combine == "probabilities":
            return (logits.log_softmax(2) + shares[:, :, None].log()).logsumexp(0)
        if self.combine == "consensus":
            own = logit_spread(logits.detach())
            # All get the mean standard deviation, so that the loss saturates as on unscaled logits.
            mean = (shares * own).sum(0) / shares.sum(0)
            shares = mean * shares / own
        return (shares[:, :, None] * logits).sum(0)

    def _slopes(self, logits: Tensor, goal: Goal, loss: str, shares: Tensor) -> Tensor:
        """Return the gradient of each row's loss in the logits of each member, (n B K)."""
        with torch.enable_grad():
            at = logits.detach().requires_grad_()
            if self.combine in SHARED:
                value = goal.loss(self._combined(at, shares), loss).sum()
            else:
                each = torch.stack([goal.loss(member, loss) for member in at])
                value = (each if self.combine == "gradients" else shares * each).sum()
            return torch.autograd.grad(value, at)[0]

    def _all_at_once(self, x: Images, logit_gradients: LogitGradients) -> tuple[list[Images], Tensor]:
        if self.together is None:
            raise RuntimeError("these surrogates have no `together`.")
        with torch.enable_grad():
            at = x.detach().expand(len(self), *x.shape).contiguous().requires_grad_()
            logits = self.together(at)
        slopes, shares = logit_gradients(logits)
        return list(finite(vector_jacobian(logits, at, slopes))), shares

    def _share_a_place(self, chosen: Sequence[int]) -> bool:
        """Return whether some of these members share memory on the device, so that not all graphs fit."""
        places = [getattr(self.members[number], "place", None) for number in chosen]
        known = [id(memory) for memory in places if memory is not None]
        return len(set(known)) < len(known)

    def _held(
        self, chosen: Sequence[int], x: Images, rng: RowRng, logit_gradients: LogitGradients
    ) -> tuple[list[Images], Tensor]:
        with torch.enable_grad():
            points = [x.detach().requires_grad_() for _ in chosen]
            answers = [self._member(number, at, rng) for number, at in zip(chosen, points, strict=True)]
        slopes, shares = logit_gradients(torch.stack(answers))
        parts = [_input_gradient(*each) for each in zip(answers, points, slopes, strict=True)]
        return parts, shares

    def _streamed_twice(
        self, chosen: Sequence[int], x: Images, rng: RowRng, logit_gradients: LogitGradients
    ) -> tuple[list[Images], Tensor]:
        """Return the same with one graph at a time, where gradients or weights depend on all members."""
        with torch.no_grad():
            slopes, shares = logit_gradients(torch.stack([self._member(number, x, rng) for number in chosen]))
        return self._streamed(chosen, x, rng, [partial(_constant, slope) for slope in slopes]), shares

    def _streamed(
        self, chosen: Sequence[int], x: Images, rng: RowRng, slopes: Sequence[Callable[[Tensor], Tensor]]
    ) -> list[Images]:
        """Return each member's part with one graph at a time; `slopes` map logits (1 B K) to gradients (1 B K)."""
        parts = []
        for number, slope in zip(chosen, slopes, strict=True):
            with torch.enable_grad(), self._resident(number) as model:
                at = x.detach().requires_grad_()
                answer = self._forward(number, model, at, rng)
                parts.append(_input_gradient(answer, at, slope(answer[None])[0]))
        return parts

    def _member(self, number: int, x: Images, rng: RowRng | None = None) -> Logits:
        with self._resident(number) as model:
            return self._forward(number, model, x, rng)

    def _forward(self, number: int, model: Model, x: Images, rng: RowRng | None) -> Logits:
        if rng is None or not self.forward_hooks:
            return model(x)
        # Members of one architecture get different random numbers.
        rng = replace(rng, stream=f"{rng.stream}/member{number}")
        with ExitStack() as stack:
            for hook in self.forward_hooks:
                stack.enter_context(hook(model, rng))
            return model(x)

    @contextmanager
    def _resident(self, number: int) -> Iterator[Model]:
        member = self.members[number]
        if hasattr(member, "resident"):
            with member.resident() as model:
                yield model
        else:
            yield member


def logit_spread(logits: Tensor) -> Tensor:
    """Return the standard deviation of logits (… K) over classes, (…); 1 where they are all the same."""
    deviation = (logits - logits.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    return torch.where(deviation > 0, deviation, 1)


def mean_normalised(gradient: Images) -> Images:
    """Return each row divided by its mean absolute value, whatever its size; zero where the row is zero."""
    rows = gradient.flatten(1)
    # Divided by the largest first, so that nothing underflows in the mean.
    largest = rows.abs().amax(1)
    unit = gradient / per_row(torch.where(largest > 0, largest, 1), gradient)
    mean = unit.flatten(1).abs().mean(1)
    return unit / per_row(torch.where(mean > 0, mean, 1), gradient)


def _input_gradient(answer: Logits, at: Images, slope: Tensor) -> Images:
    """Return the gradient in the images; zero where the logits do not depend on them differentiably."""
    if not answer.requires_grad:
        return torch.zeros_like(at)
    return finite(vector_jacobian(answer, at, slope.to(answer.dtype)))


def _constant(slope: Tensor, logits: Tensor) -> Tensor:
    """Return the slope of other logits as a constant."""
    return slope[None]
