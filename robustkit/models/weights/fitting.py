"""Which tensors of a weights file are a net's: found by the net's own names, whatever prefix they have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.models.weights.files import Tensors, WeightsFile

_COUNTER = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var")
# What wrappers put into names, at any place: DataParallel, torch.compile, FSDP and activation checkpoints.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_AVERAGE = re.compile(r"(^|[._])(w?ema|shadow|averaged?|swa|avg)([._]|$)", re.IGNORECASE)
_MEANS = ("mean", "new_mean", "image_mean", "pixel_mean", "img_mean", "mu")
_STDS = ("std", "new_std", "image_std", "pixel_std", "img_std", "sigma")
_MAX_CHANNELS = 16

# Turns the tensors of another library's checkpoint into those of a net.
Convert = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Fit:
    """Tensors of a file that are all of a net's.

    Attributes:
        name: The entry of the file and the prefix of the tensors' names in it, joined by dots.
        state: The tensors by the net's names.
        beside: The other tensors of the entry, by the file's names.
    """

    name: str
    state: Tensors
    beside: Tensors

    @property
    def is_average(self) -> bool:
        """Whether they are a moving average of the weights, by their name."""
        return bool(_AVERAGE.search(self.name))


@dataclass(frozen=True)
class Unfit:
    """The entry of a file that is nearest to a net, and what keeps it from being the net's.

    Attributes:
        missing: Tensors of the net that are not there.
        unexpected: Tensors that the net has not.
    """

    missing: list[str]
    unexpected: list[str]


def names_of(net: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a net's tensors by name."""
    return {name: value.shape for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}


def chosen(
    file: WeightsFile, own: Mapping[str, torch.Size], choice: str | None = None, convert: Convert | None = None
) -> tuple[Fit | Unfit, list[Fit]]:
    """Return the tensors that are meant, and those that would have fitted as well.

    Of several that fit, those are meant that are no moving average, if these are one. Where none fits, the nearest
    says why.

    Args:
        file: What the weights file holds.
        own: Shapes of the net's tensors by name.
        choice: Which entry the user wants, by its name or a part of it; None for what is clear.
        convert: Tried on entries that do not fit as they are.

    Raises:
        UsageError: Several fit and none is chosen, or the file has no such entry.
    """
    sets = {entry: _listed(tensors, own) for entry, tensors in file.sets.items()}
    fits, unfit = _all(sets, own)
    if not fits and convert is not None:
        fits, _ = _all({name: _converted(tensors, convert) for name, tensors in sets.items()}, own)
    if fits:
        fits += _all(_with_statistics(sets, fits), own)[0]
    if choice is not None:
        picked = _picked([fit.name for fit in fits], choice)
        if not picked:
            picked = _picked(list(sets), choice)
            if not picked:
                known = sorted({fit.name for fit in fits} | sets.keys() - {""})
                raise did_you_mean(f"set of tensors in weights file '{file.path}'", choice, known)
            return _all({name: sets[name] for name in picked}, own)[1], []
        fits = [fit for fit in fits if fit.name in picked]
    if not fits:
        return unfit, []
    meant = [fit for fit in fits if not fit.is_average] or fits
    if len(meant) > 1:
        meant = [fit for fit in meant if _shapes_fit(fit, own)] or meant
    if len(meant) > 1:
        names = ", ".join(sorted(fit.name for fit in meant))
        raise UsageError(
            f"weights file '{file.path}' holds several sets of tensors that fit ({names}): write for example "
            f"weights={meant[0].name} in the model's query."
        )
    return meant[0], [fit for fit in fits if fit is not meant[0]]


def sizes_in(
    file: WeightsFile, net: nn.Module, choice: str | None = None, convert: Convert | None = None
) -> tuple[int | None, int | None]:
    """Return the number of classes and of channels of a net's tensors in a file, where they are not the net's.

    Classes are the first dimension of the only layer that differs in nothing else, channels the second one of the
    first convolution. See `chosen` for the arguments and errors.
    """
    own = names_of(net)
    fit, _ = chosen(file, own, choice, convert)
    if isinstance(fit, Unfit):
        return None, None
    heads: dict[str, int] = {}
    stem = next((name for name, shape in own.items() if len(shape) == 4), "")
    channels = None
    for name, wanted in own.items():
        stored = fit.state[name].shape if name in fit.state else wanted
        if stored == wanted or len(stored) != len(wanted) or not len(stored):
            continue
        if stored[1:] == wanted[1:]:
            heads[name.rpartition(".")[0]] = stored[0]
        elif name == stem and stored[0] == wanted[0] and stored[2:] == wanted[2:]:
            channels = stored[1]
    classes = set(heads.values())
    return classes.pop() if len(classes) == 1 and len(heads) <= 2 else None, channels


def normaliser(fit: Fit, file: WeightsFile) -> tuple[str, tuple[float, ...], tuple[float, ...]] | None:
    """Return the name of a mean beside the net's tensors, it and its deviation; None where there is not one pair.

    Numbers for pixels in [0, 255] are brought to [0, 1].
    """
    pairs: dict[tuple[tuple[float, ...], ...], str] = {}
    tensors = {**file.sets.get("", {}), **fit.beside}
    for name, other in _pairs(tensors):
        mean, std = (tuple(tensors[one].flatten().tolist()) for one in (name, other))
        scale = 255 if max(mean) > 1 else 1
        pair = tuple(number / scale for number in mean), tuple(number / scale for number in std)
        pairs.setdefault(pair, name)
    if len(pairs) != 1:
        return None
    ((mean, std), name) = pairs.popitem()
    return (name, mean, std) if min(std) > 0 else None


def _pairs(tensors: Tensors) -> Iterator[tuple[str, str]]:
    """Yield the names of each mean and the deviation beside it."""
    for name, tensor in tensors.items():
        parent, dot, last = name.rpartition(".")
        if last not in _MEANS:
            continue
        other = f"{parent}{dot}{_STDS[_MEANS.index(last)]}"
        if other in tensors and 1 <= tensor.numel() == tensors[other].numel() <= _MAX_CHANNELS:
            yield name, other


def _all(sets: Mapping[str, Tensors], own: Mapping[str, torch.Size]) -> tuple[list[Fit], Unfit]:
    """Return every fit, equal ones once, and what is wrong with the nearest entry."""
    by_plain = {_plain(name): name for name in own}
    if len(by_plain) < len(own):
        by_plain = {name: name for name in own}
    fits: list[Fit] = []
    unfit: list[Unfit] = []
    for entry, tensors in sets.items():
        pairs = {name for names in _pairs(tensors) for name in names}
        for prefix in _prefixes(tensors, by_plain):
            inside = {_plain(name[len(prefix) :]): name for name in tensors if name.startswith(prefix)}
            missing = [by_plain[name] for name in by_plain if name not in inside and not name.endswith(_COUNTER)]
            extra = [inside[name] for name in inside if name not in by_plain and not name.endswith(_COUNTER)]
            unexpected = [name for name in extra if name not in pairs]
            if missing or unexpected:
                unfit.append(Unfit(missing, unexpected))
                continue
            state = {by_plain[name]: tensors[raw] for name, raw in inside.items() if name in by_plain}
            beside = {name: tensors[name] for name in tensors if not name.startswith(prefix) or name in extra}
            fit = Fit(".".join(part for part in (entry, prefix.rstrip(".")) if part), state, beside)
            if not any(_is_same(fit, other) for other in fits):
                fits.append(fit)
    return fits, min(unfit or [Unfit([], [])], key=lambda one: (len(one.missing), len(one.unexpected)))


def _listed(tensors: Tensors, own: Mapping[str, torch.Size]) -> Tensors:
    """Return a list of tensors by the net's names if it holds the net's parameters in their order."""
    if list(tensors) != [str(number) for number in range(len(tensors))]:
        return tensors
    parameters = [name for name in own if not name.endswith((_COUNTER, *_STATISTICS))]
    if [len(own[name]) for name in parameters] != [tensor.ndim for tensor in tensors.values()]:
        return tensors
    return dict(zip(parameters, tensors.values(), strict=True))


def _prefixes(tensors: Tensors, plain: Mapping[str, str]) -> list[str]:
    """Return the possible prefixes of the net's names in an entry, the longest first, the empty one last."""
    counts: dict[str, int] = {}
    for name in tensors:
        parts = name.split(".")
        for cut in range(len(parts)):
            if _plain(".".join(parts[cut:])) in plain:
                prefix = "".join(f"{part}." for part in parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
    needed = sum(not name.endswith(_COUNTER) for name in plain)
    return sorted({"", *(prefix for prefix, count in counts.items() if count >= needed)}, key=len, reverse=True)


def _plain(name: str) -> str:
    """Return a name without what wrappers put into it."""
    *parts, last = name.split(".")
    return ".".join([*(part for part in parts if part not in _WRAPPERS), last])


def _is_same(one: Fit, other: Fit) -> bool:
    return all(
        tensor is other.state.get(name) or torch.equal(tensor, other.state[name])
        for name, tensor in one.state.items()
        if not name.endswith(_COUNTER)
    )


def _shapes_fit(fit: Fit, own: Mapping[str, torch.Size]) -> bool:
    return all(tensor.shape == own[name] for name, tensor in fit.state.items())


def _with_statistics(sets: Mapping[str, Tensors], fits: list[Fit]) -> dict[str, Tensors]:
    """Return the averages of parameters alone, with the statistics of the net's batch norms."""
    net = next((fit for fit in fits if not fit.is_average), fits[0])
    statistics = {name: tensor for name, tensor in net.state.items() if name.endswith(_STATISTICS)}
    return {
        entry: {**statistics, **tensors}
        for entry, tensors in sets.items()
        if statistics and _AVERAGE.search(entry) and not any(name.endswith(_STATISTICS) for name in tensors)
    }


def _picked(names: list[str], choice: str) -> list[str]:
    """Return the names that a choice means: itself, else those that contain it, or of averages."""
    if choice in names:
        return [choice]
    parts = [name for name in names if f".{choice}." in f".{name}."]
    return parts or [name for name in names if choice == "ema" and _AVERAGE.search(name)]


def _converted(tensors: Tensors, convert: Convert) -> Tensors:
    try:
        return {name: value for name, value in convert(dict(tensors)).items() if isinstance(value, torch.Tensor)}
    # It is made for one library's files and may fail in any way on others.
    except Exception:
        return {}
