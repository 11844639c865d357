"""Reads and writes the files of a run folder; files are written atomically."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.core.schema import build, check_format, checked, parse
from robustkit.core.writing import replacing, write
from robustkit.data.sources.archive import DAMAGE, member
from robustkit.runs.corruption_record import Corruptions, CorruptionSpec
from robustkit.runs.craft_record import Craft, CraftSpec, Matrix
from robustkit.runs.diversity_record import Diversity, DiversitySpec
from robustkit.runs.evaluation_record import Report
from robustkit.runs.spec import RunSpec, dumps
from robustkit.runs.training_record import METRICS, RECORD, Epoch, Trained, TrainSpec

SPEC, LEDGER, REPORT, ADVERSARIAL = "spec.json", "ledger.sqlite", "report.json", "adversarial.npz"
TRANSFER, MATRIX, DIVERSITY = "transfer.json", "matrix.json", "diversity.json"
CORRUPTIONS = "corruptions.json"
# Folders inside a run's, deleted when it is done: of unfinished work, and of the run that audits robust images.
UNFINISHED, AUDIT = ".unfinished", ".audit"
EXAMPLES, PAGE = "examples.npz", "report.html"
# Their kinds of numbers, and shapes: M fooled images, S shown ones.
EXAMPLE_ARRAYS = {
    "index": ("i", "M"),
    "distance": ("f", "M"),
    "prediction": ("i", "M"),
    "shown": ("i", "S"),
    "hard": ("b", "S"),
    "clean": ("f", "SCHW"),
    "adversarial": ("f", "SCHW"),
    "shape": ("i", "3"),
    "classes": ("U", "K"),
}
ADVERSARIAL_ARRAYS = {"index": ("i", "M"), "x": ("f", "MCHW"), "y": ("i", "M")}
# The record that identifies a run of each verb; that of an evaluation is its report.
RECORDS = {TRANSFER: "craft", MATRIX: "matrix", DIVERSITY: "diversity", CORRUPTIONS: "corrupt", RECORD: "train"}
SEALED = (SPEC, LEDGER, ADVERSARIAL, EXAMPLES)
# The ledger of a craft run grows with each forecast or budget; its own hashes are checked when it is opened.
CRAFT_SEALED = (SPEC, ADVERSARIAL)
Spec = RunSpec | CraftSpec | TrainSpec | DiversitySpec | CorruptionSpec
SPECS = {
    "evaluate": RunSpec,
    "craft": CraftSpec,
    "train": TrainSpec,
    "diversity": DiversitySpec,
    "corrupt": CorruptionSpec,
}


@dataclass(frozen=True)
class Adversarials:
    """The fooling images in order: `index` and `labels` (M), int64; `images()` yields their float32 bytes."""

    index: np.ndarray
    labels: np.ndarray
    shape: tuple[int, ...]
    images: Callable[[], Iterator[bytes]]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return `index` (M), `x` (M C H W) and `y` (M), in memory."""
        x = np.frombuffer(bytearray().join(self.images()), dtype=np.float32)
        return {"index": self.index, "x": x.reshape(len(self.index), *self.shape), "y": self.labels}


def read_spec(path: Path) -> Spec:
    """Return the spec of a run folder; UsageError if it is none."""
    body, name = _read_json(path / SPEC), str(path / SPEC)
    check_format(body, name)
    spec: Spec = build(SPECS.get(str(body.get("verb")), RunSpec), body, name)
    return spec


def is_craft(path: Path) -> bool:
    """Return whether a folder holds a finished craft run."""
    return (path / TRANSFER).is_file()


def kind(path: Path) -> str:
    """Return the verb whose record a folder holds; `train` for an unfinished training, else `evaluate`."""
    for name, verb in RECORDS.items():
        if (path / name).is_file():
            return verb
    body = _read_json(path / SPEC) if (path / SPEC).is_file() else None
    return "train" if isinstance(body, Mapping) and body.get("verb") == "train" else "evaluate"


def read_report(path: Path, *, forged: bool = False) -> Report:
    """Return the report of a finished run; `forged` accepts one that contradicts itself.

    Raises:
        UsageError: the folder holds none, or it is damaged.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is no run folder: it does not exist.")
    _refuse_others(path)
    if is_craft(path):
        raise UsageError(f"{path} holds crafted images, not an evaluation; see: robustkit report {path}")
    if not (path / REPORT).exists() and (path / SPEC).exists():
        raise UsageError(f"the run in {path} is not finished; run its command again to resume it.")
    report = Report.from_json(_read_json(path / REPORT), str(path / REPORT))
    if not forged and (fault := next(report.contradictions(), None)):
        raise UsageError(f"{path / REPORT} is damaged: it has {fault}; see: robustkit verify {path}")
    return report


def read_craft(path: Path) -> Craft:
    """Return the record of a finished craft run; UsageError if the folder holds none."""
    if not path.is_dir():
        raise UsageError(f"{path} is no run folder: it does not exist.")
    _refuse_others(path)
    if (path / REPORT).exists():
        raise UsageError(f"{path} holds an evaluation, not crafted images; see: robustkit report {path}")
    if not is_craft(path) and (path / SPEC).exists():
        raise UsageError(f"the run in {path} is not finished; run its command again to resume it.")
    return Craft.from_json(_read_json(path / TRANSFER), str(path / TRANSFER))


def broken_seals(path: Path, report: Report | Craft) -> list[str]:
    """Return a sentence for each file whose bytes are not those the report names.

    Only the files of a run are looked at, and only in its folder: a report may name any path of this machine.
    """
    found = []
    for name, expected in report.files.items():
        if name not in SEALED:
            found.append(f"{path} has a record that names {name!r}, which is no file of a run and is not read.")
        elif (path / name).is_symlink():
            found.append(f"{path / name} is a link, not a file of the run, and is not followed.")
        elif not (path / name).is_file():
            found.append(f"{path / name} is missing.")
        elif (actual := sha256(path / name)) != expected:
            found.append(f"{path / name} has changed since the run: sha256 {actual[:12]}…, was {expected[:12]}….")
    return found


def check_seals(path: Path, record: Craft) -> None:
    """Raise UsageError if a file is not the one that the record of a craft run names."""
    if broken := broken_seals(path, record):
        raise UsageError(f"{broken[0]} Restore it, or craft again in another folder.")


def write_report(path: Path, report: Report) -> None:
    """Write report.json, whose presence means that the run is finished."""
    with replacing(path / REPORT) as file:
        for piece in report.text():
            file.write(piece.encode())


def read_diversity(path: Path) -> Diversity:
    """Return the record of a finished comparison of members; UsageError if the folder holds none."""
    return Diversity.from_json(_read_json(path / DIVERSITY), str(path / DIVERSITY))


def read_corruptions(path: Path) -> Corruptions:
    """Return the record of accuracies on corrupted images; UsageError if the folder holds none."""
    return Corruptions.from_json(_read_json(path / CORRUPTIONS), str(path / CORRUPTIONS))


def read_matrix(path: Path) -> Matrix:
    """Return the record of a finished transfer matrix; UsageError if the folder holds none."""
    return Matrix.from_json(_read_json(path / MATRIX), str(path / MATRIX))


def read_trained(path: Path) -> Trained:
    """Return the record of a finished training; UsageError if the folder holds none."""
    if path.is_dir() and not (path / RECORD).is_file():
        raise UsageError(f"{path} holds no finished training: it has no {RECORD}.")
    return Trained.from_json(_read_json(path / RECORD), str(path / RECORD))


def read_training(path: Path) -> tuple[TrainSpec, list[dict[str, Any]], Trained | None]:
    """Return spec, facts of each epoch and record of a training; one that goes on has no record yet."""
    spec = read_spec(path)
    if not isinstance(spec, TrainSpec):
        raise UsageError(f"{path / SPEC} is of robustkit {spec.verb}, not of a training.")
    if (path / RECORD).is_file():
        record = read_trained(path)
        return spec, [dict(facts) for facts in record.history], record
    if not (path / METRICS).is_file():
        return spec, [], None
    try:
        lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path / METRICS} cannot be read: {error}.") from error
    names = [f"{path / METRICS}, line {number}," for number in range(1, len(lines) + 1)]
    return spec, [checked(Epoch, parse(line, name), name) for line, name in zip(lines, names, strict=True)], None


def write_record(path: Path, record: Craft | Matrix | Diversity | Corruptions) -> None:
    """Write transfer.json, matrix.json, diversity.json or corruptions.json."""
    name = {Craft: TRANSFER, Matrix: MATRIX, Diversity: DIVERSITY, Corruptions: CORRUPTIONS}[type(record)]
    write(path / name, (dumps(record.to_json(), indent=2) + "\n").encode())


def write_adversarial(path: Path, rows: Adversarials) -> None:
    """Write adversarial.npz, image by image: it may be larger than memory. Same rows, same bytes."""
    arrays = {
        "index": rows.index,
        "x": np.broadcast_to(np.float32(0), (len(rows.index), *rows.shape)),
        "y": rows.labels,
    }
    with replacing(path / ADVERSARIAL) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                for block in rows.images() if name == "x" else [array.tobytes()]:
                    member.write(block)


def read_adversarial(path: Path) -> dict[str, np.ndarray]:
    """Return `index`, `x` and `y` of adversarial.npz; UsageError if it is damaged or absent.

    A large `x` is memory-mapped, for it may be larger than memory. What is written into it stays out of the file.
    """
    if not (path / ADVERSARIAL).is_file():
        raise UsageError(f"{path / ADVERSARIAL} is missing.")
    arrays = _read_arrays(path / ADVERSARIAL, ADVERSARIAL_ARRAYS, "c")
    return {name: array if array.flags.writeable else array.copy() for name, array in arrays.items()}


def write_examples(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write examples.npz (see `robustkit.runs.examples`). Same arrays, same bytes."""
    with replacing(path / EXAMPLES) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_examples(path: Path, report: Report | Craft) -> dict[str, np.ndarray] | None:
    """Return the arrays of examples.npz, None where a run has none; UsageError if it is damaged."""
    file = path / EXAMPLES
    if not file.is_file():
        return None
    expected = report.files.get(EXAMPLES)
    if expected is not None and sha256(file) != expected:
        raise UsageError(f"{file} has changed since the run; restore it, or delete it to go on without it.")
    return _read_arrays(file, EXAMPLE_ARRAYS)


def _read_arrays(
    file: Path, forms: Mapping[str, tuple[str, str]], mode: Literal["r", "c"] = "r"
) -> dict[str, np.ndarray]:
    """Return arrays of a run's file, which is no larger in memory than on the disk.

    Args:
        file: the file.
        forms: of each array the kind of its numbers, and its axes: a digit is a length, and those of the same
            letter are equally long.
        mode: that of `numpy.memmap`, for large arrays.

    Raises:
        UsageError: the file is damaged, or of no run.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("it is compressed, which no run's is")
            arrays = {name: member(file, archive, name, mode) for name in forms}
        lengths: dict[str, int] = {}
        for name, (kind, axes) in forms.items():
            shape, dtype = arrays[name].shape, arrays[name].dtype
            fits = dtype.kind == kind and len(axes) == len(shape)
            for axis, length in zip(axes, shape, strict=False):
                fits &= length == (int(axis) if axis.isdigit() else lengths.setdefault(axis, length))
            if not fits:
                raise ValueError(f"its {name!r} is {dtype} of shape {shape}")
    except (OSError, *DAMAGE) as error:
        raise UsageError(f"{file} cannot be read: {error}; restore it from a copy, or run again.") from error
    return arrays


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        total = hashlib.sha256()
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _refuse_others(path: Path) -> None:
    if (path / DIVERSITY).is_file():
        raise UsageError(f"{path} compares an ensemble's members; see: robustkit report {path}")
    if (path / CORRUPTIONS).is_file():
        raise UsageError(f"{path} holds accuracies on corrupted images; see: robustkit report {path}")
    if (path / RECORD).is_file():
        raise UsageError(f"{path} holds a trained model, not a result; see: robustkit evaluate {path}/")


def _read_json(path: Path) -> Any:
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} cannot be read: it is not a regular file.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path.parent} is no run folder: it has no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    return parse(text, str(path))
