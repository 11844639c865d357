"""What a run is and what it found: RunSpec, Outcome, Flag, Report. JSON in and out; imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from robustkit.errors import UsageError
from robustkit.intervals import sequence, two_phase

FORMAT = 1
LEVELS = ("info", "warning", "error")
OK, UNMEASURED = "ok", "not measured"
AUDIT_BROKE = "audit-broke"


@dataclass(frozen=True)
class Flag:
    """A reason to look twice at a number, or what a check has to say where it found none.

    `level` is `info`, `warning` or `error`, and without a reason `ok` or `not measured`; `value` is what was
    measured.
    """

    code: str
    level: str
    value: int | float | None
    meaning: str
    remedy: str

    @property
    def raised(self) -> bool:
        """Whether it is a reason to look twice."""
        return self.level in LEVELS

    @property
    def warns(self) -> bool:
        """Whether it puts the run's number in doubt."""
        return self.level in ("warning", "error")


def passed(code: str, value: int | float | None, meaning: str) -> Flag:
    """Return what a check measured that found nothing."""
    return Flag(code, OK, value, meaning, "nothing to do")


def unmeasured(code: str, meaning: str, remedy: str) -> Flag:
    """Return why a check could not be made."""
    return Flag(code, UNMEASURED, None, meaning, remedy)


@dataclass(frozen=True)
class Spec:
    """What determines a run, to be subclassed; of what a field describes, `string` only says where it is found."""

    @property
    def run_id(self) -> str:
        """Eight hexadecimal digits of the hash of all that determines the run: strings and paths do not."""
        return hashlib.sha256(dumps(self.identity).encode()).hexdigest()[:8]

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed."""
        return {name: _content(value) for name, value in asdict(self).items()}


def _content(part: Any) -> Any:
    """Return a part of a spec without where it is found."""
    if isinstance(part, Mapping):
        return {key: value for key, value in part.items() if key != "string"}
    return [_content(one) for one in part] if isinstance(part, list | tuple) else part


@dataclass(frozen=True)
class RunSpec(Spec):
    """Everything that determines the numbers of a run, and nothing else but where to find model and data.

    `model` has `string` and `fingerprint`; `data` has `string`, `n` and `fingerprint`; `suite` is one record
    of name and fields per attack; `batch_size` is given only where random numbers depend on it.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    threat: str
    suite: Sequence[Mapping[str, Any]]
    seed: int
    batch_size: int | None = None
    verb: str = "evaluate"
    format: int = FORMAT


@dataclass(frozen=True)
class Rate:
    """A share of n images with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int

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
    def anytime(cls, hits: int, n: int) -> Rate:
        """Return hits / n with an interval that holds however n came about (`intervals.sequence`)."""
        return cls(hits / n, *sequence(hits, n), n)


@dataclass(frozen=True)
class Cost:
    """Sample-propagations through the model, verification included, and seconds."""

    forwards: int
    backwards: int
    seconds: float


@dataclass(frozen=True)
class Stage:
    """One attack of the run: the accuracy left after it, how many images it fooled, what it cost."""

    attack: str
    robust_accuracy: Rate
    fooled: int
    forwards: int
    backwards: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict on one image.

    `index` is its position in the data. `attack` is what settled it: `clean` where the clean image is wrong
    already, None where it stood. `margin` is the label's logit minus the best other one, at the adversarial
    that counted or, where it stood, the lowest that was judged.
    """

    index: int
    label: int
    clean_prediction: int
    robust: bool
    attack: str | None
    margin: float


@dataclass(frozen=True)
class Curve:
    """Robust accuracy at each of the `radii`, in order, by the smallest distance that fooled each image.

    `distances` has one entry per verdict: 0 where the clean image is wrong already, None where nothing within
    the largest radius fooled the model. `cost` is that of the search, which the run's cost leaves out.
    """

    radii: Sequence[float]
    robust_accuracy: Sequence[Rate]
    distances: Sequence[float | None]
    cost: Cost

    @classmethod
    def of(cls, radii: Sequence[float], distances: Sequence[float | None], cost: Cost) -> Curve:
        """Return the curve of these distances: an image stands at every radius below its own."""
        n = len(distances)
        rates = [Rate.of(sum(far is None or far > radius for far in distances), n) for radius in radii]
        return cls(radii, rates, distances, cost)

    @property
    def median(self) -> float | None:
        """The median distance over the images that are right as they are; infinite beyond the largest radius."""
        right = [math.inf if far is None else far for far in self.distances if far != 0]
        return statistics.median(right) if right else None


@dataclass(frozen=True)
class Stop:
    """Why a run ended before it had all `images` of its data: its `reason` is `time-limit` or `width`.

    The verdicts are then of images drawn at random, and the intervals hold whenever it was stopped.
    """

    reason: str
    images: int


@dataclass(frozen=True)
class Draws:
    """A random model's robust accuracy three ways, each by fresh draws at the points that the attacks found.

    `one` is by a single draw, `mean` the mean share of draws that are right, `majority` counts the images that
    are right more often than not: the run's own. `gap` is how much higher the mean is than what an attack is
    told that takes one wrong draw for a success.
    """

    one: Rate
    mean: float
    majority: Rate
    gap: float


@dataclass(frozen=True)
class Audit:
    """What full AutoAttack made of some survivors, drawn at random: the positions it `broke` of `audited`.

    `robust_accuracy` is what it would leave of all the run's images: survivors of both, with a 95 % interval
    over both draws (`intervals.two_phase`). `cost` is its own, which the run's leaves out.
    """

    audited: Sequence[int]
    broke: Sequence[int]
    robust_accuracy: Rate
    cost: Cost

    @classmethod
    def of(cls, audited: Sequence[int], broke: Sequence[int], robust: int, n: int, cost: Cost) -> Audit:
        """Return the audit of a run that left `robust` of `n` images standing."""
        value = robust / n * (1 - len(broke) / len(audited)) if audited else 0.0
        low, high = two_phase(robust, n, len(broke), len(audited))
        return cls(audited, broke, Rate(value, low, high, n), cost)


@dataclass(frozen=True)
class Report:
    """The record of a finished run; the fields are those of report.json.

    `flags` were raised, `passed` is what the other checks measured, or why they could not. `curve` and `audit`
    are there if they were asked for, `draws` for a random model, `stopped` if the run ended early. `files` holds
    the sha256 of what lies beside the report. `adversarial` (not in the file) are the fooling images as a mapping
    of `index` (M), `x` (M C H W) and `y` (M) when the run was asked for from Python.
    """

    run_id: str
    spec: RunSpec
    n: int
    clean_accuracy: Rate
    robust_accuracy: Rate
    stages: Sequence[Stage]
    cost: Cost
    flags: Sequence[Flag]
    verdicts: Sequence[Outcome]
    environment: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    passed: Sequence[Flag] = field(default_factory=list)
    curve: Curve | None = None
    audit: Audit | None = None
    draws: Draws | None = None
    stopped: Stop | None = None
    format: int = FORMAT
    adversarial: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the record as report.json holds it, `format` first."""
        return {"format": self.format, **json.loads(dumps(self._body()))}

    def text(self) -> Iterator[str]:
        """Yield the same as text, in pieces: the whole takes much memory where there are many images."""
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
        asked_for = {name for name in ("curve", "audit", "draws", "stopped") if getattr(self, name) is None}
        left_out = {"adversarial", "format"} | asked_for
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    def with_curve(self, curve: Curve, flags: Sequence[Flag]) -> Report:
        """Return the same run with its curve, and what its search noticed."""
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
                    f"AutoAttack broke this many of {len(audit.audited)} images that the suite had left standing",
                    "run --suite rapid+autoattack, and quote its number",
                )
            )
        return replace(self, audit=audit, flags=flags)

    @classmethod
    def from_json(cls, body: Any) -> Report:
        """Return the report of a parsed report.json; UsageError if it is none or of another format."""
        if not isinstance(body, Mapping) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, Mapping) else type(body).__name__
            raise UsageError(f"this report has format {found!r}; this version of robustkit reads {FORMAT}.")
        try:
            report = cls(
                run_id=body["run_id"],
                spec=RunSpec(**body["spec"]),
                n=body["n"],
                clean_accuracy=Rate(**body["clean_accuracy"]),
                robust_accuracy=Rate(**body["robust_accuracy"]),
                stages=[
                    Stage(**{**stage, "robust_accuracy": Rate(**stage["robust_accuracy"])})
                    for stage in body["stages"]
                ],
                cost=Cost(**body["cost"]),
                flags=[Flag(**flag) for flag in body["flags"]],
                verdicts=[Outcome(**verdict) for verdict in body["verdicts"]],
                environment=body["environment"],
                files=body.get("files", {}),
                passed=[Flag(**flag) for flag in body.get("passed", [])],
                curve=_curve(body.get("curve")),
                audit=_audit(body.get("audit")),
                draws=_draws(body.get("draws")),
                stopped=Stop(**body["stopped"]) if body.get("stopped") else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"this report is damaged: {type(error).__name__} {error}.") from error
        if len(report.verdicts) != report.n:
            raise UsageError(
                f"this report is damaged: it has {len(report.verdicts)} verdicts of {report.n} images."
            )
        if report.curve and len(report.curve.distances) != report.n:
            raise UsageError(
                f"this report is damaged: its curve has {len(report.curve.distances)} distances for "
                f"{report.n} images."
            )
        return report


def _curve(body: Mapping[str, Any] | None) -> Curve | None:
    """Return the curve of a parsed report.json, which may have none."""
    if body is None:
        return None
    rates = [Rate(**rate) for rate in body["robust_accuracy"]]
    return Curve(body["radii"], rates, body["distances"], Cost(**body["cost"]))


def _draws(body: Mapping[str, Any] | None) -> Draws | None:
    if body is None:
        return None
    return Draws(Rate(**body["one"]), body["mean"], Rate(**body["majority"]), body["gap"])


def _audit(body: Mapping[str, Any] | None) -> Audit | None:
    if body is None:
        return None
    return Audit(body["audited"], body["broke"], Rate(**body["robust_accuracy"]), Cost(**body["cost"]))


def stage_name(record: Mapping[str, Any]) -> str:
    """Return what a stage is called by its record in a spec."""
    return str(record["name"]) + (f"@{record['view']}" if record.get("view") else "")


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Return canonical JSON: sorted keys at the inside, no NaN, dataclasses as objects, nothing else bent."""
    return json.dumps(value, default=_encoded, sort_keys=indent is None, allow_nan=False, indent=indent)


def _encoded(thing: Any) -> Any:
    if hasattr(thing, "__dataclass_fields__"):
        return {f.name: getattr(thing, f.name) for f in fields(thing)}
    if isinstance(thing, Mapping):
        return dict(thing)
    raise TypeError(f"{type(thing).__name__} is no JSON value")
