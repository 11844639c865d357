"""Weights files: every set of tensors in them, read without executing anything.

A file's first bytes determine its kind, whatever its name ends in: safetensors, or what `torch.save` wrote.
Several files are one by their index, `*.index.json`, as Hugging Face shards large models.
"""

from __future__ import annotations

import json
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch.serialization import skip_data

from robustkit.core.errors import UsageError, expand_path
from robustkit.models.first_bytes import POINTER, first_bytes, pointer_error
from robustkit.models.weights.inert_pickle import Harmful, InertPickle, StandIn

Tensors = dict[str, torch.Tensor]

INDEX = ".index.json"
_ZIP, _PICKLE, _GZIP = b"PK\x03\x04", b"\x80", b"\x1f\x8b"
# With this number torch.save began files that are no archives.
_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.\w+")
# How deep a checkpoint's entries are searched for tensors.
_DEPTH = 4
# A tensor may repeat its numbers, as one that was expanded does, up to this many bytes.
_REPEATED = 1 << 26
# Every program uses these; they are not worth a note.
_COMMON = ("builtins", "_codecs", "collections", "copyreg")


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds.

    Attributes:
        path: The file, absolute.
        sets: Tensors by name, on the CPU, of every entry that holds some; by the entry's own name, of which the
            parts are joined by dots, and empty where the file is nothing else. In lists their names are numbers.
        metadata: The texts of a safetensors file's header, such as `mean`, `std` and `size`.
        left_out: Names of Python classes and functions whose objects are not loaded.
        modules: Names of entries that are whole modules, and of their classes.
        content: What a file without tensors holds, in words.
    """

    path: Path
    sets: dict[str, Tensors]
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    content: str = "nothing"


def read_weights(file: str | Path) -> WeightsFile:
    """Return the tensors and the metadata of a weights file, or of the files that an index names.

    Raises:
        UsageError: A file is missing, damaged, of another kind, or names code that could do harm.
    """
    path = expand_path(file).absolute()
    if path.name.endswith(INDEX):
        return _sharded(path)
    start = _first_bytes(path)
    if _is_safetensors(path, start):
        return _read_safetensors(path)
    if _is_torch(path, start):
        return _read_torch(path, start)
    raise _of_another_kind(path, start)


def files_of_weights(file: str | Path) -> list[Path]:
    """Return all files that belong to the one that a model string names."""
    path = expand_path(file)
    return [path, *_shards(path)[0]] if path.name.endswith(INDEX) else [path]


def _first_bytes(path: Path) -> bytes:
    example = ""
    if path.is_dir():
        inside = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        example = f", for example {inside[0].name}" if inside else ""
    return first_bytes(path, "weights file", example)


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Return whether a file begins with the length of a JSON header that it is long enough for."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _is_torch(path: Path, start: bytes) -> bool:
    """Return whether torch.save wrote a file, which may be damaged."""
    if start.startswith(_PICKLE):
        return True
    if not start.startswith(_ZIP):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    # torch reads it again and reports that it is damaged.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True


def _of_another_kind(path: Path, start: bytes) -> UsageError:
    if start.startswith(_GZIP):
        return UsageError(f"weights file '{path}' is compressed by gzip: unpack it first.")
    if start == POINTER:
        return pointer_error(path, "weights file")
    if start[8:9] == b"{":
        return damaged(path)
    return UsageError(
        f"weights file '{path}' is neither a safetensors file nor one that torch.save wrote: write one of these."
    )


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as stream:
            metadata = dict(stream.metadata() or {})
            state = {name: stream.get_tensor(name) for name in stream.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise damaged(path) from error
    return WeightsFile(path, {"": state} if state else {}, metadata, content="an empty header")


def _read_torch(path: Path, start: bytes) -> WeightsFile:
    inert = InertPickle()
    try:
        _check_container(path)
        # An open file, since torch goes by the names of others.
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = _loaded(stream, inert)
    except Harmful as error:
        raise UsageError(
            f"weights file '{path}' holds the Python object {error.args[0]} beside tensors, which is not loaded "
            "because it could run code: save the net's state_dict() alone."
        ) from error
    except UsageError:
        raise
    # A damaged pickle fails in as many ways as there are bytes: EOFError, KeyError, RuntimeError, ...
    except Exception as error:
        if start.startswith(_PICKLE) and _MAGIC not in start:
            raise UsageError(
                f"weights file '{path}' is a pickle that torch.save did not write: load it in your own program, "
                "and save its tensors by torch.save."
            ) from error
        raise damaged(path) from error
    sets: dict[str, Tensors] = {}
    modules: dict[str, str] = {}
    _search(content, (), sets, modules, set())
    if any(map(_is_swollen, (tensor for tensors in sets.values() for tensor in tensors.values()))):
        raise damaged(path)
    names = sorted(name for name in inert.left_out if name.partition(".")[0] not in _COMMON)
    return WeightsFile(path, sets, left_out=tuple(names), modules=modules, content=_described(content))


def _loaded(stream: BinaryIO, inert: InertPickle) -> object:
    """Return what a file holds, read by `weights_only=True` unless that refuses what lies beside the tensors."""

    def inertly() -> object:
        stream.seek(0)
        return torch.load(stream, map_location="cpu", pickle_module=inert, weights_only=False)

    # First without the tensors' numbers, for the names in it.
    with skip_data():
        inertly()
    if not inert.left_out:
        stream.seek(0)
        # Files of other protocols than torch's own are refused as well.
        with suppress(pickle.UnpicklingError):
            return torch.load(stream, map_location="cpu", weights_only=True)
    return inertly()


def _described(content: object) -> str:
    if isinstance(content, StandIn):
        return f"an object of class {content.name}"
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [name for name in content if isinstance(name, str)]
    return f"the entries {short_list(names)}" if names else f"a dict of {len(content)} entries without names"


def _check_container(path: Path) -> None:
    """Refuse what `torch.load` would hand to other loaders than that of pickles, and what it would unpack."""
    with path.open("rb") as stream:
        is_archive = stream.read(len(_ZIP)) == _ZIP
    if not is_archive:
        # Its loader unpacks links and devices.
        if tarfile.is_tarfile(path):
            raise UsageError(
                f"weights file '{path}' is a tar archive, as torch.save wrote them before 2017, which is not "
                "read: load and save it by a newer torch first."
            )
        return
    reader = torch._C.PyTorchFileReader(str(path))
    records = reader.get_all_records()
    if "constants.pkl" in records:
        raise UsageError(
            f"weights file '{path}' is TorchScript, which is code and is not run: save the net's "
            "state_dict() instead."
        )
    packed, unpacked = path.stat().st_size, sum(map(reader.get_record_size, records))
    if unpacked > packed:
        raise UsageError(
            f"weights file '{path}' has {packed:,} bytes and unpacks to {unpacked:,}, which torch.save never "
            "writes: save the net's state_dict() again."
        )


def _search(
    value: object, place: tuple[str, ...], sets: dict[str, Tensors], modules: dict[str, str], seen: set[int]
) -> None:
    """Gather the sets of tensors and the whole modules below an entry of a checkpoint."""
    if id(value) in seen or len(place) > _DEPTH:
        return
    seen.add(id(value))
    name = ".".join(place)
    if isinstance(value, StandIn):
        if isinstance(value.state, Mapping) and "_parameters" in value.state:
            modules[name] = value.name
            return
        value = value.entries or value.state
    if isinstance(value, (list, tuple)):
        value = {str(number): inner for number, inner in enumerate(value)}
    if not isinstance(value, Mapping):
        return
    # Optimisers number their entries; names are texts.
    entries = {key: inner for key, inner in value.items() if isinstance(key, str)}
    tensors = {key: inner for key, inner in entries.items() if isinstance(inner, torch.Tensor)}
    if any(tensor.ndim for tensor in tensors.values()):
        sets[name] = tensors
    for key, inner in entries.items():
        _search(inner, (*place, key), sets, modules, seen)


def _is_swollen(tensor: torch.Tensor) -> bool:
    """Return whether a tensor of few stored numbers claims to be a huge one."""
    size = tensor.numel() * tensor.element_size()
    return tensor.layout == torch.strided and size > max(tensor.untyped_storage().nbytes(), _REPEATED)


def _sharded(path: Path) -> WeightsFile:
    """Return what all files of an index hold together."""
    files, wanted = _shards(path)
    parts = [read_weights(file) for file in files]
    state = {name: tensor for part in parts for tensors in part.sets.values() for name, tensor in tensors.items()}
    if missing := [name for name in wanted if name not in state]:
        raise UsageError(
            f"the files of '{path}' lack {len(missing)} tensors of its index ({missing[0]}, …): "
            "download them again."
        )
    metadata = {key: value for part in parts for key, value in part.metadata.items()}
    left_out = tuple(sorted({name for part in parts for name in part.left_out}))
    return WeightsFile(path, {"": state}, metadata, left_out)


def _shards(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files that an index names, which lie beside it, and the names of their tensors."""
    _first_bytes(path)
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        places = dict(index["weight_map"])
        names = sorted(set(places.values()))
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("its files do not lie beside it")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"'{path}' is no index of weights files ({type(error).__name__}: {error}): write one with a "
            "'weight_map' from tensors to files in the same folder."
        ) from error
    return [path.with_name(name) for name in names], list(places)


def index_of(path: Path) -> Path | None:
    """Return the index beside a file that is one of several; None for any other file."""
    shard = _SHARD.fullmatch(path.name)
    found = path.with_name(f"{shard[1]}{path.suffix}{INDEX}") if shard else None
    return found if found is not None and found.is_file() else None


def damaged(path: Path) -> UsageError:
    """Return the error for a file that cannot be read to its end."""
    return UsageError(f"weights file '{path}' is truncated or damaged: save or download it again.")


def short_list(names: list[str], limit: int = 3) -> str:
    """Return a list of names for a message, cut short."""
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
