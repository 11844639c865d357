"""Several nets as one: the logarithm of the mean of their probabilities, as Bayesian prediction has it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.models.outputs import logits_in
from robustkit.posterior import Posterior


class Mixture(nn.Module, ABC):
    """Nets of one architecture. As a model it predicts with all of them; `at` gives one."""

    @abstractmethod
    def __len__(self) -> int:
        """How many nets."""

    @abstractmethod
    def at(self, number: int) -> nn.Module:
        """Return one of the nets, ready; one that has the place of another is good until that is asked for."""

    @abstractmethod
    def place(self, number: int) -> nn.Module:
        """Return the module that one of the nets is in."""

    def logarithms(self, number: int, x: Tensor) -> Tensor:
        """Return the logarithms of one net's probabilities (B K), in float32 or wider."""
        logits = logits_in(self.at(number)(x))
        if logits is None:
            raise TypeError("a net of a mixture returned no tensor; it must return logits (B, K).")
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithms of the mean probabilities."""
        # Traced, a loop over weights that change in place would come out as one over the last of them.
        if not isinstance(x, Tensor):
            raise TypeError("a mixture of nets is not to be traced.")
        total = self.logarithms(0, x)
        for number in range(1, len(self)):
            total = torch.logaddexp(total, self.logarithms(number, x))
        return total - math.log(len(self))


class Members(Mixture):
    """Nets that are all in memory, as an ensemble's."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        """Take the nets as they are."""
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def __len__(self) -> int:
        """How many nets."""
        return len(self.nets)

    def at(self, number: int) -> nn.Module:
        """Return one of the nets."""
        return self.nets[number]

    def place(self, number: int) -> nn.Module:
        """Return that net."""
        return self.nets[number]


class Samples(Mixture):
    """Samples of a posterior, put one after the other into one net: two nets' memory for any number of them.

    A gradient through all of them runs every net forward again, since its weights are gone by then.
    """

    def __init__(self, net: nn.Module, posterior: Posterior, numbers: Sequence[int] | None = None) -> None:
        """Take a net of the posterior's architecture, and all samples or those of these numbers."""
        super().__init__()
        self.net, self.posterior = net, posterior
        self.numbers = list(range(len(posterior)) if numbers is None else numbers)
        self._inside: int | None = None

    def __len__(self) -> int:
        """How many samples."""
        return len(self.numbers)

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the samples, whichever is in the net."""
        return self.posterior.sha256

    def at(self, number: int) -> nn.Module:
        """Return the net with a sample's weights in it."""
        if self._inside != number:
            self.posterior.put(self.net, self.numbers[number])
            self._inside = number
        return self.net

    def place(self, number: int) -> nn.Module:
        """Return the one net there is."""
        return self.net

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithms of the mean probabilities."""
        if isinstance(x, Tensor) and torch.is_grad_enabled() and x.requires_grad:
            return _Again.apply(x, self)  # type: ignore[no-any-return]
        return super().forward(x)


class _Again(torch.autograd.Function):
    """A mixture of samples whose backward pass puts each into the net once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mixture: Samples) -> Tensor:
        out = Mixture.forward(mixture, x)
        ctx.save_for_backward(x, out)
        ctx.mixture = mixture
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, out = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        mixture, total = ctx.mixture, torch.zeros_like(x)
        for number in range(len(mixture)):
            with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
                at = x.detach().requires_grad_()
                logarithms = mixture.logarithms(number, at)
            share = (logarithms.detach() - out).exp() / len(mixture)
            total += torch.autograd.grad(logarithms, at, gradients[0] * share)[0]
        return total, None
