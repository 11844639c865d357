"""The classifier: images on [0, 1] go in, logits come out; defense, resizing and normalisation happen inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.errors import ModelError, RobustkitError, UsageError
from robustkit.core.isolation import no_exit, switch_mode
from robustkit.core.preprocess import Preprocess
from robustkit.core.shapes import Images, Logits
from robustkit.models.bare import bare, with_numbers
from robustkit.models.ensembles.mixture import Mixture
from robustkit.models.failures import described, is_out_of_memory
from robustkit.models.fingerprint import (
    callable_identity,
    combined_sha256,
    qualified_name,
    state_sha256,
)
from robustkit.models.net_call import NetCall
from robustkit.models.options import read_binary
from robustkit.models.outputs import LogitsReader
from robustkit.models.shape_search import taken_instead
from robustkit.registry import spec


class Classifier(nn.Module):
    """A net with everything between images on [0, 1] and its logits.

    Attributes:
        net: Maps resized and normalised images to its output.
        string: How to load the same classifier again, from any folder.
        size: Height and width that images are resized to, in pixels; None leaves them.
        num_classes: Number of logits K, where known before a forward pass.
        in_channels: Number of channels of its images, where known.
        defenses: Applied before all this, each a call `(model, images) -> logits`; an image meets the
            first one first.
        preprocess: How the net wants image files read, where known.
        reader: Finds the logits in what the net returns.
        trust_code: Whether loading it again by its string may run Python code that a run folder names.
        notes: What the user should know of how it was loaded, a sentence each.
        layout: Memory layout of the images that the net is given.
    """

    net: nn.Module | Callable[[torch.Tensor], object]
    mean: torch.Tensor | None
    std: torch.Tensor | None

    def __init__(
        self,
        net: Callable[[torch.Tensor], object],
        *,
        string: str,
        identity: Mapping[str, object],
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        size: tuple[int, int] | None = None,
        num_classes: int | None = None,
        in_channels: int | None = None,
        defenses: Sequence[Callable[[Callable[[Images], Logits], Images], Logits]] = (),
        preprocess: Preprocess | None = None,
        class_names: tuple[str, ...] | None = None,
        output: str | None = None,
        binary: str | None = None,
        trust_code: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        """Wrap a net, in the train or eval mode that it is in.

        Args:
            net: A module, or any callable on images.
            string: How to load it again.
            identity: JSON values that determine the net beside its tensors.
            mean: Subtracted from each channel, in [0, 1] pixel units; one number serves every channel.
            std: Divides each channel afterwards; one number serves every channel.
            size: Height and width to resize to, in pixels.
            num_classes: Number of logits K, where known.
            in_channels: Number of channels of its images, where known.
            defenses: Registered defenses, outermost first.
            preprocess: How the net wants image files read, where known.
            class_names: What its classes are called, in its order, where known.
            output: Where the logits are in what the net returns; None where that is clear.
            binary: How one number per image is read: `logit` or `probability` (see `LogitsReader`).
            trust_code: Whether it was loaded with the leave to run code that a run folder names.
            notes: What the user should know of how it was loaded, a sentence each.
        """
        super().__init__()
        self.net = net
        self.string = string
        self.size = size
        self.num_classes = num_classes if binary is None else 2
        self.in_channels = in_channels
        self.defenses = tuple(defenses)
        self.preprocess = preprocess
        self.notes = tuple(notes)
        self.class_names = class_names
        self.reader = LogitsReader(string, output, binary, self.num_classes)
        self.trust_code = trust_code
        self.layout = torch.contiguous_format
        self.net_call = NetCall()
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)
        self._identity = {**identity, "mean": mean, "std": std, "size": size}
        chosen = {"output": output, "binary": binary}
        self._identity |= {name: value for name, value in chosen.items() if value is not None}
        if defenses:
            self._identity["defenses"] = [
                {name: value for name, value in spec(defense).items() if name != "string"} for defense in defenses
            ]
        self.training = isinstance(net, nn.Module) and getattr(net, "training", False)

    @property
    def weights_sha256(self) -> str:
        """SHA-256 over the net's tensors as they are now, or the net's own `weights_sha256` if it has one."""
        own: str | None = getattr(self.net, "weights_sha256", None)
        return own or state_sha256(self.net)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that determines the logits, as it is now; where the files lie is not in it."""
        return combined_sha256({**self._identity, "weights": self.weights_sha256})

    def with_net(self, net: nn.Module) -> Classifier:
        """Return the same around another net that computes the same function."""
        mean, std = (None if value is None else tuple(value.flatten().tolist()) for value in (self.mean, self.std))
        twin = Classifier(
            net,
            string=self.string,
            identity=self._identity,
            mean=mean,
            std=std,
            size=self.size,
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            defenses=self.defenses,
            preprocess=self.preprocess,
            trust_code=self.trust_code,
            notes=self.notes,
            class_names=self.class_names,
        )
        twin.reader = replace(self.reader)
        twin.net_call, twin.layout = self.net_call, self.layout
        switch_mode(twin, self.training)
        return twin.to(None if self.mean is None else self.mean.device)

    def expect(self, classes: int | None) -> Classifier:
        """Set how many classes the data has, which helps to find the logits; return the classifier."""
        self.reader.classes = self.num_classes or classes
        return self

    def forward(self, images: Images, layout: torch.memory_format | None = None) -> Logits:
        """Return the logits, in float32 or float64, of images on [0, 1].

        Args:
            images: (B C H W), in any memory layout.
            layout: the memory layout in which the net gets them; None for `self.layout`.

        Raises:
            UsageError: The images have a shape that the net or its normalisation does not take, or its
                output is not one row of at least two logits per image.
            ModelError: The net's code failed for another reason.
        """
        predict = partial(self._undefended, layout=layout or self.layout)
        for defense in reversed(self.defenses):
            predict = partial(defense, predict)
        return predict(images)

    def _undefended(self, images: Images, layout: torch.memory_format) -> Logits:
        x = self._prepared(images)
        try:
            with no_exit(f"model {self.string!r}"):
                return self.net_call(self.net, x, layout, self._reader)
        except Exception as error:
            if isinstance(error, RobustkitError) or is_out_of_memory(error):
                raise
            raise self._failure(error, images) from error

    def _failure(self, error: Exception, images: Images) -> RobustkitError:
        """Return what is to be said of an error in the net: that it is the images' shape only if another works."""
        shape = tuple(images.shape[1:])
        instead = None
        if len(shape) == 3 and not self.net_call.has_worked:
            instead = taken_instead(self.net, shape, self._takes)
        if instead is None:
            return ModelError(f"model {self.string!r} failed with {described(error)}; correct its code.")
        resize = ", or write size=N to resize them" if instead[0] == shape[0] else ""
        return UsageError(
            f"model {self.string!r} does not take images of shape {shape} but of {instead}: give it the data it "
            f"was made for{resize}; it failed with {described(error)}."
        )

    def _takes(self, shape: tuple[int, int, int]) -> bool:
        """Return whether the net takes images of a shape (C H W) in the place of those that it is given."""
        place = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(place)
        with torch.no_grad():
            return self.net_call.takes(self.net, images, self._reader)

    def _prepared(self, images: Images) -> torch.Tensor:
        """Return images resized and normalised."""
        x = images
        if self.size is not None and x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        return self._normalised(x)

    @property
    def _reader(self) -> LogitsReader | None:
        """What finds the logits in the net's output; None for a mixture, which returns logits."""
        return None if isinstance(self.net, Mixture) else self.reader

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and value.shape[1] not in (1, x.shape[1]):
                raise UsageError(
                    f"model {self.string!r} has {value.shape[1]} numbers as {name} but the images have "
                    f"{x.shape[1]} channels: write one number per channel, or one for all."
                )
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        return x


def as_classifier(model: object, *, output: str | int | None = None, binary: str | None = None) -> Classifier:
    """Return a model as a classifier without normalisation, in the train or eval mode that it is in.

    Args:
        model: Any callable on images on [0, 1]; a classifier is returned as it is.
        output: Which entry of what it returns are the logits: a key, an attribute or an index; None where that is
            clear (see `LogitsReader`).
        binary: `logit` or `probability` for a model that returns one number per image, that of class 1.

    Raises:
        UsageError: The model is not callable, or `binary` is something else.
    """
    if isinstance(model, Classifier):
        if output is not None or binary is not None:
            raise UsageError(
                f"{model.string!r} is loaded already: write output= and binary= in the query of its string."
            )
        return model
    if isinstance(model, type):
        raise UsageError(f"{model.__name__} is a class: give an instance of it, {model.__name__}(...).")
    if not callable(model):
        advice = "load_model(...) of it" if isinstance(model, str) else "a function from images to logits"
        raise UsageError(f"a model cannot be of type {type(model).__name__}: give a torch.nn.Module or {advice}.")
    model = bare(model)
    model = with_numbers(model, f"python:{qualified_name(model)}")
    num_classes = getattr(model, "num_classes", None)
    return Classifier(
        model,
        string=f"python:{qualified_name(model)}",
        identity=callable_identity(model),
        num_classes=num_classes if isinstance(num_classes, int) else None,
        output=None if output is None else str(output),
        binary=None if binary is None else read_binary(binary),
    )


def _per_channel(value: tuple[float, ...] | None) -> torch.Tensor | None:
    return None if value is None else torch.tensor(value).view(1, -1, 1, 1)
