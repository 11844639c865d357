"""Several nets as one: an aggregator combines their logits, by default as in Bayesian prediction."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.gradients import vector_jacobian
from robustkit.core.shapes import Images, Logits
from robustkit.models.ensembles.aggregation import Aggregator, parse_aggregator, probabilities
from robustkit.models.outputs import LogitsReader
from robustkit.posterior import Posterior

DEFAULT_AVERAGE = "probabilities"


def joined_by(text: str | None, count: int, where: str) -> Aggregator:
    """Return the aggregator of `combine=` for so many nets.

    Raises:
        UsageError: if there is none of that name, or it does not work for so many.
    """
    if text is not None and count < 2:
        raise UsageError(f"{where} is one net: combine={text} joins several; leave it out.")
    aggregate = parse_aggregator(DEFAULT_AVERAGE if text is None else text)
    aggregate(torch.zeros(1, count, 2))
    return aggregate


def combine_identity(text: str | None) -> dict[str, str]:
    """Return the part of a model's identity that `combine=` adds; nothing for the default."""
    return {} if text in (None, DEFAULT_AVERAGE) else {"combine": str(text)}


class Mixture(nn.Module, ABC):
    """Several nets. As a model it predicts with all of them; `at` returns one.

    Attributes:
        aggregate: combines the logits of all nets (B N K) to logits (B K).
        reader: finds the logits in the output of a net.
    """

    def __init__(self, aggregate: Aggregator = probabilities, reader: LogitsReader | None = None) -> None:
        """Set the aggregator, and the reader that finds the logits in each output."""
        super().__init__()
        self.aggregate = aggregate
        self.reader = reader or LogitsReader("a net of an ensemble")
        self._readers = dict[int, LogitsReader]()

    @abstractmethod
    def __len__(self) -> int:
        """How many nets."""

    @abstractmethod
    def at(self, number: int) -> nn.Module:
        """Return one of the nets, ready; it is valid until another net that shares its memory is requested."""

    @abstractmethod
    def place(self, number: int) -> nn.Module:
        """Return the module that one of the nets is in."""

    def one(self, number: int, x: Images) -> Logits:
        """Return one net's logits (B K), in float32 or wider."""
        reader = self._readers.setdefault(number, replace(self.reader))
        return reader.read(self.at(number)(x), len(x))

    def stacked(self, x: Images) -> Tensor:
        """Return all nets' logits (B N K), in float32 or wider."""
        # A trace would use the last sample's weights for all samples, because they change in place.
        if not isinstance(x, Tensor):
            raise TypeError("a mixture of nets is not to be traced.")
        logits = [self.one(number, x) for number in range(len(self))]
        shapes = {one.shape[1:] for one in logits}
        if len(shapes) > 1:
            counts = " and ".join(str(count) for (count,) in sorted(shapes))
            raise UsageError(f"the nets of an ensemble return {counts} logits: join models of the same classes.")
        return torch.stack(logits, 1)

    def forward(self, x: Images) -> Logits:
        """Return the combined logits (B K)."""
        return self.aggregate(self.stacked(x))


class Members(Mixture):
    """Nets that are all in memory, as an ensemble's."""

    def __init__(
        self,
        nets: Sequence[nn.Module],
        aggregate: Aggregator = probabilities,
        reader: LogitsReader | None = None,
    ) -> None:
        """Take the nets as they are."""
        super().__init__(aggregate, reader)
        self.nets = nn.ModuleList(nets)

    def with_nets(self, nets: Sequence[nn.Module]) -> Members:
        """Return the same with other nets that compute the same functions."""
        joined = copy.copy(self)
        joined._modules = {**self._modules, "nets": nn.ModuleList(nets)}
        joined._readers = dict[int, LogitsReader]()
        return joined

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

    A gradient through all of them runs every net forward again, since its weights have been replaced by then. Only
    logits are kept in between, so any aggregator works.
    """

    def __init__(
        self,
        net: nn.Module,
        posterior: Posterior,
        numbers: Sequence[int] | None = None,
        aggregate: Aggregator = probabilities,
        reader: LogitsReader | None = None,
    ) -> None:
        """Take a net of the posterior's architecture, and all samples or those of these numbers."""
        super().__init__(aggregate, reader)
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
            # Autocast caches copies of weights, which would be those of another sample.
            torch.clear_autocast_cache()
            self._inside = number
        return self.net

    def place(self, number: int) -> nn.Module:
        """Return the one net there is."""
        return self.net

    def stacked(self, x: Images) -> Tensor:
        """Return all samples' logits (B N K), in float32 or wider."""
        if isinstance(x, Tensor) and torch.is_grad_enabled() and x.requires_grad:
            return _Again.apply(x, self)  # type: ignore[no-any-return]
        return super().stacked(x)


class _Again(torch.autograd.Function):
    """Logits of all samples, whose backward pass puts each into the net once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mixture: Samples) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mixture = mixture
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return Mixture.stacked(mixture, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        mixture, total = ctx.mixture, torch.zeros_like(x)
        for number in range(len(mixture)):
            with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
                at = x.detach().requires_grad_()
                logits = mixture.one(number, at)
            total += vector_jacobian(logits, at, gradients[0][:, number])
        return total, None
