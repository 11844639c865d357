"""What is sent to a model behind an endpoint, and how its reply is read: one class for each protocol."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from robustkit.core.errors import RunError, UsageError

Array = npt.NDArray[Any]
PNG, ARRAY = "png", "array"
# The entries of a reply in our own format with a row of numbers for each image, and those with a label each.
SCORES, LABELS = ("logits", "scores", "probabilities"), ("labels", "label")


@dataclass(frozen=True)
class Message:
    """What is posted: a path below the URL, and JSON or the bytes of one image."""

    body: Any = None
    image: bytes | None = None
    path: str = ""


@dataclass(frozen=True)
class Reply:
    """The model's output for the images of a message: scores (B, K), or labels (B)."""

    scores: Array | None = None
    labels: Array | None = None


class ServerProtocol(Protocol):
    """A protocol of model servers."""

    @property
    def one_image(self) -> bool:
        """Whether a request holds one image."""
        ...

    def message(self, x: Array) -> Message:
        """Return the message for images (B, C, H, W), float32 in [0, 1]."""
        ...

    def reply(self, body: Any, n: int) -> Reply:
        """Return the output for n images; ValueError that says what is wrong with the reply."""
        ...


@dataclass(frozen=True)
class Plain:
    """The format of robustkit: {"images": [...]} to {"scores": [[...], ...]} or {"labels": [...]}.

    An image is a PNG in base64, or nested lists (C, H, W) of numbers in [0, 1].
    """

    images: str = PNG
    one_image: bool = False

    def message(self, x: Array) -> Message:
        """Return the message for images."""
        return Message(
            {"images": [base64.b64encode(png(one)).decode() for one in x] if self.images == PNG else x.tolist()}
        )

    def reply(self, body: Any, n: int) -> Reply:
        """Return the output for n images."""
        if not isinstance(body, Mapping):
            raise ValueError(f"it is no JSON object, but {type(body).__name__}")
        for name in SCORES:
            if name in body:
                return Reply(scores=numbers(body[name], n, 2))
        for name in LABELS:
            if name in body:
                return Reply(labels=numbers(body[name], n, 1))
        raise ValueError(f"it has none of the entries {', '.join((*SCORES, *LABELS))}")


@dataclass(frozen=True)
class KServe:
    """The Open Inference Protocol (KServe v2), with the tensors as JSON.

    Attributes:
        input: the name of the images' tensor, as the server's metadata say.
        output: the name of the output that is read.
        datatype: of the images' tensor.
    """

    input: str
    output: str
    datatype: str = "FP32"
    one_image: bool = False

    @classmethod
    def of(cls, metadata: Any, output: str | None) -> KServe:
        """Return the protocol for a model by its metadata; ValueError that says what is missing in them."""
        try:
            inputs, outputs = metadata["inputs"], metadata["outputs"]
            names = [str(one["name"]) for one in outputs]
            kind = str(inputs[0]["datatype"])
            name = str(inputs[0]["name"])
        except (KeyError, IndexError, TypeError):
            raise ValueError("its metadata do not name the inputs and outputs of a model") from None
        if len(inputs) != 1 or kind not in ("FP32", "FP64", "FP16"):
            raise ValueError(f"it has {len(inputs)} inputs, the first of type {kind}, not one of floats")
        if output is not None and output not in names:
            raise ValueError(f"it has no output {output!r}, but {', '.join(names)}")
        return cls(name, output or names[0], kind)

    def message(self, x: Array) -> Message:
        """Return the message for images."""
        tensor = {
            "name": self.input,
            "shape": list(x.shape),
            "datatype": self.datatype,
            "data": x.ravel().tolist(),
        }
        return Message({"inputs": [tensor], "outputs": [{"name": self.output}]}, path="/infer")

    def reply(self, body: Any, n: int) -> Reply:
        """Return the output for n images."""
        try:
            tensor = next(one for one in body["outputs"] if one["name"] == self.output)
            values = np.asarray(tensor["data"]).reshape(tensor["shape"])
        except (KeyError, TypeError, ValueError, StopIteration):
            raise ValueError(f"it has no tensor {self.output!r} with its shape and data") from None
        if values.ndim == 1 and values.dtype.kind in "iu":
            return Reply(labels=numbers(values, n, 1))
        return Reply(scores=numbers(values, n, 2))


@dataclass(frozen=True)
class TorchServe:
    """TorchServe's predictions: one PNG for each request; scores by class, a list of scores, or a label.

    Attributes:
        classes: names of the classes in the order of their numbers, where the server returns names.
        num_classes: K, where the server returns the best classes only.
    """

    classes: Sequence[str] = ()
    num_classes: int | None = None
    one_image: bool = field(default=True)

    def message(self, x: Array) -> Message:
        """Return the message for one image."""
        return Message(image=png(x[0]))

    def reply(self, body: Any, n: int) -> Reply:
        """Return the output for one image."""
        if isinstance(body, Mapping):
            numbered = [(self._number(name), score) for name, score in body.items()]
            count = self.num_classes or len(self.classes) or len(numbered)
            if max(number for number, _ in numbered) >= count:
                raise ValueError("it names the best classes only; write num_classes=K")
            # A class that is not among the best has a score below theirs.
            row = np.full(count, min(float(score) for _, score in numbered) / 2)
            for number, score in numbered:
                row[number] = float(score)
            return Reply(scores=numbers(row[None], 1, 2))
        if isinstance(body, list):
            return Reply(scores=numbers([body[0] if len(body) == 1 and isinstance(body[0], list) else body], 1, 2))
        if isinstance(body, int) and not isinstance(body, bool):
            return Reply(labels=numbers([body], 1, 1))
        raise ValueError(f"it is {type(body).__name__}, not scores by class, a list of scores, or a label")

    def _number(self, name: str) -> int:
        if name in self.classes:
            return list(self.classes).index(name)
        if not name.isdecimal():
            raise ValueError(f"it names the class {name!r}; add classes=FILE, the names in order")
        return int(name)


def numbers(values: Any, n: int, axes: int) -> Array:
    """Return values as an array with this many axes and n rows; ValueError if they are not that."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("it holds values that are no numbers, or rows of different lengths") from None
    if array.ndim != axes or len(array) != n or array.size == 0:
        raise ValueError(f"it has an array of shape {array.shape} for {n} images")
    if axes == 1 and not (np.equal(array, np.floor(array)).all() and (array >= 0).all()):
        raise ValueError("it has labels that are no whole numbers from 0")
    return array


def png(image: Array) -> bytes:
    """Return an image (C, H, W) in [0, 1] as PNG with 8 bits; UsageError unless it has 1 or 3 channels."""
    if len(image) not in (1, 3):
        raise UsageError(f"a PNG has 1 or 3 channels, the images have {len(image)}; write images=array.")
    pixels = np.rint(image * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def unreadable(url: str, error: ValueError) -> RunError:
    """Return the error for a reply that cannot be read."""
    return RunError(f"the reply of {url} cannot be read: {error}; check format= and the server.")
