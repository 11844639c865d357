"""The classifier: maps images on [0, 1] to logits, with defense, resizing and normalisation inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from robustkit.core.errors import UsageError
from robustkit.core.isolation import switch_mode
from robustkit.core.preprocess import Preprocess
from robustkit.core.shapes import Images, Logits
from robustkit.models.fingerprint import (
    callable_identity,
    combined_sha256,
    qualified_name,
    state_sha256,
)
from robustkit.models.maite import MaiteNet, is_maite
from robustkit.models.options import read_binary
from robustkit.models.outputs import LogitsReader
from robustkit.models.prepared_net import PreparedNet
from robustkit.models.sources.built import GRADIENT
from robustkit.registry import spec


class Classifier(PreparedNet):
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
        notes: Messages to the user about how it was loaded, a sentence each.
        access: `gradient`, or `scores` for a model that is known to have no gradient.
        layout: Memory layout of the images that the net is given.
    """

    net: nn.Module | Callable[[torch.Tensor], object]

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
            class_names: The names of its classes, in its order, if known.
            output: Where the logits are in what the net returns; None where that is clear.
            binary: How one number per image is read: `logit` or `probability` (see `LogitsReader`).
            trust_code: Whether it was loaded with permission to run code that a run folder names.
            notes: What the user should know of how it was loaded, a sentence each.
        """
        num_classes = num_classes if binary is None else 2
        reader = LogitsReader(string, output, binary, num_classes)
        super().__init__(net, string=string, mean=mean, std=std, size=size, defenses=defenses, reader=reader)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.preprocess = preprocess
        self.notes = tuple(notes)
        self.access = GRADIENT
        self.class_names = class_names
        self.trust_code = trust_code
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
        """SHA-256 over all that determines the logits, as it is now; paths of files are not in it."""
        return combined_sha256({**self._identity, "weights": self.weights_sha256})

    def with_net(self, net: nn.Module) -> Classifier:
        """Return the same around another net that computes the same function."""
        mean, std = (None if value is None else tuple(value.flatten().tolist()) for value in (self.mean, self.std))
        copy = Classifier(
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
        copy.access = self.access
        copy.reader = replace(self.reader)
        copy.net_call, copy.layout = self.net_call, self.layout
        switch_mode(copy, self.training)
        return copy.to(None if self.mean is None else self.mean.device)

    def expect(self, classes: int | None) -> Classifier:
        """Set how many classes the data has, which helps to find the logits; return the classifier."""
        self.reader.classes = self.num_classes or classes
        return self


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
    identity = callable_identity(model)
    name = qualified_name(model)
    if is_maite(model):
        model = MaiteNet(model)
    model = with_numbers(model, f"python:{name}")
    num_classes = getattr(model, "num_classes", None)
    return Classifier(
        model,
        string=f"python:{name}",
        identity=identity,
        num_classes=num_classes if isinstance(num_classes, int) else None,
        output=None if output is None else str(output),
        binary=None if binary is None else read_binary(binary),
    )


def bare(net: Callable[..., object]) -> Callable[..., object]:
    """Return the net inside `torch.compile`, `DataParallel` or `DistributedDataParallel`; another as it is."""
    if isinstance(net, (DataParallel, DistributedDataParallel)):
        return bare(net.module)
    compiled = getattr(net, "_orig_mod", None)
    return bare(compiled) if isinstance(compiled, nn.Module) else net


def with_numbers(net: Callable[..., object], name: str) -> Callable[..., object]:
    """Return a net that can be differentiated: a copy of one that was made in `torch.inference_mode()`.

    Raises:
        UsageError: if parameters or buffers have no values.
    """
    if not isinstance(net, nn.Module):
        return net
    for key, tensor in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(f"model {name!r} has no values in {key!r} yet: call it once on some images first.")
        if tensor.is_meta:
            raise UsageError(
                f"model {name!r} is on the device 'meta', where {key!r} has no values: build it on the CPU, or "
                "load its weights with load_state_dict(..., assign=True)."
            )
        if tensor.is_inference():
            with torch.inference_mode(False):
                return copy.deepcopy(net)
    return net
