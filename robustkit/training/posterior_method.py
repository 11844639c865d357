"""Base class of the training methods whose result is a set of posterior samples of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from robustkit.core.errors import did_you_mean
from robustkit.training.method import Method, Plan

State = Mapping[str, Tensor]
# The running statistics that a sample contains: those of its step, or new ones over the training images.
BATCH_NORM = ("keep", "re-estimate")


class PosteriorMethod(Method):
    """A training method that writes `posterior.safetensors` instead of the last weights of the net.

    During training the loop keeps the state after each step for which `keeps` is true. `samples` turns the kept
    states into posterior samples at the end.

    Args:
        batch_norm: `keep` or `re-estimate`: how a sample gets its running statistics.
    """

    __slots__ = ()

    batch_norm: str = "keep"

    def check_plan(self, plan: Plan) -> None:
        """Refuse an unknown `batch_norm`, and what `Method.check_plan` refuses."""
        if self.batch_norm not in BATCH_NORM:
            raise did_you_mean("batch_norm", self.batch_norm, BATCH_NORM)
        Method.check_plan(self, plan)

    def noisy(self, step: int, plan: Plan) -> bool:
        """Return whether the optimizer adds noise in a step."""
        return False

    def keeps(self, step: int, plan: Plan) -> bool:
        """Return whether the state after a step is kept for `samples`."""
        return False

    def cycle(self, step: int, plan: Plan) -> int:
        """Return the cycle of the learning rate that a step belongs to, from 0."""
        return 0

    def samples(self, kept: Iterable[State], plan: Plan) -> Iterator[State]:
        """Yield the posterior samples. Called once, after the last step.

        Args:
            kept: the kept states in order: tensors on the CPU by their names in the net. They are loaded one by
                one, so a generator that uses one at a time needs the memory of one.
            plan: the size of the run.
        """
        yield from kept


def kept_steps(method: Method, plan: Plan, steps: int) -> list[int]:
    """Return which of the first `steps` steps have a kept state; none with a method that has no posterior."""
    if not isinstance(method, PosteriorMethod):
        return []
    return [step for step in range(steps) if method.keeps(step, plan)]
