"""Base class of the training methods: a frozen dataclass of parameters, with hooks that the training loop calls.

Every hook is a pure function of its arguments. The only state kept between steps is that of the optimizers and the
perturbation signs of methods with `BatchNeeds.memory`. Checkpoints contain both, so an interrupted run resumes bit
for bit. A method is registered with `@method(...)` in `attacks/` or `defenses/`.

Methods that store posterior samples derive from `robustkit.training.posterior_method.PosteriorMethod`, methods
that put modules around their nets from `robustkit.training.wrapping_method.WrappingMethod`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels


@dataclass(frozen=True)
class Size:
    """Default training budget of a method.

    Args:
        epochs: passes over the training set.
        batch_size: images per step.
        lr: the largest learning rate.
        members: nets trained side by side.
    """

    epochs: int
    batch_size: int
    lr: float
    members: int = 1


@dataclass(frozen=True)
class Plan:
    """The size of a run, which every hook receives.

    Args:
        samples: N, the number of images in the training set.
        classes: K, the number of classes.
        batch_size: images per step, summed over all processes; at most `samples`.
        epochs: passes over the training set.
        lr: the largest learning rate, which schedules scale.
        members: nets trained side by side.
        seed: seed of all random numbers. The plan of one member has `seed + member`.
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
        """Full batches per epoch; the images of an incomplete last batch are left out of that epoch."""
        return self.samples // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run as a method sees them. This base class is the group of a single process.

    With data parallelism each process receives a part of every batch, with member parallelism some of the members.

    Args:
        part: the process receives the images `part`, `part + parts`, `part + 2 parts` … of every batch.
        parts: number of parts that a batch is split into.
        first: index of the first of this process's nets among all members.
    """

    part: int = 0
    parts: int = 1
    first: int = 0

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over the parts of a batch, detached; for values that are not means over images."""
        return [tensor.detach() for tensor in tensors]

    def exchanged(self, made: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor for each member of the run, in order, given those of this process's members."""
        return list(made)


@dataclass(frozen=True)
class Batch:
    """The images of one step, after augmentation.

    Args:
        x: images (B C H W) in [0, 1], on the device.
        y: labels (B).
        rng: random numbers of each image in this step, independent of the number of processes.
        step: step of the run, from 0.
        partners: with `BatchNeeds.pairs`: images (B C H W) of the same epoch in another random order.
        partner_labels: with `BatchNeeds.pairs`: labels (B) of `partners`.
        memory: with `BatchNeeds.memory`: perturbation signs (B members C H W) int8, -1, 0 or 1 for each pixel and
            0 where unknown. `backward` writes the signs for the next epoch into it.
        process_group: the processes of the run.
        carried: with `BatchNeeds.repeats` above 1: tensors that `backward` passes to its next call on this batch.
    """

    x: Images
    y: Labels
    rng: RowRng
    step: int
    partners: Images | None = None
    partner_labels: Labels | None = None
    memory: Tensor | None = None
    process_group: ProcessGroup = ProcessGroup()
    carried: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchNeeds:
    """What the training loop prepares for the batches of a method, besides images and labels.

    Args:
        pairs: give each batch `partners`.
        memory: keep a perturbation sign for each pixel, image and member from one epoch to the next.
        repeats: how many times in a row a step calls `backward` and the optimizer on the same batch.
    """

    pairs: bool = False
    memory: bool = False
    repeats: int = 1


class Method:
    """Base class of training methods: mean cross-entropy, one net, SGD.

    A subclass is a frozen dataclass with `slots=True`. It overrides the hooks that differ, most often `backward`.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, slots=True)
        ... class LabelSmoothing(Method):
        ...     smoothing: float = 0.1
        ...
        ...     def default_size(self, samples):
        ...         return Size(epochs=30, batch_size=128, lr=0.1)
        ...
        ...     def backward(self, nets, batch, plan):
        ...         losses = [F.cross_entropy(n(batch.x), batch.y, label_smoothing=self.smoothing) for n in nets]
        ...         total = torch.stack(losses).sum()
        ...         total.backward()
        ...         return total.detach() / len(nets)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
        >>> batch = Batch(x, y, RowRng(0, "method", torch.arange(4)), step=0)
        >>> plan = Plan(samples=4, classes=3, batch_size=4, epochs=1, lr=0.1)
        >>> loss = LabelSmoothing().backward([net], batch, plan)
        >>> loss.shape, net[1].weight.grad.shape
        (torch.Size([]), torch.Size([3, 12]))
    """

    __slots__ = ()

    info: ClassVar[Any]
    # Whether a run may have more than one member. The run then writes the weights of all members.
    ensembles: ClassVar[bool] = False
    # The smallest number of members for which the method is defined.
    min_members: ClassVar[int] = 1

    @property
    def momentum(self) -> float:
        """Momentum of SGD, in [0, 1)."""
        return 0.0

    @property
    def weight_decay(self) -> float:
        """Weight of the squared weights in the loss, at least 0."""
        return 0.0

    @property
    def batch_needs(self) -> BatchNeeds:
        """What the training loop prepares for each batch."""
        return BatchNeeds()

    def default_size(self, samples: int) -> Size:
        """Return the paper's epochs, batch size and learning rate, adapted to the number of training images.

        Raises:
            UsageError: if the method has no default.
        """
        raise UsageError(f"{self.info.name} has no default size; set --epochs, --batch-size and --lr.")

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that the method cannot run, before anything runs.

        Raises:
            UsageError: if the numbers do not fit the method's parameters.
        """
        if plan.members > 1 and not self.ensembles:
            raise UsageError(f"{self.info.name} trains one net, not --members {plan.members}; leave it out.")
        if plan.members < self.min_members:
            raise UsageError(
                f"{self.info.name} makes members differ from each other: --members must be at least "
                f"{self.min_members}, got {plan.members}."
            )

    def check_nets(self, nets: Sequence[nn.Module], image: Images) -> None:
        """Refuse nets that the method cannot train, before anything runs.

        Args:
            nets: the members, each takes images like `image`.
            image: one image (1 C H W).

        Raises:
            UsageError: if a net cannot be trained.
        """

    def supports_member_parallel(self) -> bool:
        """Return whether `backward` also works on some of the members, the others being in other processes.

        `batch.process_group.first` is then the index of its first net, and `batch.process_group.exchanged`
        returns what the other members computed.
        """
        return type(self).backward is Method.backward

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return the optimizer of one member, here SGD; the plan's seed is the member's."""
        return torch.optim.SGD(parameters, lr=plan.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return the learning rate of a step."""
        return plan.lr

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the loss to the parameters of every net.

        The loss is a mean over the batch: with data parallelism the gradients of all processes are averaged, and
        `batch.process_group` provides what other sums need.

        Args:
            nets: members in train mode, without gradients; they take images in [0, 1].
            batch: the images of the step.
            plan: the size of the run.

        Returns:
            The loss averaged over the nets, a detached scalar.
        """
        total = torch.stack([F.cross_entropy(net(batch.x), batch.y) for net in nets]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach() / len(nets)
