"""Which tensor of what a net returns is its logits, and their form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.models.options import LOGIT

# Names that libraries give the scores of classes; `logits` is preferred to the others.
LOGITS = "logits"
KNOWN = frozenset(
    {LOGITS, "logit", "out", "output", "outputs", "scores", "score", "pred", "preds", "prediction", "predictions"}
    | {"cls_logits", "class_logits", "y_hat", "y_pred"}
)
# How deep containers are searched, and how many tensors a message lists.
_DEPTH, _LISTED = 3, 6


@dataclass
class LogitsReader:
    """Finds the logits in what a net returns, at the same place in every pass.

    A single tensor is the logits. Among several, a name and a shape speak for one: `logits`, or else the only one
    with a name of `KNOWN`; and the only one of shape (B, classes). Where they disagree, or neither is clear and
    more than one could be logits, the user has to choose.

    Attributes:
        model: What errors call the model.
        output: Where the logits are, as the user wrote it: a key, attribute or index, or several joined by dots.
        binary: None for logits (B, K); `logit` for a net that returns one number z per image, read as logits
            (0, z); `probability` for one that returns the probability p of class 1, read as (1 - p, p).
        classes: Number of classes of the net, or of the data where that is unknown.
        place: Where the logits were found in the first pass.
        width: Number of logits per image in the first pass.
        dtype: Type of a tensor (B, width) that is the logits as it is, once one was read.
        checked: Whether the first pass has shown that what was called probabilities lies in [0, 1].
    """

    model: str = "a net"
    output: str | None = None
    binary: str | None = None
    classes: int | None = None
    place: str | None = None
    width: int | None = None
    dtype: torch.dtype | None = None
    checked: bool = False

    def read(self, output: object, rows: int) -> Tensor:
        """Return the logits (B, K), in float32 or float64.

        Args:
            output: What the net returned.
            rows: Number of images B that it was given.

        Raises:
            UsageError: There is no tensor, it is not clear which one is meant, or it has not the shape of logits.
        """
        tensor = self._chosen(output, rows)
        tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
        if tensor.is_complex():
            raise UsageError(f"model {self.model!r} returned complex numbers: return logits, as real ones.")
        if self.binary is not None:
            return self._two_classes(tensor, rows)
        logits = _as_rows(tensor, rows)
        if logits.ndim != 2 or len(logits) != rows or logits.shape[1] < 2:
            raise self._refused(tensor, rows)
        self.width = self.width or logits.shape[1]
        if logits.shape[1] != self.width:
            raise UsageError(
                f"model {self.model!r} returned {logits.shape[1]} logits per image, and {self.width} in another "
                "pass: return as many for all images."
            )
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        self.dtype = logits.dtype if logits is output else None
        return logits

    def _chosen(self, output: object, rows: int) -> Tensor:
        """Return the tensor that holds the logits."""
        if isinstance(output, Tensor):
            if self.output is not None:
                raise UsageError(
                    f"model {self.model!r} returns one tensor, so there is nothing to choose: leave "
                    f"output={self.output} out."
                )
            return output
        tensors = dict(_tensors(output, _DEPTH))
        if not tensors:
            raise UsageError(
                f"model {self.model!r} returned a {type(output).__name__} without a tensor in it: return "
                "logits of shape (B, K)."
            )
        if self.place is None:
            self.place = self._clear_choice(self._asked_for(output, tensors), rows)
        if self.place not in tensors:
            raise UsageError(
                f"model {self.model!r} returned no {self.place!r} for {_images(rows)} but {_listed(tensors)}: "
                "return the same entries for all images."
            )
        return tensors[self.place]

    def _asked_for(self, output: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors below the place that the user wrote; all of them without one."""
        if self.output is None:
            return tensors
        names = [name for name, _ in _entries(output)]
        wanted = [self.output]
        # The fields of a named tuple have numbers, too.
        if self.output.isdecimal() and int(self.output) < len(names):
            wanted += [names[int(self.output)]]
        for name in wanted:
            below = {key: tensor for key, tensor in tensors.items() if key == name or key.startswith(f"{name}.")}
            if below:
                return below
        raise UsageError(
            f"model {self.model!r} returned no tensor {self.output!r} but {_listed(tensors)}: write output= with "
            "one of these names."
        )

    def _clear_choice(self, tensors: dict[str, Tensor], rows: int) -> str:
        """Return the name of the only tensor that can be meant."""
        if len(tensors) == 1:
            return next(iter(tensors))
        able = [name for name, tensor in tensors.items() if self._is_able(tensor, rows)]
        single = [name for name, tensor in tensors.items() if tensor.ndim and tensor.numel() == rows]
        if self.binary is None:
            exact = [name for name in able if _as_rows(tensors[name], rows).shape[1] == self.classes]
        else:
            exact = able
        # One number per image under such a name is an output that needs `binary`.
        known = [name for name in tensors if _last(name) in KNOWN and (name in able or name in single)]
        named = [name for name in known if _last(name) == LOGITS] or known
        if len(named) == 1 and (not exact or named[0] in exact):
            return named[0]
        if len(exact) == 1 and len(named) != 1:
            return exact[0]
        if not named and not exact and len(able) == 1 and not single:
            return able[0]
        if self.binary is not None and not able:
            raise UsageError(
                f"model {self.model!r} returned {_listed(tensors)} for {_images(rows)}, none with one number per "
                f"image: leave binary={self.binary} out."
            )
        first = (exact or named or able or list(tensors))[0]
        if self.model.startswith("python:"):
            advice = f"pass robustkit.as_classifier(model, output={first!r})"
        else:
            advice = f"write output={first} in the query of its string"
        raise UsageError(
            f"model {self.model!r} returned {_listed(tensors)} for {_images(rows)}, and it is not clear which are "
            f"the logits: {advice}, or another of these."
        )

    def _is_able(self, tensor: Tensor, rows: int) -> bool:
        """Return whether a tensor has the shape of logits."""
        if self.binary is not None:
            return tensor.numel() == rows
        logits = _as_rows(tensor, rows)
        return logits.ndim == 2 and len(logits) == rows and logits.shape[1] > 1

    def _two_classes(self, tensor: Tensor, rows: int) -> Tensor:
        """Return one number per image as the logits of two classes."""
        if tensor.numel() != rows:
            raise UsageError(
                f"model {self.model!r} returned shape {tuple(tensor.shape)} for {_images(rows)}, not one number "
                f"per image: leave binary={self.binary} out."
            )
        z = tensor.reshape(rows)
        z = z if z.dtype in (torch.float32, torch.float64) else z.float()
        if self.binary == LOGIT:
            return torch.stack((torch.zeros_like(z), z), 1)
        if not self.checked:
            outside = z.detach()[(z < 0) | (z > 1)]
            if len(outside):
                raise UsageError(
                    f"model {self.model!r} returned {float(outside[0]):.4g}, which is no probability: write "
                    f"binary={LOGIT} if it is a logit."
                )
            self.checked = True
        return torch.stack((1 - z, z), 1)

    def _refused(self, tensor: Tensor, rows: int) -> UsageError:
        """Return the error for a tensor that is no logits."""
        start = f"model {self.model!r} returned shape {tuple(tensor.shape)} for {_images(rows)}: "
        if tensor.numel() == rows and tensor.is_floating_point():
            if self.model.startswith("python:"):
                ways = ["robustkit.as_classifier(model, binary='logit')", "binary='probability'"]
                verb = "pass"
            else:
                ways, verb = ["?binary=logit", "?binary=probability"], "write"
            return UsageError(
                f"{start}{verb} {ways[0]} if this is the logit of class 1 against class 0, {ways[1]} if it is its "
                "probability."
            )
        return UsageError(f"{start}return logits of shape ({rows}, K) with K of at least 2.")


def _as_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return logits (B, K) that were left with more axes of length 1, or lost theirs of one image to `squeeze`."""
    if tensor.ndim == 1 and rows == 1:
        return tensor[None]
    if tensor.ndim > 2 and tensor.shape[2:].numel() == 1:
        return tensor.flatten(1)
    return tensor


def _tensors(output: object, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a container by name: keys, attributes and indices, joined by dots."""
    for name, value in _entries(output):
        if isinstance(value, Tensor):
            yield name, value
        elif depth > 1:
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _tensors(value, depth - 1))


def _entries(output: object) -> Iterator[tuple[str, object]]:
    if isinstance(output, Mapping):
        yield from ((str(name), value) for name, value in output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    elif isinstance(output, (tuple, list)):
        yield from ((str(number), value) for number, value in enumerate(output))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from ((field.name, getattr(output, field.name, None)) for field in dataclasses.fields(output))
    elif not isinstance(output, (nn.Module, type)):
        yield from getattr(output, "__dict__", {}).items()


def _images(rows: int) -> str:
    return f"{rows} image{'s' * (rows != 1)}"


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _listed(tensors: Mapping[str, Tensor]) -> str:
    """Return tensors by name and shape, for a message."""
    parts = [f"{name!r} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:_LISTED]]
    more = len(tensors) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")
