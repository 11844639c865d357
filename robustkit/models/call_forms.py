"""The form in which a net takes images, found by trying: another type, no gradient, arrays, one batch size."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from robustkit.core.devices import ComputeDevice
from robustkit.core.isolation import quietly
from robustkit.core.out_of_memory import is_out_of_memory
from robustkit.core.shapes import Images

if TYPE_CHECKING:
    from robustkit.models.prepared_net import Form, Net, Reader

TENSOR, DETACHED, ON_CPU, NUMPY = "tensor", "detached", "detached-cpu", "numpy"
DTYPES = (None, torch.float16, torch.bfloat16, torch.float64)
# Batch sizes that a net may have been made for, tried in this order as long as there is time and memory for it.
SIZES = (1, *range(2, 129), 256, 512, 1024, 200, 250, 500, 1000, 150, 300, 400, 2048)
MAX_SECONDS, MAX_BYTES = 1.5, 1 << 26
MAX_BATCH_SIZE = 4096
STANDARD = torch.contiguous_format


def working_form(net: Net, images: Images, reader: Reader, forms: Iterable[Form]) -> Form | None:
    """Return the first form in which the net takes these images."""
    deadline = time.perf_counter() + MAX_SECONDS
    for form in forms:
        if time.perf_counter() > deadline:
            return None
        try:
            # Some nets fail only under autograd, so types are tried with it if the caller uses it; sizes without.
            with quietly(), torch.set_grad_enabled(form.batch is None and torch.is_grad_enabled()):
                form.call(net, images if form.batch is None else images[: form.batch], STANDARD, reader)
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                return None
        else:
            return form
    return None


def forms_to_try(form: Form, images: Images, accepted_sizes: Collection[int], message: str) -> Iterator[Form]:
    """Yield forms to try: batch sizes that worked before, else all, first those that the error message names."""
    if accepted_sizes:
        for size in sorted(accepted_sizes, reverse=True):
            yield replace(form, batch=size)
        return
    kinds = (TENSOR, DETACHED, *([] if ComputeDevice(images.device).is_cpu else [ON_CPU]), NUMPY)
    forms = [replace(form, dtype=dtype, kind=kind, batch=None) for dtype, kind in itertools.product(DTYPES, kinds)]
    yield from forms[1:]
    numbers = [int(number) for number in re.findall(r"\d{1,4}", message)]
    most = min(MAX_BATCH_SIZE, MAX_BYTES // max(images[0].nbytes, 1))
    sizes = dict.fromkeys(size for size in (*numbers, *SIZES) if 0 < size <= most and size != len(images))
    for other, size in itertools.product(forms, sizes):
        yield replace(other, batch=size)
