"""How a net is called: images go in as the net takes them, tensors come out.

A net gets a copy of its own, in the standard memory layout, so that it may change its input in place and use
`view`. Whether it takes them as they are is found by trying: a net that fails may want another floating-point
type, no gradient, numpy arrays, or one batch size alone. What works is kept for the calls after.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from robustkit.core.errors import RobustkitError
from robustkit.core.isolation import quietly
from robustkit.core.shapes import Images, Logits
from robustkit.models.failures import is_out_of_memory
from robustkit.models.outputs import LogitsReader

Net = Callable[[Any], object]
# None for a net that returns logits and nothing else.
Reader = LogitsReader | None

DTYPES = (None, torch.float16, torch.bfloat16, torch.float64)
TENSOR, DETACHED, ON_CPU, NUMPY = "tensor", "detached", "detached-cpu", "numpy"
# Batch sizes that a net may have been made for, tried in this order as long as there is time and memory for it.
SIZES = (1, *range(2, 129), 256, 512, 1024, 200, 250, 500, 1000, 150, 300, 400, 2048)
MAX_SECONDS, MAX_BYTES = 1.5, 1 << 26
MAX_BATCH_SIZE = 4096
# How many batch sizes are remembered.
MAX_KNOWN_SIZES = 64
STANDARD = torch.contiguous_format


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
            return self._once(net, images, layout, reader)
        parts = []
        for part in torch.split(images, size):
            filled = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
            parts.append(self._once(net, filled, layout, reader)[: len(part)])
        return torch.cat(parts)

    def _once(self, net: Net, images: Images, layout: torch.memory_format, reader: Reader) -> Logits:
        given: Any = images.to(self.dtype or images.dtype).clone(memory_format=layout)
        # The net may switch gradients off; the caller's switch is put back.
        with _as_written(), torch.set_grad_enabled(self.kind == TENSOR and torch.is_grad_enabled()):
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
            some = torch.cat([images, images.new_zeros(1, *images.shape[1:])])
            return self(net, some, layout, reader)[:0]
        taken = self.taken[torch.is_grad_enabled() and images.requires_grad]
        try:
            logits = self.form.call(net, images, layout, reader)
        except RobustkitError:
            raise
        except (Exception, SystemExit) as error:
            # Another layout is only tried; an error means that it does not work.
            if is_out_of_memory(error) or len(images) in taken or layout != STANDARD:
                raise
            found = self._working(net, images, reader, self._forms(images, taken, str(error)))
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

    def takes(self, net: Net, images: Images, reader: Reader) -> bool:
        """Return whether the net takes images of this shape in one of the forms that need no other batch size."""
        forms = (form for form in self._forms(images, set(), "") if form.batch is None)
        return self._working(net, images, reader, itertools.chain([self.form], forms)) is not None

    @staticmethod
    def _working(net: Net, images: Images, reader: Reader, forms: Iterable[Form]) -> Form | None:
        """Return the first form in which the net takes these images."""
        deadline = time.perf_counter() + MAX_SECONDS
        for form in forms:
            if time.perf_counter() > deadline:
                return None
            try:
                # A net that takes tensors of autograd is to be given them.
                with quietly(), torch.set_grad_enabled(form.batch is None and torch.is_grad_enabled()):
                    form.call(net, images if form.batch is None else images[: form.batch], STANDARD, reader)
            except (Exception, SystemExit) as error:
                if is_out_of_memory(error):
                    return None
            else:
                return form
        return None

    def _forms(self, images: Images, taken: Collection[int], words: str) -> Iterator[Form]:
        """Yield forms to try: numbers of images that the net took before, else all, those in its words first."""
        if taken:
            for size in sorted(taken, reverse=True):
                yield replace(self.form, batch=size)
            return
        kinds = (TENSOR, DETACHED, *([] if images.device.type == "cpu" else [ON_CPU]), NUMPY)
        forms = [Form(dtype, kind) for dtype, kind in itertools.product(DTYPES, kinds)]
        yield from forms[1:]
        numbers = [int(number) for number in re.findall(r"\d{1,4}", words)]
        most = min(MAX_BATCH_SIZE, MAX_BYTES // max(images[0].nbytes, 1))
        sizes = dict.fromkeys(size for size in (*numbers, *SIZES) if 0 < size <= most and size != len(images))
        for form, size in itertools.product(forms, sizes):
            yield replace(form, batch=size)


def _as_written() -> AbstractContextManager[object]:
    """Run code without `torch.compile` inside.

    Compiled code is compiled anew for batches of other sizes, and allows neither a second gradient of one pass nor
    a look at what is computed.
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
