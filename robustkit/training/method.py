"""What a method of training is: a frozen dataclass of its parameters, with hooks that the training loop calls.

Every hook is a pure function of its arguments. Nothing is remembered between steps but what optimisers hold and
the signs of a method that `remembers`; a checkpoint has both, so a run that is cut off goes on bit for bit. A
method registers itself by `@method(...)` in `attacks/` or `defenses/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels

State = Mapping[str, Tensor]
# What may become of a posterior sample's running statistics.
BATCH_NORM = ("keep", "re-estimate")


@dataclass(frozen=True)
class Size:
    """How long and how large a method trains where nobody says otherwise."""

    epochs: int
    batch_size: int
    lr: float
    members: int = 1


@dataclass(frozen=True)
class Plan:
    """What all hooks may know of a run.

    Attributes:
        samples: images in the training set, N.
        classes: K.
        batch_size: images in a step, over all processes; at most `samples`.
        epochs: passes over the training set.
        lr: the largest learning rate, which schedules scale.
        members: nets trained side by side.
        seed: of every random number. A member's own plan has `seed + member`.
    """

    samples: int
    classes: int
    batch_size: int
    epochs: int
    lr: float
    members: int = 1
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; what is left over waits for the next epoch's order."""
        return self.samples // self.batch_size

    @property
    def steps(self) -> int:
        """Steps in the run."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class ProcessGroup:
    """A run's processes as a method sees them: each has a part of every batch, or some of the members. Here: one.

    Attributes:
        part: the batch is the images `part`, `part + parts`, `part + 2 parts` … of the whole one.
        parts: into how many the whole batch is dealt.
        first: the number among all members of the first of the nets that `backward` is given.
    """

    part: int = 0
    parts: int = 1
    first: int = 0

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over the parts of a batch, detached; of what is no mean over images by itself."""
        return [tensor.detach() for tensor in tensors]

    def exchanged(self, made: Sequence[Tensor]) -> list[Tensor]:
        """Return what every member of the run made, in their order, given what one's own nets did."""
        return list(made)


@dataclass(frozen=True)
class Batch:
    """The images of one step, as they are after augmentation.

    Attributes:
        x: (B C H W) in [0, 1], on the device.
        y: (B).
        rng: random numbers of each image at this step, the same on however many processes.
        step: counted from 0 over the whole run.
        partners: (B C H W), of a method with `pairs` only: images of the same epoch in an order of their own.
        partner_labels: (B), theirs.
        memory: (B members C H W) int8, of a method that `remembers` only: -1, 0 or 1 for each pixel, 0 where
            nothing is known. `backward` writes into it what the image is to come with the next time.
        peers: the other processes.
        carried: what `backward` hands on to its next call on the same batch, of a method with `replays`.
    """

    x: Images
    y: Labels
    rng: RowRng
    step: int
    partners: Images | None = None
    partner_labels: Labels | None = None
    memory: Tensor | None = None
    peers: ProcessGroup = ProcessGroup()
    carried: dict[str, Tensor] = field(default_factory=dict)


class Method:
    """Base of all methods: mean cross-entropy, one net, no posterior."""

    __slots__ = ()

    info: ClassVar[Any]
    # Whether a run may have more than one member; their nets are then what it writes.
    ensembles: ClassVar[bool] = False
    # The fewest members it makes sense with.
    fewest: ClassVar[int] = 1
    # Whether its batches come with partners: as many images again, in an order of their own.
    pairs: ClassVar[bool] = False
    # Whether it puts something around its nets, by `around`.
    wraps: ClassVar[bool] = False
    # Whether the run writes posterior samples instead of its last weights.
    posterior: ClassVar[bool] = False
    # What becomes of running statistics in a posterior sample: `keep` those at its step, or `re-estimate` them.
    batch_norm: str = "keep"

    @property
    def momentum(self) -> float:
        """Of SGD, from 0 on and below 1."""
        return 0.0

    @property
    def weight_decay(self) -> float:
        """The weight of the squared weights in the loss, from 0 on."""
        return 0.0

    def size(self, samples: int) -> Size:
        """Return the epochs, batch size and learning rate of the paper, sized to a set of so many images."""
        raise UsageError(f"{self.info.name} has no usual size; write --epochs, --batch-size and --lr.")

    def check(self, plan: Plan) -> None:
        """Refuse a plan that cannot be carried out, before anything runs."""
        if self.batch_norm not in BATCH_NORM:
            raise did_you_mean("batch_norm", self.batch_norm, BATCH_NORM)
        if plan.members > 1 and not self.ensembles:
            raise UsageError(f"{self.info.name} trains one net, not --members {plan.members}; leave it out.")
        if plan.members < self.fewest:
            raise UsageError(
                f"{self.info.name} makes members differ, and --members {plan.members} leaves none to differ from; "
                f"write --members {self.fewest} or more."
            )

    def fits(self, nets: Sequence[nn.Module], image: Images) -> None:
        """Refuse nets, which take images such as this (1 C H W), that it cannot train, before anything runs."""

    def remembers(self) -> bool:
        """Return whether each image has a sign for each pixel and member from one epoch to the next."""
        return False

    def replays(self) -> int:
        """Return how many times in a row a step calls `backward` and `update` on the same batch."""
        return 1

    def divides(self) -> bool:
        """Return whether members may be in different processes: `backward` is then given some of them.

        It tells them apart by `batch.peers.first` and has of the others what `batch.peers.exchanged` returns.
        """
        return type(self).backward is Method.backward

    def around(
        self,
        net: nn.Module,
        image: Images,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> nn.Module:
        """Return what is trained and written in a net's place, of a method that `wraps`.

        It takes images on [0, 1] and normalises them itself. New weights come from torch's generator. It is
        called again to load a run, whose weights, normalisation included, are then put into it.

        Args:
            net: as the model string gives it; it may be changed.
            image: one (1 C H W), of the size that the net is trained on.
            mean: of the net's normalisation, if it has one.
            std: likewise.
        """
        return net

    def set_aggregator(self, net: nn.Module, text: str) -> None:
        """Let what `around` made combine its predictors by another aggregator, if it has several.

        Raises:
            UsageError: if nets of this method have one predictor, or it is no aggregator of as many as they have.
        """
        raise UsageError(f"a net of {self.info.name} has one predictor: leave combine={text} out.")

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return what moves one member's weights, here SGD; the plan's seed is the member's."""
        return torch.optim.SGD(parameters, lr=plan.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return the learning rate of a step."""
        return plan.lr

    def noisy(self, step: int, plan: Plan) -> bool:
        """Return whether a step injects noise."""
        return False

    def keeps(self, step: int, plan: Plan) -> bool:
        """Return whether the weights after a step are kept, for `samples`."""
        return False

    def cycle(self, step: int, plan: Plan) -> int:
        """Return which cycle of the schedule a step is in, from 0."""
        return 0

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the loss to every net's parameters; return the loss, averaged over nets, detached.

        Nets are in train mode, with empty gradients, and take images on [0, 1]. A mean over the batch is expected:
        processes with parts of it average their gradients, and `batch.peers` has what other sums need.
        """
        total = torch.stack([F.cross_entropy(net(batch.x), batch.y) for net in nets]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach() / len(nets)

    def update(self, optimizer: torch.optim.Optimizer, step: int, plan: Plan) -> None:
        """Move one member's weights along its gradients.

        Groups are told the rate as `lr`, the step as `counter` and whether it is noisy as `noisy`, for optimisers
        whose random numbers are a function of the step.
        """
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, plan)
            group["counter"] = step
            group["noisy"] = self.noisy(step, plan)
        optimizer.step()

    def samples(self, kept: Iterable[State], plan: Plan) -> Iterator[State]:
        """Return the posterior samples, given the state of the net after each step that `keeps`, in order.

        Called once, after the last step. States hold float32 tensors on the CPU by their names in the net; one of
        them in memory at a time if this is a generator that is content with one.
        """
        yield from kept
