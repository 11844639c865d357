"""Weights files: read without executing anything in them, and put into a net."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from torch import nn

from robustkit.errors import UsageError

_SUFFIXES = (".safetensors", ".pt", ".pth")
_NESTED = ("state_dict", "model")
_PREFIX = "module."
_COUNTER = "num_batches_tracked"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class Weights:
    """What a weights file holds.

    Attributes:
        path: The file, absolute.
        state: Tensors by name, on the CPU, without `module.` prefixes.
        metadata: The texts of a safetensors file's header, such as `mean` and `std`; empty for other files.
    """

    path: Path
    state: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_weights(file: str | Path) -> Weights:
    """Return the tensors and the metadata of a weights file.

    Raises:
        UsageError: The file is missing, damaged, not what its suffix says, holds no tensors or more than
            tensors, or a tensor in it has values that are NaN or infinite.
    """
    path = Path(file).expanduser().absolute()
    if path.suffix not in _SUFFIXES:
        raise UsageError(
            f"weights file '{path}' ends in {path.suffix!r}: write one that ends in {', '.join(_SUFFIXES)}."
        )
    start = _first_bytes(path)
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path, start)
    else:
        state, metadata = _read_torch(path, start), {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UsageError(f"weights file '{path}' has NaN or infinite values in {name!r}: save it again.")
    if all(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    return Weights(path, state, metadata)


def put_weights(net: object, weights: Weights, arch: str) -> None:
    """Copy a file's tensors into a net; `num_batches_tracked`, which no prediction depends on, may differ.

    Raises:
        UsageError: The net takes no weights, or the names or shapes of its tensors are not those of the file.
    """
    if not isinstance(net, nn.Module):
        raise UsageError(
            f"{arch} is a {type(net).__name__} and takes no weights: return a torch.nn.Module, or leave out "
            f"'@{weights.path}'."
        )
    own = {name: value for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}
    _check_names(own, weights, arch)
    _check_shapes(own, weights, arch)
    net.load_state_dict(weights.state, strict=False)


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise UsageError(f"weights file '{path}' is a folder: write the file in it.")
    if path.exists() and not path.is_file():
        raise UsageError(f"weights file '{path}' is no regular file: write a file on a disk.")
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except FileNotFoundError as error:
        raise UsageError(f"there is no weights file '{path}': check the path.") from error
    except OSError as error:
        raise UsageError(
            f"weights file '{path}' cannot be read ({error.strerror}): check its permissions."
        ) from error
    if not start:
        raise UsageError(f"weights file '{path}' is empty: save or download it again.")
    return start


def _begins_safetensors(path: Path, start: bytes) -> bool:
    """Return whether a file begins with the length of a JSON header that it is long enough for."""
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path, start: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not _begins_safetensors(path, start) and start.startswith((_ZIP, _PICKLE)):
        raise UsageError(
            f"weights file '{path}' was written by torch.save: rename it to '{path.with_suffix('.pt').name}'."
        )
    if start[8:] != b"{":
        raise UsageError(f"weights file '{path}' is no safetensors file: write one saved by safetensors.")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as stream:
            metadata = dict(stream.metadata() or {})
            state = {name: stream.get_tensor(name) for name in stream.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path) from error
    if not state:
        raise UsageError(f"weights file '{path}' holds no tensors: save the net's state_dict() in it.")
    return state, metadata


def _read_torch(path: Path, start: bytes) -> dict[str, torch.Tensor]:
    if _begins_safetensors(path, start):
        raise UsageError(
            f"weights file '{path}' is a safetensors file: rename it to '{path.with_suffix('.safetensors').name}'."
        )
    if not start.startswith((_ZIP, _PICKLE)):
        raise UsageError(f"weights file '{path}' is no PyTorch file: write one saved by torch.save.")
    if start.startswith(_ZIP):
        if not zipfile.is_zipfile(path):
            raise _damaged(path)
        with zipfile.ZipFile(path) as archive:
            # Both formats are archives with a data.pkl; only TorchScript has its constants beside it.
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UsageError(
                    f"weights file '{path}' is TorchScript, which is code and is not run: save the net's "
                    "state_dict() instead."
                )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        what = f"the Python object {found[1]}" if found else "Python objects"
        raise UsageError(
            f"weights file '{path}' holds {what} beside tensors, which is not loaded because it could run "
            "code: save the net's state_dict() alone."
        ) from error
    # A damaged pickle fails in as many ways as there are bytes: EOFError, KeyError, RuntimeError, ...
    except Exception as error:
        raise _damaged(path) from error
    return _tensors(path, content)


def _tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        nested = next((content[name] for name in _NESTED if isinstance(content.get(name), Mapping)), content)
        state = {str(name): value for name, value in nested.items() if isinstance(value, torch.Tensor)}
        if state:
            return state
        holds = f"the entries {_some(list(map(str, content)))}" if content else "an empty dict"
    else:
        holds = f"a {type(content).__name__}"
    raise UsageError(
        f"weights file '{path}' holds {holds} but no tensors: save the net's state_dict(), plainly or "
        f"under {' or '.join(map(repr, _NESTED))}."
    )


def _damaged(path: Path) -> UsageError:
    return UsageError(f"weights file '{path}' is truncated or damaged: save or download it again.")


def _check_names(own: dict[str, torch.Tensor], weights: Weights, arch: str) -> None:
    missing = [name for name in own if name not in weights.state and not name.endswith(_COUNTER)]
    unexpected = [name for name in weights.state if name not in own and not name.endswith(_COUNTER)]
    faults = []
    if missing:
        faults.append(f"lacks {len(missing)} of its {len(own)} tensors ({_some(missing)})")
    if unexpected:
        faults.append(f"has {len(unexpected)} that it does not know ({_some(unexpected)})")
    if faults:
        raise UsageError(
            f"weights file '{weights.path}' does not fit {arch}: it {' and '.join(faults)}; write the "
            "architecture that it was saved from."
        )


def _check_shapes(own: dict[str, torch.Tensor], weights: Weights, arch: str) -> None:
    wrong = [name for name, tensor in weights.state.items() if name in own and tensor.shape != own[name].shape]
    if not wrong:
        return
    # The file's order may be alphabetical (bias first); a weight tells more about the layer than a bias.
    name = max(wrong, key=lambda name: own[name].ndim)
    stored, wanted = tuple(weights.state[name].shape), tuple(own[name].shape)
    head_only = len({name.rpartition(".")[0] for name in wrong}) == 1
    if head_only and len(stored) == 2 and stored[1:] == wanted[1:]:
        advice = f"write num_classes={stored[0]}"
    else:
        advice = "write the architecture that it was saved from"
    raise UsageError(
        f"weights file '{weights.path}' does not fit {arch}: {name!r} has shape {stored} there and "
        f"{wanted} in the net; {advice}."
    )


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
