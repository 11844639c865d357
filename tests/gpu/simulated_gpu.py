"""A simulated GPU: tensors that report cuda:0 and keep their data on the CPU.

To C++ a `GpuTensor` is a meta tensor, so autograd needs no driver; to Python it is on cuda:0. Inside
`SimulatedGpu` every operation runs on the CPU data. An operation that mixes devices fails as it would on a GPU;
kernel launches and host synchronisations are counted by the line of robustkit that made them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before torch.cuda is stubbed: it lists the functions there
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
ROOT = str(Path(__file__).parents[2])
aten = torch.ops.aten
# Operations that take tensors of both devices, and those that read a result back to the host.
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
READS = {
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default),
    *(aten.unique_dim.default, aten.repeat_interleave.Tensor, aten.bincount.default),
}
# Operations without a kernel.
FREE = {
    *(aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten._unsafe_view.default),
    *(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default),
}


class DeviceMismatchError(RuntimeError):
    """An operation mixes tensors of the GPU and of the CPU."""


class GpuTensor(torch.Tensor):
    """A tensor on the simulated GPU."""

    held: torch.Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl  # results are wrapped below, not by torch

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> GpuTensor:
        """Wrap a CPU tensor."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device("meta")
        )
        made.held = held
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    data = property(lambda self: self.detach(), lambda self, other: setattr(self, "held", other.held))

    def tolist(self) -> Any:
        """Return nested lists, after a copy to the host."""
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        """Return a number's text, after a copy to the host."""
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GpuTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operation outside `SimulatedGpu`."""
        return run(func, args, kwargs or {}, lambda kind: None)


def run(func: Any, args: Any, kwargs: dict[str, Any], count: Callable[[str], None]) -> Any:
    """Run an operation on the CPU data; `count` is called with `launch` and `sync`."""
    tensors = _tensors(args) + _tensors(tuple(kwargs.values()))
    here = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    # torch itself passes on the device that C++ sees.
    on_gpu = bool(here) if target is None else target.type in ("cuda", "meta")
    if not (here or on_gpu):
        return func(*args, **kwargs)
    plain_args, plain = _held(args), {name: _held(value) for name, value in kwargs.items()}
    if target:
        plain["device"] = "cpu"
    if func in COPIES:
        return _copy(func, args, kwargs, plain_args, plain, on_gpu=on_gpu, count=count)
    if len(here) < len(tensors) and func not in INDEXING:
        mixed = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor) and tensor.dim()]
        if mixed:
            raise DeviceMismatchError(f"{func} on cuda:0 and cpu at {caller()}")
    masks = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
    uploads = func in INDEXING and any(index is not None and not isinstance(index, GpuTensor) for index in args[1])
    if func in READS or masks or uploads:
        count("sync")
    out = func(*plain_args, **plain)
    if not (func.is_view or func in FREE):
        count("launch")
    return _wrapped(func, args, kwargs, out)


def _copy(
    func: Any, args: Any, kwargs: Any, plain_args: Any, plain: Any, *, on_gpu: bool, count: Callable[[str], None]
) -> Any:
    """Run a copy between devices, or within one."""
    if func is aten.copy_.default:
        to, of = args[0], args[1]
        count("launch")
        if isinstance(to, GpuTensor) != isinstance(of, GpuTensor) and not (of.dim() == 0 and _pinned(of)):
            count("sync")
        func(*plain_args, **plain)
        return to
    (source,) = args
    changed = kwargs.get("dtype") not in (None, source.dtype) or kwargs.get("memory_format") is not None
    if isinstance(source, GpuTensor) and on_gpu and not changed:
        return GpuTensor(source.held)  # `.to` of the device that the tensor is on
    count("launch")
    if isinstance(source, GpuTensor) != on_gpu and not (kwargs.get("non_blocking") and _pinned(source)):
        count("sync")
    out = func(*plain_args, **plain)
    return GpuTensor(out) if on_gpu else out


def _pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "pinned", False)


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _held(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_held, value))
    return value.held if isinstance(value, GpuTensor) else value


def _on_gpu(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_on_gpu, value))
    return GpuTensor(value) if isinstance(value, torch.Tensor) else value


def _wrapped(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """Return results as GPU tensors; those that an operation writes in place are the arguments themselves."""
    written = [
        (args[at] if at < len(args) else kwargs.get(argument.name))
        for at, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written and func._schema.returns:
        return written[0] if len(func._schema.returns) == 1 else tuple(written)
    return _on_gpu(out)


def caller(frames: int = 1) -> str:
    """Return file and line of the innermost frames of robustkit's own code."""
    frame: FrameType | None = sys._getframe(1)
    lines = list[str]()
    while frame is not None and len(lines) < frames:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(f"{ROOT}/tests/gpu/simulated"):
            lines.append(f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "elsewhere"


class SimulatedGpu(TorchDispatchMode):
    """Count launches and synchronisations inside, by kind and line."""

    def __init__(self, frames: int = 1) -> None:
        """Start at zero; an event is counted at this many lines of robustkit's."""
        super().__init__()
        self.frames = frames
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        return run(func, args, kwargs or {}, self.count)

    def count(self, kind: str) -> None:
        """Count an event at the line that caused it."""
        self.counts[kind, caller(self.frames)] += 1

    def total(self, kind: str) -> int:
        """Return the number of events of a kind."""
        return sum(number for (found, _), number in self.counts.items() if found == kind)


class _Calls(TorchFunctionMode):
    """Change calls that name cuda without a number: torch would ask the driver for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = {name: self._indexed(value) for name, value in (kwargs or {}).items()}
        if func is torch.device:
            return func(*args, **kwargs)
        return func(*map(self._indexed, args), **kwargs)

    @staticmethod
    def _indexed(value: Any) -> Any:
        return GPU if isinstance(value, str | torch.device) and str(value) == "cuda" else value


def _pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


@contextmanager
def simulated_gpu(memory: int = 80 << 30, cached: int = 0, frames: int = 1) -> Iterator[SimulatedGpu]:
    """Have torch report one GPU with so many free bytes inside, and so many in its cache; yield the counts."""
    nothing: Any = lambda *_, **__: None  # noqa: E731
    stubs = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda *_: (memory, memory),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: cached,
        "max_memory_allocated": lambda *_: 0,
        "get_device_name": lambda *_: "simulated GPU",
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
    }
    silent: tuple[str, ...] = (
        "_lazy_init",
        "synchronize",
        "empty_cache",
        "manual_seed",
        "manual_seed_all",
        "set_device",
    )
    silent += ("set_rng_state", "set_rng_state_all", "reset_peak_memory_stats", "set_sync_debug_mode")
    with ExitStack() as stack:
        for name, stub in {**stubs, **dict.fromkeys(silent, nothing)}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getDevice", return_value=0))
        stack.enter_context(mock.patch.object(torch.cuda, "default_generators", (torch.Generator(),)))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pin))
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        stack.enter_context(_Calls())
        yield stack.enter_context(SimulatedGpu(frames))
