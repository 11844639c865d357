"""Archives of `torch.export.save`, read without pickle: the graph as JSON and the tensors as bytes."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustkit.core.errors import UsageError
from robustkit.models.sources.shaped_net import InputShape

# The numbers of torch's types in a file.
DTYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
_MODEL, _WEIGHTS, _CONSTANTS = "models/model.json", "data/weights/", "data/constants/"
_COMPILED = "data/aotinductor/"
# A tensor may repeat its numbers, as one that was expanded does, up to this many bytes.
_MAX_REPEATED = 1 << 26


@dataclass(frozen=True)
class Program:
    """What an archive holds.

    Attributes:
        path: The file.
        graph: The graph as JSON, in the schema of torch.export.
        tensors: The values of the graph's inputs that are no images, by the names of these inputs.
        parameters: Names of those that are parameters.
        image: Name of the input for the images.
        shape: Of the images.
        keys: Keys of the outputs if the net returns a dict; None if not.
    """

    path: Path
    graph: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor | None]
    parameters: frozenset[str]
    image: str
    shape: InputShape
    keys: tuple[str, ...] | None


def read_pt2(path: Path) -> Program:
    """Return the program of an archive.

    Raises:
        UsageError: It is damaged, of another kind or version, was compiled, or takes no images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"model file '{path}' is damaged or no archive of torch.export ({type(error).__name__}): write a file "
            "that torch.export.save wrote."
        ) from error


def _read(path: Path, archive: zipfile.ZipFile) -> Program:
    # All names are in one folder, whose name is free.
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if any(name.startswith(_COMPILED) for name in members):
        raise UsageError(
            f"model file '{path}' holds compiled code of AOTInductor, which is not run: save the program by "
            "torch.export.save."
        )
    if _MODEL not in members:
        old = "serialized_exported_program.json" in archive.namelist()
        what = "was written by torch 2.7 or earlier" if old else "holds no program named 'model'"
        raise UsageError(f"model file '{path}' {what}: write it by torch.export.save of torch 2.8 or later.")
    packed, unpacked = path.stat().st_size, sum(info.file_size for info in members.values())
    if unpacked > packed:
        raise UsageError(
            f"model file '{path}' has {packed:,} bytes and unpacks to {unpacked:,}, which torch.export.save never "
            "writes: save it again."
        )
    tensors = {
        name: value
        for folder, kind in ((_WEIGHTS, "weights"), (_CONSTANTS, "constants"))
        for name, value in _tensors(archive, members, folder, f"{folder}model_{kind}_config.json", path)
    }
    body = json.loads(archive.read(members[_MODEL]))
    module = body["graph_module"]
    values: dict[str, torch.Tensor | None] = {}
    parameters: set[str] = set()
    images: list[str] = []
    for one in module["signature"]["input_specs"]:
        ((kind, entry),) = one.items()
        name = (entry.get("arg") or {}).get("name", "")
        if kind == "user_input":
            ((form, argument),) = entry["arg"].items()
            images.append(argument["name"] if form == "as_tensor" else form)
        elif kind == "parameter":
            values[name] = tensors[entry["parameter_name"]]
            parameters.add(name)
        elif kind == "buffer":
            values[name] = tensors[entry["buffer_name"]]
        elif kind == "tensor_constant":
            values[name] = tensors[entry["tensor_constant_name"]]
        else:
            raise UsageError(f"model file '{path}' has an input of kind {kind!r:.60}: export a net that has none.")
    graph = module["graph"]
    if len(images) != 1 or images[0] not in graph["tensor_values"]:
        raise UsageError(
            f"model file '{path}' takes {len(images)} inputs ({', '.join(images):.100}): export a net that takes "
            "images alone."
        )
    sides = [side.get("as_int") for side in graph["tensor_values"][images[0]]["sizes"]]
    shape = InputShape.read(sides, path)
    return Program(path, graph, values, frozenset(parameters), images[0], shape, _keys(module))


def _tensors(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: str, config: str, path: Path
) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the tensors of a folder of the archive by name; equal files are read once."""
    if config not in members:
        return
    contents: dict[str, bytearray] = {}
    for name, entry in json.loads(archive.read(members[config]))["config"].items():
        file = f"{folder}{entry['path_name']}"
        meta = entry["tensor_meta"]
        if file not in members or meta is None:
            raise UsageError(f"model file '{path}' has no plain tensor {name!r:.80}: export a net that has none.")
        if entry["use_pickle"]:
            yield name, torch.load(io.BytesIO(archive.read(members[file])), map_location="cpu", weights_only=True)
            continue
        content = contents.setdefault(file, bytearray(archive.read(members[file])))
        dtype = DTYPES[meta["dtype"]]
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        sizes, strides = ([side["as_int"] for side in meta[key]] for key in ("sizes", "strides"))
        if math.prod(sizes) * dtype.itemsize > max(len(content), _MAX_REPEATED):
            raise UsageError(
                f"model file '{path}' has a tensor {name!r:.80} larger than its numbers: save it again."
            )
        yield name, flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"]).clone()


def _keys(module: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the keys of a dict of tensors that the net returns; None if it returns something else."""
    calls = module.get("module_call_graph") or [{}]
    spec = json.loads((calls[0].get("signature") or {}).get("out_spec") or "[1, {}]")[1]
    if spec.get("type") != "builtins.dict" or any(child["type"] is not None for child in spec["children_spec"]):
        return None
    keys = json.loads(spec["context"])
    return tuple(map(str, keys))
