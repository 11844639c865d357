"""Stochastic-gradient Langevin dynamics as optimisers, with noise by counter.

SGLD (Welling & Teh, ICML 2011), SGHMC (Chen et al. 2014, arXiv:1402.4102) and pSGLD (Li et al. 2016,
arXiv:1512.07666). Each takes the gradient of a mean loss, as plain training does, and scales the noise by the size
of the data set, so the temperature depends neither on the batch size nor on the number of batches.

Before each step the parameter groups must be given its `counter`, of which the noise is a function, and whether
it is `noisy`; `robustkit.training.loop.take_step` does this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from robustkit.sampling.noise import normal_like


class Langevin(torch.optim.SGD):
    """Gradient descent with momentum and noise: SGLD at momentum 0, SGHMC with friction 1 - momentum above it.

    Without noise, and at temperature 0, it equals `torch.optim.SGD` bit for bit. On a quadratic of curvature k the
    weights' variance converges to T / (N k) / (1 - lr k / (2 (1 + momentum))).

    The noise has a velocity of its own, in units of the weights, which is reset when steps are not noisy.
    Adding noise to the gradients is equivalent at a constant learning rate. At the small rates at the end of a
    cycle it would fill the momentum with huge gradients, which the first steps of the next cycle would apply.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        samples: int,
        temperature: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Create the optimizer.

        Args:
            params: the weights.
            lr: the learning rate, which a schedule may change in the parameter groups.
            samples: N, the size of the data set.
            temperature: T, the temperature of the posterior.
            momentum: the share of the velocity that each step keeps.
            weight_decay: precision of the normal prior, divided by N.
            seed: of the noise.
        """
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.heat, self.seed = temperature / samples, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the gradients, noisy if the groups say so."""
        super().step()
        if self.heat > 0:
            for parameter, group, noise in _noise(self.param_groups, self.seed):
                momentum, state = group["momentum"], self.state[parameter]
                push = noise.mul_(math.sqrt(2 * (1 - momentum) * group["lr"] * self.heat))
                if momentum:
                    push = state["push"] = push.add_(state["push"], alpha=momentum) if "push" in state else push
                parameter.add_(push)
        for group in self.param_groups:
            if not group["noisy"]:
                for parameter in group["params"]:
                    self.state[parameter].pop("push", None)


class PreconditionedLangevin(torch.optim.Optimizer):
    """pSGLD: each weight's step and noise divided by the root mean square of its gradients.

    As in the paper's experiments the drift by the change of the preconditioner is not included. The mean square is
    corrected for its start at 0, as in Adam; in the paper the first steps are ten times as long.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        samples: int,
        temperature: float,
        decay: float = 0.99,
        damping: float = 1e-5,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Create the optimizer; see `Langevin` for the arguments that both have.

        Args:
            params: the weights.
            lr: the learning rate.
            samples: the size of the data set.
            temperature: T of the posterior that is sampled.
            decay: the share of the mean of squared gradients that each step keeps.
            damping: added to their root.
            weight_decay: precision of the normal prior, divided by N; the preconditioner does not include it.
            seed: of the noise.
        """
        super().__init__(params, {"lr": lr, "decay": decay, "damping": damping, "weight_decay": weight_decay})
        self.heat, self.seed = temperature / samples, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the gradients, noisy if the groups say so."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._descend(parameter, group)
        if self.heat > 0:
            for parameter, group, noise in _noise(self.param_groups, self.seed):
                root = self.state[parameter]["root"]
                parameter.addcdiv_(noise, root.sqrt(), value=math.sqrt(2 * group["lr"] * self.heat))

    def _descend(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(taken=0, square=torch.zeros_like(parameter))
        state["taken"] += 1
        state["square"].lerp_(parameter.grad.square(), 1 - group["decay"])  # type: ignore[union-attr]
        mean = state["square"] / (1 - group["decay"] ** state["taken"])
        state["root"] = mean.sqrt_().add_(group["damping"])
        whole = torch.add(parameter.grad, parameter, alpha=group["weight_decay"])  # type: ignore[arg-type]
        parameter.addcdiv_(whole, state["root"], value=-group["lr"])


def _noise(groups: list[dict[str, Any]], seed: int) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
    """Yield each weight with a gradient in a noisy step, its group, and its noise."""
    moved = [
        (parameter, group)
        for group in groups
        if group["noisy"] and group["lr"] > 0
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if moved:
        noise = normal_like([parameter for parameter, _ in moved], seed, "langevin", moved[0][1]["counter"])
        for (parameter, group), drawn in zip(moved, noise, strict=True):
            yield parameter, group, drawn
