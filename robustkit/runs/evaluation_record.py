"""Spec and report of an evaluation: RunSpec, Report and their parts, to and from JSON. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any

from robustkit.core.flags import Flag
from robustkit.core.intervals import anytime_interval, two_phase_interval
from robustkit.core.limits import Limits
from robustkit.core.schema import FORMAT, Amount, Count, Keys, OneOf, Positive, Share, build, check_format
from robustkit.runs.distances import Minimum

AUDIT_BROKE = "audit-broke"
CHANCE = "chance-accuracy"
# Relative tolerance when a rate is compared with its hits.
ROUNDING = 1e-9

Format = Annotated[int, OneOf(FORMAT)]
# A model, data, an attack or a method: its string and what determines it.
Model = Annotated[Mapping[str, Any], Keys(string=str, fingerprint=str)]
Data = Annotated[Mapping[str, Any], Keys(string=str, n=Positive, fingerprint=str)]
Named = Annotated[Mapping[str, Any], Keys(name=str)]
Environment = Annotated[
    Mapping[str, Any],
    Keys(
        versions=Mapping[str, str | None] | None,
        device_name=str | None,
        commit=str | None,
        precision=str | None,
        claims_refused=Count | None,
        training_flops=Sequence[Count | None] | None,
        parts=Sequence[Mapping[str, str | None]] | None,
    ),
]


@dataclass(frozen=True)
class Spec:
    """What determines a run, to be subclassed; the `string` of a part only says where it is found."""

    @property
    def run_id(self) -> str:
        """Eight hexadecimal digits of the hash of all that determines the run: strings and paths do not."""
        return hashlib.sha256(dumps(self.identity).encode()).hexdigest()[:8]

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed."""
        return {name: _content(value) for name, value in asdict(self).items()}


def _content(part: Any) -> Any:
    """Return a part of a spec without its string."""
    if isinstance(part, Mapping):
        return {key: value for key, value in part.items() if key != "string"}
    return [_content(one) for one in part] if isinstance(part, list | tuple) else part


@dataclass(frozen=True)
class RunSpec(Spec):
    """Everything that determines the numbers of a run, and the strings that locate model and data.

    `model` has `string` and `fingerprint`; `data` has `string`, `n` and `fingerprint`; `suite` is one record
    of name and fields per attack; `batch_size` is given only if random numbers depend on it, `strictness` only if
    it is not the default.
    """

    model: Model
    data: Data
    threat: str
    suite: Sequence[Named]
    seed: Count
    batch_size: Positive | None = None
    strictness: Share | None = None
    verb: Annotated[str, OneOf("evaluate")] = "evaluate"
    format: Format = FORMAT

    @property
    def minimal(self) -> bool:
        """Whether the run searches for minimum norms, under a threat such as `l2:min`."""
        return self.threat.endswith(":min")

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed; a strictness only if it is given, so that older runs keep their ids."""
        every = super().identity
        return {name: value for name, value in every.items() if name != "strictness" or value is not None}


@dataclass(frozen=True)
class Rate:
    """A share of n images with its 95 % Wilson interval."""

    value: Share
    low: Share
    high: Share
    n: Count

    def is_of(self, hits: int, n: int) -> bool:
        """Return whether it is the share of this many hits, inside its interval."""
        inside = self.low - ROUNDING <= self.value <= self.high + ROUNDING
        return inside and self.n == n and abs(self.value * n - hits) < ROUNDING * max(n, 1)

    @classmethod
    def of(cls, hits: int, n: int) -> Rate:
        """Return hits / n with the Wilson score interval; it never leaves [0, 1] and n must be positive."""
        z = 1.959963984540054
        share = hits / n
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        low = 0.0 if hits == 0 else max(0.0, centre - half)
        high = 1.0 if hits == n else min(1.0, centre + half)
        return cls(share, low, high, n)

    @classmethod
    def anytime(cls, hits: int, n: int, unknown: int = 0) -> Rate:
        """Return hits / n with an interval that is valid for any stopping rule (`intervals.anytime_interval`).

        `unknown` of the hits may turn out to be misses: the lower end counts them as such.
        """
        return cls(hits / n, anytime_interval(max(hits - unknown, 0), n)[0], anytime_interval(hits, n)[1], n)


@dataclass(frozen=True)
class Cost:
    """Forward and backward passes of images, verification included, and seconds."""

    forwards: Count
    backwards: Count
    seconds: Amount


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of images."""

    forwards: Count
    backwards: Count

    @property
    def total(self) -> int:
        """Forwards and backwards together."""
        return self.forwards + self.backwards


@dataclass(frozen=True)
class Stage:
    """One attack of the run: the accuracy after it, the number of images it fooled, and its cost."""

    attack: str
    robust_accuracy: Rate
    fooled: Count
    forwards: Count
    backwards: Count
    seconds: Amount


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict on one image.

    `index` is its position in the data. `attack` is what fooled it: `clean` for a misclassified clean
    image, None for a robust one. `margin` is the label's logit minus the best other one at the adversarial image,
    or the lowest of all attacks for a robust image.
    """

    index: Count
    label: Count
    clean_prediction: Annotated[int, Limits(-1)]
    robust: bool
    attack: str | None
    margin: float


@dataclass(frozen=True)
class Curve:
    """Robust accuracy at each of the `radii`, in order, by the smallest distance that fooled each image.

    `distances` has one entry per verdict: 0 for a misclassified clean image, None if no image within the
    largest radius fooled the model. `cost` is that of the search, which is not part of the run's cost.
    """

    radii: Sequence[Amount]
    robust_accuracy: Sequence[Rate]
    distances: Sequence[Amount | None]
    cost: Cost

    def faults(self) -> Iterator[str]:
        """Yield contradictions."""
        if len(self.radii) != len(self.robust_accuracy):
            yield f"has {len(self.robust_accuracy)} accuracies at {len(self.radii)} radii"

    @classmethod
    def of(cls, radii: Sequence[float], distances: Sequence[float | None], cost: Cost) -> Curve:
        """Return the curve of these distances: an image is robust at every radius below its own."""
        n = len(distances)
        rates = [Rate.of(sum(far is None or far > radius for far in distances), n) for radius in radii]
        return cls(radii, rates, distances, cost)

    @property
    def median(self) -> float | None:
        """The median distance of the correctly classified images; infinite beyond the largest radius."""
        right = [math.inf if far is None else far for far in self.distances if far != 0]
        return statistics.median(right) if right else None


@dataclass(frozen=True)
class Stop:
    """Why a run ended before it had all `images` of its data: its `reason` is `time-limit` or `width`.

    The verdicts are then of random images, and the intervals are valid whenever it stopped. If the time was up in
    the first block, `unfinished` of its images have not met all attacks: they count as robust, and in the lower
    ends of the intervals as fooled.
    """

    reason: Annotated[str, OneOf("time-limit", "width")]
    images: Count
    unfinished: Count = 0


@dataclass(frozen=True)
class Draws:
    """A random model's robust accuracy in three ways, each by new draws at the points that the attacks found.

    `one` is by a single draw, `mean` the mean share of right draws, `majority` counts the images that are right in
    more than half of the draws: the run's own. `gap` is the difference between the mean and the accuracy if one
    wrong draw counted as a success.
    """

    one: Rate
    mean: Share
    majority: Rate
    gap: float


@dataclass(frozen=True)
class Audit:
    """Full AutoAttack on a random sample of robust images: the positions that it `broke` of `audited`.

    `robust_accuracy` estimates the share of all images that are robust to both, with a 95 % interval over both
    samples (`intervals.two_phase_interval`). `cost` is its own, which is not part of the run's cost.
    """

    audited: Sequence[Count]
    broke: Sequence[Count]
    robust_accuracy: Rate
    cost: Cost

    @classmethod
    def of(cls, audited: Sequence[int], broke: Sequence[int], robust: int, n: int, cost: Cost) -> Audit:
        """Return the audit of a run with `robust` robust images of `n`."""
        value = robust / n * (1 - len(broke) / len(audited)) if audited else 0.0
        low, high = two_phase_interval(robust, n, len(broke), len(audited))
        return cls(audited, broke, Rate(value, low, high, n), cost)


@dataclass(frozen=True)
class Strictness:
    """The remaining doubt of a suite that chose for each image which arms to run.

    At most `images`, a share `bound` of the run's, would still be fooled by an arm that did not run on them, with
    probability 95 % by a model of the arms' gains (docs/rapid.md); AutoAttack's attacks are among the arms of
    `auto`. `allowed` is the share that was allowed. Every arm ran on `in_full` of the `standing` (robust) images;
    if it ran on all, the bound is 0. (The names are keys of format 1.)
    """

    images: Count
    bound: Share
    allowed: Share
    standing: Count
    in_full: Count


@dataclass(frozen=True)
class Report:
    """The record of a finished run; the fields are those of report.json.

    `flags` were raised; `passed` are the results of the other checks, or why they were not measured. `checks` is
    their cost, which is part of the clean stage, the first of `stages`. `curve` and `audit` exist if they were
    requested, `draws` for a random model, `stopped` if the run ended early, `strictness` if the suite has arms,
    `minimum` if its threat is a minimum norm. `files` holds the sha256 of the other files of the run.
    `adversarial` (not in the file) are the fooling images as a mapping of `index` (M), `x` (M C H W) and `y` (M)
    if the run was started from Python.
    """

    run_id: str
    spec: RunSpec
    n: Positive
    clean_accuracy: Rate
    robust_accuracy: Rate
    stages: Sequence[Stage]
    cost: Cost
    flags: Sequence[Flag]
    verdicts: Sequence[Outcome]
    environment: Environment
    files: Mapping[str, str] = field(default_factory=dict)
    passed: Sequence[Flag] = field(default_factory=list)
    curve: Curve | None = None
    audit: Audit | None = None
    draws: Draws | None = None
    checks: Passes | None = None
    stopped: Stop | None = None
    minimum: Minimum | None = None
    strictness: Strictness | None = None
    format: Format = FORMAT
    adversarial: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the record as in report.json, `format` first."""
        return {"format": self.format, **json.loads(dumps(self._body()))}

    def text(self) -> Iterator[str]:
        """Yield the same as text, in pieces, because the whole takes much memory if there are many images."""
        yield f'{{\n  "format": {self.format}'
        for name, value in sorted(self._body().items()):
            yield f',\n  "{name}": '
            if name == "verdicts":
                yield "["
                for number, verdict in enumerate(value):
                    yield f"{',' if number else ''}\n    {dumps(verdict)}"
                yield "\n  ]"
            else:
                yield dumps(json.loads(dumps(value)), indent=2).replace("\n", "\n  ")
        yield "\n}\n"

    def _body(self) -> dict[str, Any]:
        names = ("curve", "audit", "draws", "checks", "stopped", "strictness", "minimum")
        absent = {name for name in names if getattr(self, name) is None}
        left_out = {"adversarial", "format"} | absent
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    def with_curve(self, curve: Curve, flags: Sequence[Flag]) -> Report:
        """Return the same run with its curve, and the flags of its search."""
        return replace(self, curve=curve, flags=[*self.flags, *flags])

    def with_audit(self, audit: Audit) -> Report:
        """Return the same run with an audit in the place of any earlier one, and a flag if it broke an image."""
        flags = [flag for flag in self.flags if flag.code != AUDIT_BROKE]
        if audit.broke:
            flags.append(
                Flag(
                    AUDIT_BROKE,
                    "warning",
                    len(audit.broke),
                    f"AutoAttack broke this many of {len(audit.audited)} images that were robust to the suite",
                    "run --suite rapid+autoattack, and report its result",
                )
            )
        return replace(self, audit=audit, flags=flags)

    @classmethod
    def from_json(cls, body: Any, name: str = "this report") -> Report:
        """Return the report of a parsed report.json; `name` is its name in errors.

        Raises:
            UsageError: it is not a report, has another format, or contradicts itself.
        """
        check_format(body, name)
        return build(cls, body, name)

    def faults(self) -> Iterator[str]:
        """Yield contradictions in the record."""
        if len(self.verdicts) != self.n:
            yield f"has {len(self.verdicts)} verdicts of {self.n} images"
        if self.curve and len(self.curve.distances) != self.n:
            yield f"has {len(self.curve.distances)} distances in its curve for {self.n} images"
        if (self.minimum is not None) != self.spec.minimal:
            yield f"has threat {self.spec.threat} and {'no ' * (self.minimum is None)}minimum norms"
        if self.minimum and len(self.minimum.distances) != self.n:
            yield f"has {len(self.minimum.distances)} minimum norms for {self.n} images"

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between the verdicts and the rest."""
        right = sum(verdict.attack != "clean" for verdict in self.verdicts)
        robust = sum(verdict.robust for verdict in self.verdicts)
        for what, rate, hits in (("clean", self.clean_accuracy, right), ("robust", self.robust_accuracy, robust)):
            if not rate.is_of(hits, self.n):
                yield f"a {what} accuracy {rate.value} ({rate.low} – {rate.high}) but {hits} of {self.n} verdicts"
        indices = [verdict.index for verdict in self.verdicts]
        if indices != sorted(set(indices)) or indices[-1] >= self.spec.data["n"]:
            yield f"verdicts that are not of {self.spec.data['n']} images in order"
        if any(verdict.robust != (verdict.attack is None) for verdict in self.verdicts):
            yield "a verdict that does not fit its attack"


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Return canonical JSON: sorted keys at the inside, no NaN, dataclasses as objects, no other conversion."""
    return json.dumps(value, default=_encoded, sort_keys=indent is None, allow_nan=False, indent=indent)


def _encoded(thing: Any) -> Any:
    if hasattr(thing, "__dataclass_fields__"):
        return {f.name: getattr(thing, f.name) for f in fields(thing)}
    if isinstance(thing, Mapping):
        return dict(thing)
    raise TypeError(f"{type(thing).__name__} is no JSON value")
