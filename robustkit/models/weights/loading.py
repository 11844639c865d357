"""Weights put into a net: chosen among what a file holds, checked against the net, and copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from robustkit.core.errors import UsageError
from robustkit.models.weights.files import WeightsFile, damaged, index_of, short_list
from robustkit.models.weights.fitting import Convert, Fit, Unfit, chosen, names_of, normaliser

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Loaded:
    """What a weights file has beside its tensors.

    Attributes:
        mean: Channel means of a normalisation layer that the file has before the net.
        std: Channel deviations, likewise.
        notes: Sentences for the user: what else the file holds, and what was not loaded.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    notes: tuple[str, ...]


def put_weights(
    net: object, file: WeightsFile, arch: str, *, choice: str | None = None, convert: Convert | None = None
) -> Loaded:
    """Copy a file's tensors into a net; `num_batches_tracked`, which no prediction depends on, may differ.

    Args:
        net: The net.
        file: What the weights file holds.
        arch: What errors call the net.
        choice: Which of several sets of tensors is meant (see `fitting.chosen`).
        convert: What turns another library's names into the net's.

    Raises:
        UsageError: The net takes no weights, the file holds no tensors, NaN or whole numbers, or the names or
            shapes of its tensors are not those of the net.
    """
    if not isinstance(net, nn.Module):
        raise UsageError(
            f"{arch} is a {type(net).__name__} and takes no weights: return a torch.nn.Module, or leave out "
            f"'@{file.path}'."
        )
    if not file.sets:
        raise _no_tensors(file)
    own = names_of(net)
    fit, others = chosen(file, own, choice, convert)
    if isinstance(fit, Unfit):
        raise _unfit(fit, own, file, arch)
    _check_shapes(own, fit.state, file, arch)
    floats = {name for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    for name, tensor in fit.state.items():
        if name in floats and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(
                f"weights file '{file.path}' has {name!r} in {kind}, where {arch} has floating-point numbers: "
                "save the net in float32, not quantised."
            )
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UsageError(f"weights file '{file.path}' has NaN or infinite values in {name!r}: save it again.")
    try:
        net.load_state_dict(fit.state, strict=False)
    except RuntimeError as error:
        raise damaged(file.path) from error
    normalisation = normaliser(fit, file)
    mean, std = normalisation[1:] if normalisation else (None, None)
    return Loaded(mean, std, tuple(_notes(file, fit, others, normalisation[0] if normalisation else None)))


def _notes(file: WeightsFile, fit: Fit, others: list[Fit], mean: str | None) -> list[str]:
    notes = []
    where = f"weights file '{file.path.name}'"
    if averages := sorted(other.name for other in others if other.is_average):
        notes.append(
            f"{where} holds a moving average of the weights, too ({short_list(averages)}): weights={averages[0]} "
            "evaluates that instead"
        )
    if fit.is_average:
        notes.append(f"the weights are the moving average {fit.name!r} of {where}")
    if mean is not None:
        notes.append(f"mean and std are those of {mean!r} in {where}, unless the model's string gives others")
    used = () if mean is None else (mean.rpartition(".")[0],)
    rest = [name for name, value in fit.beside.items() if value.ndim and name.rpartition(".")[0] not in used]
    other = {id(tensor) for one in others for tensor in one.state.values()}
    if rest := [name for name in rest if id(fit.beside[name]) not in other]:
        notes.append(
            f"{where} holds {len(rest)} tensors beside the net's, which are not used ({short_list(rest)})"
        )
    if file.left_out:
        notes.append(f"{where} holds Python objects, which are not loaded ({short_list(list(file.left_out), 6)})")
    return notes


def _no_tensors(file: WeightsFile) -> UsageError:
    start = f"weights file '{file.path}' holds"
    if file.modules:
        ((entry, kind), *_) = file.modules.items()
        where = f" under {entry!r}" if entry else ""
        return UsageError(
            f"{start} a whole module of class {kind}{where}, and loading it would run code: in the program that "
            "wrote it, load it and save its tensors by torch.save(net.state_dict(), FILE)."
        )
    if any(name.endswith(".ndarray") for name in file.left_out):
        return UsageError(
            f"{start} arrays of numpy, which are not loaded: load it in your own program, and save them by "
            "torch.save({name: torch.as_tensor(value) for name, value in state.items()}, FILE)."
        )
    rest = f" (what is made by {short_list(list(file.left_out))} is not loaded)" if file.left_out else ""
    return UsageError(f"{start} {file.content} but no tensors{rest}: save the net's state_dict() in it.")


def _unfit(fit: Unfit, own: Mapping[str, torch.Size], file: WeightsFile, arch: str) -> UsageError:
    faults = []
    if fit.missing:
        faults.append(f"lacks {len(fit.missing)} of its {len(own)} tensors ({short_list(fit.missing)})")
    if fit.unexpected:
        faults.append(f"has {len(fit.unexpected)} that it does not know ({short_list(fit.unexpected)})")
    index = index_of(file.path)
    advice = f"write its index, '{index.name}'" if index else "write the architecture that it was saved from"
    if not fit.missing:
        advice += ", or leave these out of the file if they are heads that are not used for the logits"
    return UsageError(f"weights file '{file.path}' does not fit {arch}: it {' and '.join(faults)}; {advice}.")


def _check_shapes(
    own: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor], file: WeightsFile, arch: str
) -> None:
    wrong = [name for name, tensor in state.items() if tensor.shape != own[name]]
    if not wrong:
        return
    # The file's order may be alphabetical (bias first); a weight's shape describes the layer better than a bias's.
    name = max(wrong, key=lambda name: len(own[name]))
    stored, wanted = tuple(state[name].shape), tuple(own[name])
    head_only = len({name.rpartition(".")[0] for name in wrong}) == 1
    if head_only and len(stored) == 2 and stored[1:] == wanted[1:]:
        advice = f"write num_classes={stored[0]}"
    else:
        advice = "write the architecture that it was saved from"
    raise UsageError(
        f"weights file '{file.path}' does not fit {arch}: {name!r} has shape {stored} there and "
        f"{wanted} in the net; {advice}."
    )
