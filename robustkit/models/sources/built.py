"""What a source of nets (the zoo, timm, torchvision, Python code) hands to the loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from robustkit.core.preprocess import Preprocess

if TYPE_CHECKING:
    import torch

    from robustkit.models.weights.fitting import Convert

# What a model gives to attacks.
GRADIENT, SCORES = "gradient", "scores"


@dataclass(frozen=True)
class Built:
    """A net before the weights file is put into it.

    Attributes:
        net: Maps normalised images to its output.
        arch: How to write the architecture so that it is found from any folder.
        identity: What determines the net beside its tensors: its name, keyword arguments, hash of its code.
        mean: Channel means of its training, by the source's own record.
        std: Channel deviations, likewise.
        num_classes: Classes of its last layer, where the source knows.
        in_channels: Channels of its images, where the source knows.
        preprocess: How it wants image files read, where the source knows.
        convert: What turns the names of other libraries' checkpoints into the net's, where the source has it.
        class_names: What its classes are called, in its order, where the source knows.
        batch: The only number of images that it takes in a pass; None if it takes any.
        fields: Fields of the query that are written in another way to be found from any folder.
        access: `gradient`, or `scores` for a net that is known to have no gradient.
        notes: What the user should know of it, a sentence each.
    """

    net: Callable[[torch.Tensor], object]
    arch: str
    identity: Mapping[str, object] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    num_classes: int | None = None
    in_channels: int | None = None
    preprocess: Preprocess | None = None
    convert: Convert | None = None
    class_names: tuple[str, ...] | None = None
    batch: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    access: str = GRADIENT
    notes: tuple[str, ...] = ()
