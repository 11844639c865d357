"""Nets that `robustkit train` wrote: `runs/x/`, one of several members or posterior samples as `runs/x/#2`.

Several of them are written `runs/x/#0+4+7` or `runs/x/#0-4`. A folder of members or samples, whole or in part, is
one model that predicts with all of them, combined by the aggregator of `?combine=`
(see `robustkit.models.ensembles.mixture`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from robustkit import posterior
from robustkit.core.errors import UsageError, expand_path
from robustkit.core.limits import Limits
from robustkit.core.schema import build, check_format, parse
from robustkit.models.allowed_paths import refuse_code
from robustkit.models.ensembles.mixture import Members, Samples, combine_identity, joined_by
from robustkit.models.options import MAX_CHANNELS, MAX_CLASSES, MAX_PIXELS, Options
from robustkit.models.outputs import LogitsReader
from robustkit.models.randomness import Noise, drawing, set_noise
from robustkit.models.sources.built import Built
from robustkit.models.sources.source import find_source
from robustkit.models.strings import ENSEMBLE, FOLDER, MAX_MEMBERS, SOURCE, UNKNOWN, ModelString
from robustkit.models.weights.files import WeightsFile, read_weights
from robustkit.models.weights.loading import put_weights
from robustkit.posterior import Posterior
from robustkit.registry.construction import from_record, origin

FACTS, WEIGHTS = "model.json", "model.safetensors"
# What of a run's folder makes up its nets, as far as it is there.
PARTS = (FACTS, WEIGHTS, posterior.FILE)
MAX_NETS = 100_000
_NUMBERS = re.compile(r"\d{1,5}(-\d{1,5})?(\+\d{1,5}(-\d{1,5})?)*")

# Builds the net of a string that is no folder and no ensemble.
Build = Callable[[ModelString, Options, WeightsFile | None], Built]
# Builds a member or sample of a run, given its weights and its number.
Make = Callable[..., Built]


@dataclass(frozen=True)
class Facts:
    """The part of a folder's model.json that loading needs; the whole is `robustkit.runs.training_record.Trained`.

    Sizes are refused that no run has, before a net of them is made or a list of them is gone through.
    """

    arch: str
    classes: Annotated[int, Limits(2, MAX_CLASSES)]
    members: Annotated[int, Limits(1, MAX_MEMBERS)]
    mean: Sequence[float] | None
    std: Sequence[float] | None
    hashes: Mapping[str, str] = field(default_factory=dict)
    input: Sequence[int] | None = None
    method: Mapping[str, Any] | None = None
    class_names: Sequence[str] | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)

    def faults(self) -> Iterator[str]:
        """Yield what is no run's."""
        limits = (Limits(1, MAX_CHANNELS), Limits(1, MAX_PIXELS), Limits(1, MAX_PIXELS))
        if self.input is not None:
            fits = len(self.input) == len(limits) and all(
                side in limit for side, limit in zip(self.input, limits, strict=True)
            )
            if not fits or self.method is None:
                yield (
                    f"has an input of {list(self.input)!s:.40}, which must be at most {MAX_CHANNELS:,} channels, "
                    f"a height and a width of at most {MAX_PIXELS:,} pixels, beside a method"
                )
        spec = ModelString.parse(self.arch)
        archs = list(map(ModelString.parse, spec.members)) if spec.kind == ENSEMBLE else [spec]
        if any(arch.kind in (FOLDER, ENSEMBLE, UNKNOWN) for arch in archs):
            yield f"names {self.arch!r} as the architecture, which is no net's"
        elif spec.kind == ENSEMBLE and len(archs) != self.members:
            yield f"has {self.members} members, but {len(archs)} in its ensemble"


@dataclass(frozen=True)
class Run:
    """A folder that a training run wrote.

    Attributes:
        folder: Where it is, absolute.
        numbers: Which members or samples are meant; None for all.
        facts: The content of its model.json.
    """

    folder: Path
    numbers: list[int] | None
    facts: Facts

    @classmethod
    def read(cls, spec: ModelString) -> Run:
        """Return the run that a model string names.

        Raises:
            UsageError: if its model.json is missing, damaged or of another format, or its numbers are no numbers.
        """
        _, sign, text = spec.arch.rpartition("#")
        if sign and not _readable(text):
            raise UsageError(
                f"model {str(spec)[:200]!r}: write numbers after '#', as in #2, #0-4 or #0+4+7, of at most "
                f"{MAX_NETS:,} nets."
            )
        folder = folder_of(spec).absolute()
        return cls(folder, _numbers(text) if sign else None, _facts(folder))

    @property
    def arch(self) -> str:
        """How to write it so that it is found from any folder."""
        numbers = "" if self.numbers is None else "#" + "+".join(map(str, self.numbers))
        return f"{self.folder}/{numbers}"

    @property
    def singles(self) -> list[str]:
        """How to write each of its nets; of one net, itself."""
        count, what = self._count
        numbers = self._chosen(count, what)
        return [self.arch] if len(numbers) == 1 else [f"{self.folder}/#{number}" for number in numbers]

    def arch_of(self, number: int) -> ModelString:
        """Return the architecture of a member or sample."""
        spec = ModelString.parse(self.facts.arch)
        return ModelString.parse(spec.members[number]) if spec.kind == ENSEMBLE else spec

    def build(self, options: Options, make: Build, trust_code: bool) -> tuple[Built, Options]:
        """Return the net, and the options of the model's string, completed by the folder's.

        Raises:
            UsageError: if a file is missing or not the one that was written, or has no such member or sample;
                or its record names Python code that is not trusted.
        """
        if not trust_code:
            refuse_code(self.facts.arch, self.folder / FACTS)
        method = None
        if self.facts.input is not None:
            method = from_record("method", self.facts.method or {}, trust_code=trust_code)

        def net(state: dict[str, Tensor], number: int = 0) -> Built:
            inner, weights = self.arch_of(number), WeightsFile(self.folder / WEIGHTS, {"": state})
            built = self._wrapped(make(inner, self._own(inner), weights), method)
            put_weights(built.net, weights, inner.arch)
            return built

        own = self._own(self.arch_of(0))
        options = replace(
            options,
            size=options.size or own.size,
            defenses=(*options.defenses, *own.defenses),
            output=options.output or own.output,
            binary=options.binary or own.binary,
        )
        reader = LogitsReader(f"a net of {self.arch}", options.output, options.binary, self.facts.classes)
        make_whole = self._samples if self._is_sampled else self._nets
        # One net that has predictors of its own combines those.
        alone = method is not None and len(self._chosen(*self._count)) == 1
        whole = make_whole(net, None if alone else options.combine, reader)
        if method is not None and alone and options.combine is not None:
            method.set_aggregator(_module(whole), options.combine)
            whole = replace(whole, identity={**whole.identity, "combine": options.combine})
        mean, std = (
            None if value is None else tuple(map(float, value)) for value in (self.facts.mean, self.facts.std)
        )
        whole, noise = self._with_noise(whole, options.noise)
        names = tuple(self.facts.class_names or ())
        whole = replace(
            whole,
            arch=self.arch,
            mean=mean,
            std=std,
            # A net may have more outputs than its data has classes.
            class_names=names if len(names) == self.facts.classes else None,
        )
        return whole, replace(options, noise=noise)

    @property
    def _is_sampled(self) -> bool:
        """Whether these are posterior samples."""
        return posterior.FILE in self.facts.hashes or (self.folder / posterior.FILE).is_file()

    @property
    def _count(self) -> tuple[int, str]:
        """How many nets there are, and what they are called."""
        if self._is_sampled:
            return len(Posterior.open(self.folder)), "samples"
        return self.facts.members, "members"

    def _own(self, inner: ModelString) -> Options:
        """Return the options of an architecture's string, with the classes of the run."""
        own = Options.read(inner)
        if inner.kind != SOURCE:
            return own
        source = find_source(inner.source)
        if source.takes("num_classes") and own.num_classes is None:
            own = replace(own, num_classes=self.facts.classes)
        if source.takes("in_channels") and self.facts.input is not None and own.in_channels is None:
            # A wrapper may change the first layer, so the weights do not determine the channels of the images.
            own = replace(own, in_channels=self.facts.input[0])
        return own

    def _wrapped(self, built: Built, method: Any) -> Built:
        """Return the net with what its method put around it; its weights are not in it yet."""
        if method is None or self.facts.input is None:
            return built
        net = method.wrap(_module(built), torch.zeros(1, *self.facts.input), None, None).eval()
        # Where its code lies is no part of what it computes; the code is, as it is now.
        record = {**(self.facts.method or {}), **origin(method)}
        record.pop("string", None)
        return replace(built, net=net, identity={**built.identity, "method": record})

    def _with_noise(self, built: Built, noise_text: str | None) -> tuple[Built, str | None]:
        """Return a net with the noise policy of the query, and the policy in force if the net is random."""
        parts = drawing(built.net)
        if not parts:
            if noise_text is not None:
                raise UsageError(f"model '{self.arch}' draws no random numbers: leave noise={noise_text} out.")
            return built, None
        noise = Noise.parse(noise_text or "fresh")
        set_noise(built.net, noise)
        return replace(built, identity={**built.identity, "noise": str(noise)}), str(noise)

    def _samples(self, net: Make, combine: str | None, reader: LogitsReader) -> Built:
        store = Posterior.open(self.folder)
        self._check_hash(posterior.FILE, store.sha256)
        numbers = self._chosen(*self._count)
        aggregate = joined_by(combine, len(numbers), f"model '{self.arch}'")
        built = net(store.state(numbers[0]))
        if len(numbers) == 1:
            return built
        identity = {**built.identity, "samples": numbers, **combine_identity(combine)}
        return replace(built, net=Samples(_module(built), store, numbers, aggregate, reader), identity=identity)

    def _nets(self, net: Make, combine: str | None, reader: LogitsReader) -> Built:
        numbers = self._chosen(*self._count)
        aggregate = joined_by(combine, len(numbers), f"model '{self.arch}'")
        path = self.folder / WEIGHTS
        if path.is_file():
            self._check_hash(WEIGHTS, _sha256(path))
        state = read_weights(path).sets.get("", {})
        if self.facts.members == 1:
            return net(state)
        members = [net(_of_member(state, number), number) for number in numbers]
        if len(numbers) == 1:
            return members[0]
        own = [member.identity for member in members]
        unlike = {"each": own} if any(one != own[0] for one in own) else {}
        identity = {**own[0], "members": len(members), **unlike, **combine_identity(combine)}
        whole = Members([_module(member) for member in members], aggregate, reader)
        return replace(members[0], net=whole, identity=identity)

    def _chosen(self, count: int, what: str) -> list[int]:
        """Return the numbers meant, each of which must be there once."""
        numbers = list(range(count)) if self.numbers is None else self.numbers
        seen: set[int] = set()
        for number in numbers:
            if number >= count or number in seen:
                wrong = "twice" if number < count else f"but {count} {what}"
                raise UsageError(
                    f"model '{self.arch}' names number {number} {wrong}: write numbers from 0 to {count - 1}, "
                    "each once."
                )
            seen.add(number)
        return numbers

    def _check_hash(self, name: str, found: str) -> None:
        if self.facts.hashes.get(name, found) != found:
            raise UsageError(
                f"'{self.folder / name}' is not the file that the training wrote: restore it, or train again in "
                "another folder."
            )


def folder_of(spec: ModelString) -> Path:
    """Return the folder that a string names, with or without numbers."""
    path, sign, text = spec.arch.rpartition("#")
    return expand_path(path if sign else text)


def is_run(spec: ModelString) -> bool:
    """Return whether that folder is the run of a training."""
    return (folder_of(spec) / FACTS).is_file()


def training_flops(string: str) -> int | None:
    """Return what the training of a run cost, of a string that names its folder; None for others."""
    spec = ModelString.parse(string) if string else None
    if spec is None or spec.kind != FOLDER or not is_run(spec):
        return None
    flops = _facts(folder_of(spec)).cost.get("flops")
    return flops if isinstance(flops, int) else None


def _facts(folder: Path) -> Facts:
    path = folder / FACTS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' cannot be read: train again in another folder.") from error
    body, name = parse(text, f"'{path}'"), f"'{path}'"
    check_format(body, name)
    return build(Facts, body, name)


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split("+"):
        first, sign, last = part.partition("-")
        found += range(int(first), int(last) + 1) if sign else [int(first)]
    return found


def _readable(text: str) -> bool:
    """Return whether a text is a list of numbers and rising ranges of at most five digits, and not too many."""
    if not _NUMBERS.fullmatch(text):
        return False
    ranges = [part.split("-") for part in text.split("+")]
    sizes = [int(one[-1]) - int(one[0]) + 1 for one in ranges]
    return min(sizes) > 0 and sum(sizes) <= MAX_NETS


def _of_member(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _module(built: Built) -> nn.Module:
    if not isinstance(built.net, nn.Module):
        raise UsageError(
            f"{built.arch} is a {type(built.net).__name__}, not a torch.nn.Module, and was not trained."
        )
    return built.net


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
