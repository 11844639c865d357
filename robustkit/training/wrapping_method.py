"""Base class of the training methods that put modules around the net of a model string."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import nn

from robustkit.core.shapes import Images
from robustkit.training.method import Method


class WrappingMethod(Method):
    """A training method that trains and stores a larger module in place of the net."""

    __slots__ = ()

    @abstractmethod
    def wrap(
        self,
        net: nn.Module,
        image: Images,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> nn.Module:
        """Return the module that is trained and stored in place of the net.

        It takes images in [0, 1] and normalises them itself. New weights come from torch's generator. When a run
        is loaded `wrap` is called again, and the stored weights and normalisation are loaded into its result.

        Args:
            net: the net of the model string; it may be changed in place.
            image: one image (1 C H W) of the size that the net is trained on.
            mean: mean of the net's normalisation for each channel, if it has one.
            std: standard deviation of the net's normalisation for each channel, if it has one.
        """

    @abstractmethod
    def set_aggregator(self, net: nn.Module, text: str) -> None:
        """Change how the predictors inside a module made by `wrap` are combined.

        Raises:
            UsageError: if `text` is not an aggregator of that many predictors.
        """
