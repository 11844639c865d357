"""A forward pass: images on [0, 1] go in, are prepared as the net takes them, and its logits come out.

A net gets a copy of its own, in the standard memory layout, so that it may change its input in place and use
`view`. Whether it takes them as they are is found by trying: a net that fails may want another floating-point
type, no gradient, numpy arrays, or one batch size alone. What works is kept for the calls after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.errors import RobustkitError, UsageError
from robustkit.core.isolation import no_exit
from robustkit.core.out_of_memory import is_out_of_memory
from robustkit.core.shapes import Images, Logits
from robustkit.models.call_forms import NUMPY, ON_CPU, STANDARD, TENSOR, forms_to_try, working_form
from robustkit.models.ensembles.mixture import Mixture
from robustkit.models.outputs import LogitsReader
from robustkit.models.shape_search import failure

Net = Callable[[Any], object]
# None for a net that returns logits and nothing else.
Reader = LogitsReader | None
Defense = Callable[[Callable[[Images], Logits], Images], Logits]

# How many batch sizes are remembered.
MAX_KNOWN_SIZES = 64


@dataclass(frozen=True)
class Form:
    """What a net is given.

    Attributes:
        dtype: of the images; None leaves it.
        kind: a tensor, one outside of autograd, the same on the CPU, or a numpy array.
        batch: the only number of images that the net takes; None if it takes any.
    """

    dtype: torch.dtype | None = None
    kind: str = TENSOR
    batch: int | None = None

    def call(self, net: Net, images: Images, layout: torch.memory_format, reader: Reader) -> Logits:
        """Return the logits of images, in batches of the net's own size, filled up where there are too few."""
        size = self.batch or len(images)
        if len(images) == size:
            return self._call_net(net, images, layout, reader)
        parts = []
        for part in torch.split(images, size):
            filled = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
            parts.append(self._call_net(net, filled, layout, reader)[: len(part)])
        return torch.cat(parts)

    def _call_net(self, net: Net, images: Images, layout: torch.memory_format, reader: Reader) -> Logits:
        given: Any = images.to(self.dtype or images.dtype).clone(memory_format=layout)
        # The net may switch gradients off; the caller's switch is put back.
        with _without_compile(), torch.set_grad_enabled(self.kind == TENSOR and torch.is_grad_enabled()):
            if self.kind != TENSOR:
                given = given.detach()
            if self.kind in (ON_CPU, NUMPY):
                given = given.cpu()
            output = net(given.numpy() if self.kind == NUMPY else given)
        logits = _read(output, len(images), reader).to(images.device)
        return logits.clone() if logits.is_inference() and not torch.is_inference_mode_enabled() else logits


class NetCall:
    """Calls a net, in the form that worked before or, if it fails at first, in one that is found by trying."""

    def __init__(self) -> None:
        """Begin with images as they are."""
        self.form = Form()
        # Numbers of images that have been taken, outside of autograd and inside.
        self.taken: dict[bool, set[int]] = {False: set(), True: set()}

    def __call__(self, net: Net, images: Images, layout: torch.memory_format, reader: Reader) -> Logits:
        """Return the logits of images (B C H W); what the net raises is raised where no form works."""
        if not len(images):
            # What reshapes its input by the number of images cannot do so with none.
            padded = torch.cat([images, images.new_zeros(1, *images.shape[1:])])
            return self(net, padded, layout, reader)[:0]
        taken = self.taken[torch.is_grad_enabled() and images.requires_grad]
        try:
            logits = self.form.call(net, images, layout, reader)
        except RobustkitError:
            raise
        except (Exception, SystemExit) as error:
            # Another layout is only tried; an error means that it does not work.
            if is_out_of_memory(error) or len(images) in taken or layout != STANDARD:
                raise
            found = working_form(net, images, reader, forms_to_try(self.form, images, taken, str(error)))
            if found is None:
                raise
            # Once more, with the caller's switches of autograd.
            logits = found.call(net, images, layout, reader)
            self.form = found
        if len(taken) < MAX_KNOWN_SIZES:
            taken.add(len(images))
        return logits

    @property
    def has_worked(self) -> bool:
        """Whether the net has taken any images yet."""
        return any(self.taken.values())


class PreparedNet(nn.Module):
    """A net with all that happens in a forward pass before and after it.

    Attributes:
        net: Maps resized and normalised images to its output.
        string: What errors call the model.
        size: Height and width that images are resized to, in pixels; None leaves them.
        defenses: Applied before all this, each a call `(model, images) -> logits`; an image meets the
            first one first.
        reader: Finds the logits in what the net returns.
        layout: Memory layout of the images that the net is given.
        net_call: Calls the net in the form that it takes.
    """

    mean: torch.Tensor | None
    std: torch.Tensor | None

    def __init__(
        self,
        net: Net,
        *,
        string: str,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        size: tuple[int, int] | None,
        defenses: Sequence[Defense],
        reader: LogitsReader,
    ) -> None:
        """Wrap a net; `mean` is subtracted from each channel, `std` divides it afterwards."""
        super().__init__()
        self.net, self.string, self.size, self.defenses = net, string, size, tuple(defenses)
        self.reader, self.layout, self.net_call = reader, torch.contiguous_format, NetCall()
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)

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
                return self.net_call(self.net, x, layout, self.logits_reader)
        except Exception as error:
            if isinstance(error, RobustkitError) or is_out_of_memory(error):
                raise
            raise failure(self, error, images) from error

    def _prepared(self, images: Images) -> torch.Tensor:
        """Return images resized and normalised."""
        x = images
        if self.size is not None and x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        return self._normalised(x)

    @property
    def logits_reader(self) -> LogitsReader | None:
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


def _per_channel(value: tuple[float, ...] | None) -> torch.Tensor | None:
    return None if value is None else torch.tensor(value).view(1, -1, 1, 1)


def _without_compile() -> AbstractContextManager[object]:
    """Run code without `torch.compile` inside.

    Compiled code is compiled again for batches of other sizes, and supports neither a second gradient of one pass
    nor hooks on its parts.
    """
    # As long as the compiler is not imported nothing has been compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _read(output: Any, rows: int, reader: Reader) -> Logits:
    """Return the logits in what a net returned for so many images.

    The reader looks at the first output, and at later ones of another form; without a reader logits are all that
    the net returns.
    """
    form = (output.shape, output.dtype, output.layout) if isinstance(output, torch.Tensor) else None
    if reader is not None and form != ((rows, reader.width), reader.dtype, torch.strided):
        return reader.read(_as_tensors(output), rows)
    logits: Logits = output
    return logits


def _as_tensors(output: object) -> object:
    """Return what a net returned with tensors in the place of arrays."""
    if isinstance(output, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(output)) if output.dtype.kind in "fiub" else output
    if isinstance(output, Mapping):
        return (
            {key: _as_tensors(value) for key, value in output.items()} if _holds_array(output.values()) else output
        )
    if isinstance(output, (tuple, list)) and _holds_array(output):
        return tuple(_as_tensors(value) for value in output)
    return output


def _holds_array(values: Any) -> bool:
    return any(isinstance(value, np.ndarray) for value in values)
