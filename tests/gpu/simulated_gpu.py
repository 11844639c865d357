"""A simulated GPU: tensors that report cuda:0 and keep their data on the CPU.

To C++ a `GpuTensor` is a meta tensor, so autograd needs no driver; to Python it is on cuda:0. Inside
`simulated_gpu()` every operation runs on the CPU data. One that mixes devices fails as it would on a GPU. Kernel
launches, and waits of the host for the device, are counted by the line of robustkit that made them. A copy to
pinned memory that is not waited for arrives, as on a GPU, at the next wait.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before torch.cuda is stubbed: it lists the functions there
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
ROOT = f"{Path(__file__).parents[2]}/"
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
# Operations that read a result back to the host.
READS = {
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default),
    *(aten.unique_dim.default, aten.repeat_interleave.Tensor, aten.bincount.default),
}
# Operations without a kernel, apart from views.
FREE = {
    *(aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten._unsafe_view.default),
    *(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default),
}


class GpuTensor(Tensor):
    """A tensor on the simulated GPU; `held` is its data on the CPU."""

    held: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl  # results are wrapped below, not by torch

    @staticmethod
    def __new__(cls, held: Tensor) -> GpuTensor:
        """Wrap a CPU tensor."""
        options: Any = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device("meta"), **options)
        made.held = held
        return made

    device, is_cuda = property(lambda self: GPU), property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    data = property(lambda self: self.detach(), lambda self, other: setattr(self, "held", other.held))
    __format__: Any = lambda self, spec: format(self.cpu(), spec)
    tolist: Any = lambda self: self.cpu().tolist()
    __repr__: Any = lambda self, **_: f"GpuTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operation outside `simulated_gpu()`, where nothing is counted."""
        return SimulatedGpu().__torch_dispatch__(func, types, args, kwargs)


class SimulatedGpu(TorchDispatchMode):
    """Runs operations and counts launches and syncs, each by the lines of its innermost `frames`."""

    def __init__(self, frames: int = 1) -> None:
        """Start at zero."""
        super().__init__()
        self.counts, self.frames = Counter[tuple[str, str]](), frames
        self._pinned = dict[int, Tensor]()  # by address; kept, so that no address is used again
        self._under_way = list[tuple[Tensor, Tensor]]()  # copies to the host: to and from

    def count(self, kind: str) -> None:
        """Count an event at the line that caused it; a sync completes the copies that are under way."""
        self.counts[kind, caller(self.frames)] += 1
        while kind == "sync" and self._under_way:
            Tensor.copy_(*self._under_way.pop())

    def total(self, kind: str) -> int:
        """Return the number of events of a kind."""
        return sum(number for (found, _), number in self.counts.items() if found == kind)

    def pinned(self, tensor: Tensor) -> Tensor:
        """Return a copy in pinned memory."""
        copy = tensor.clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation on the CPU data."""
        kwargs, tensors = kwargs or {}, list[Tensor]()

        def held(value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors.append(value)
            return value.held if isinstance(value, GpuTensor) else value

        plain_args, plain = _mapped(args, held), {name: _mapped(value, held) for name, value in kwargs.items()}
        to_gpu = on_gpu = any(isinstance(tensor, GpuTensor) for tensor in tensors)
        if plain.get("device"):  # torch itself passes on the device that C++ sees
            to_gpu, plain["device"] = torch.device(plain["device"]).type in ("cuda", "meta"), "cpu"
        if plain.pop("pin_memory", None) and not to_gpu:
            return self.pinned(func(*plain_args, **plain))
        if not (on_gpu or to_gpu):
            return func(*args, **kwargs)
        if func is aten.copy_.default or func is aten._to_copy.default:
            return self._copy(func, args, kwargs, to_gpu, lambda: func(*plain_args, **plain))
        index = []
        if func in INDEXING and isinstance(args[0], GpuTensor):  # an index may be on the CPU
            index, tensors = [part for part in args[1] if part is not None], [args[0], *args[2:3]]
        if on_gpu and any(tensor.dim() and not isinstance(tensor, GpuTensor) for tensor in tensors):
            raise RuntimeError(f"Expected all tensors on one device, found cuda:0 and cpu: {func} at {caller()}")
        if func in READS or any(part.dtype == torch.bool or not isinstance(part, GpuTensor) for part in index):
            self.count("sync")
        if not (func.is_view or func in FREE):
            self.count("launch")
        out = func(*plain_args, **plain)
        arguments, returns = func._schema.arguments, func._schema.returns
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        if returns and returns[0].alias_info and returns[0].alias_info.is_write:  # in place: the argument itself
            written = [given[a.name] for a in arguments if a.alias_info and a.alias_info.is_write]
            return written[0] if len(returns) == 1 else tuple(written)
        return _mapped(out, lambda value: GpuTensor(value) if isinstance(value, Tensor) else value)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any], to_gpu: bool, run: Callable[[], Tensor]) -> Any:
        """Run a copy between devices, or within one."""
        writes = func is aten.copy_.default
        source, from_gpu = args[writes], isinstance(args[writes], GpuTensor)
        to_gpu = isinstance(args[0], GpuTensor) if writes else to_gpu
        changed = kwargs.get("dtype") not in (None, source.dtype) or kwargs.get("memory_format") is not None
        if from_gpu and to_gpu and not (writes or changed):
            return GpuTensor(source.held)  # `.to` of the device that the tensor is on
        self.count("launch")
        # torch puts the result of `.to("cpu", non_blocking=True)` into pinned memory.
        host = source if to_gpu else args[0] if writes else None
        pinned = from_gpu == to_gpu or host is None or host.untyped_storage().data_ptr() in self._pinned
        late = pinned and (kwargs.get("non_blocking") or args[2:] == (True,))
        if from_gpu != to_gpu and not late:
            self.count("sync")
        out = run()
        if late and from_gpu and not to_gpu:
            self._under_way.append((out, out.clone()))
            out.fill_(torch.nan if out.is_floating_point() else 0)
        return args[0] if writes else GpuTensor(out) if to_gpu else out


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    return type(value)(_mapped(v, change) for v in value) if isinstance(value, list | tuple) else change(value)


def caller(frames: int = 1) -> str:
    """Return file and line of the innermost frames of robustkit's own code, none of an environment inside it."""
    files = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
    own = (
        one for one in files if one[0].startswith(ROOT) and "site-packages" not in one[0] and one[0] != __file__
    )
    return " < ".join(islice((f"{name[len(ROOT) :]}:{line}" for name, line in own), frames)) or "elsewhere:0"


class _Calls(TorchFunctionMode):
    """Change calls that name cuda without a number: torch would ask the driver for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""

        def indexed(value: Any) -> Any:
            return GPU if isinstance(value, str | torch.device) and str(value) == "cuda" else value

        kwargs = {name: indexed(value) for name, value in (kwargs or {}).items()}
        return func(*(args if func is torch.device else map(indexed, args)), **kwargs)


@contextmanager
def simulated_gpu(memory: int = 80 << 30, cached: int = 0, frames: int = 1) -> Iterator[SimulatedGpu]:
    """Have torch report one GPU with so many free bytes inside, and so many in its cache; yield the counts."""
    silent = "_lazy_init empty_cache manual_seed manual_seed_all set_device set_rng_state reset_peak_memory_stats"
    results: dict[str, Any] = dict.fromkeys([*silent.split(), "set_rng_state_all", "set_sync_debug_mode"])
    results |= dict.fromkeys(["is_available", "is_initialized", "is_bf16_supported"], True)
    results |= dict.fromkeys(["current_device", "memory_allocated", "max_memory_allocated"], 0)
    results |= {"device_count": 1, "get_device_name": "simulated GPU", "get_device_capability": (9, 0)}
    results |= {"mem_get_info": (memory, memory), "memory_reserved": cached, "is_current_stream_capturing": False}
    results |= {"get_rng_state": torch.zeros(16, dtype=torch.uint8), "get_rng_state_all": [torch.zeros(16).byte()]}
    gpu = SimulatedGpu(frames)
    stubs: dict[str, Any] = {name: lambda *_, value=value, **__: value for name, value in results.items()}
    stubs |= {"synchronize": lambda *_: gpu.count("sync"), "default_generators": (torch.Generator(),)}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **stubs))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getDevice", return_value=0))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: gpu.pinned(tensor)))
        stream = mock.Mock(**{"is_capturing.return_value": False})
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", return_value=stream))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Calls())
        yield stack.enter_context(gpu)
