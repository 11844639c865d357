"""The identity of a model as a hash of its tensors and its code, independent of their paths."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

_COUNTER = "num_batches_tracked"
_PLAIN = (bool, int, float, str, type(None))


def state_sha256(model: object) -> str:
    """Return the SHA-256 over name, type, shape and bytes of every tensor that a prediction may depend on.

    For a plain callable these are the tensors of the modules that it reaches directly: in its closure, in the
    globals that it names, in its attributes, or bound to it. `num_batches_tracked` counts nowhere.
    """
    digest = hashlib.sha256()
    named = list(_state(model))
    for (name, tensor), content in zip(named, _contents([tensor for _, tensor in named]), strict=True):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(content.numpy().data)
    return digest.hexdigest()


def _contents(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the bytes of each tensor in main memory; those of other devices by one copy for each of them."""
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    copies: dict[torch.device, Iterator[torch.Tensor]] = {}
    for device in {tensor.device for tensor in flat if tensor.device.type != "cpu"}:
        there = [tensor for tensor in flat if tensor.device == device]
        copies[device] = iter(torch.split(torch.cat(there).cpu(), [len(tensor) for tensor in there]))
    yield from (next(copies[tensor.device]) if tensor.device in copies else tensor for tensor in flat)


def combined_sha256(identity: Mapping[str, object]) -> str:
    """Return the SHA-256 of named JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def callable_identity(model: Callable[..., object]) -> dict[str, object]:
    """Return what identifies a model beside its tensors.

    For a module these are its layers; for a plain callable its name, its source, and the numbers and texts
    that it reaches as `state_sha256` reaches tensors.
    """
    if isinstance(model, nn.Module):
        return {"module": repr(model)}
    plain = {name: repr(value) for name, value in _reached(model).items() if isinstance(value, _PLAIN)}
    return {"name": qualified_name(model), "source": _source(model), "values": plain}


def qualified_name(model: Callable[..., object]) -> str:
    """Return a function's name, or an object's class's."""
    return getattr(model, "__qualname__", None) or type(model).__qualname__


def _source(model: Callable[..., object]) -> str:
    code = model if inspect.isroutine(model) else type(model)
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""


def _state(model: object) -> Iterator[tuple[str, torch.Tensor]]:
    parts = {"": model} if isinstance(model, nn.Module) else _reached(model)
    for part, value in sorted(parts.items()):
        if isinstance(value, torch.Tensor):
            yield part, value
        elif isinstance(value, nn.Module):
            for name, tensor in sorted(value.state_dict().items()):
                if isinstance(tensor, torch.Tensor) and not name.endswith(_COUNTER):
                    yield f"{part}{name}", tensor


def _reached(model: object) -> dict[str, object]:
    if isinstance(model, functools.partial):
        arguments = {str(index): value for index, value in enumerate(model.args)}
        return {**_reached(model.func), **arguments, **model.keywords}
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        return {"self": owner}
    if owner is not None and not inspect.ismodule(owner):
        return dict(getattr(owner, "__dict__", {}))
    if inspect.isfunction(model):
        variables = inspect.getclosurevars(model)
        return {**variables.globals, **variables.nonlocals}
    return dict(getattr(model, "__dict__", {}))
