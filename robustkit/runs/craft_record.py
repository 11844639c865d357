"""Spec and record of a craft run: spec.json and transfer.json. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from robustkit.core.flags import Flag
from robustkit.core.intervals import prediction_interval
from robustkit.core.limits import Limits
from robustkit.core.schema import FORMAT, Amount, Count, Keys, OneOf, Positive, Share, build, check_format
from robustkit.runs.report_parts import Rate
from robustkit.runs.spec import Data, Environment, Format, Model, Named, Spec, dumps

# How the target class of an image is chosen.
CHOICES = ("next", "random", "least-likely")
Choice = Annotated[str, OneOf(*CHOICES)]
Attack = Annotated[Mapping[str, Any], Keys(name=str, string=str, techniques=Sequence[Named] | None)]
# A predicted class; -1 for non-finite logits.
Prediction = Annotated[int, Limits(-1)]


@dataclass(frozen=True)
class CraftSpec(Spec):
    """Everything that determines the images of a craft run, and nothing else but where to find models and data.

    `surrogates` have `string` and `fingerprint`, in order; `attack` has name, fields and techniques, and the
    `string` that the user gave. `targeted` is one of `CHOICES`, or None. The targets are not part of it.
    """

    surrogates: Sequence[Model]
    combine: str
    weights: Sequence[Amount] | None
    attack: Attack
    targeted: Choice | None
    data: Data
    threat: str
    seed: Count
    verb: Annotated[str, OneOf("craft")] = "craft"
    format: Format = FORMAT

    @property
    def attack_name(self) -> str:
        """The attack with its techniques, joined as in an attack string."""
        return "+".join(part["name"] for part in (self.attack, *self.attack.get("techniques", ())))


@dataclass(frozen=True)
class Judgement:
    """One model's result on the images: `success` is over the `n` images that it classified correctly.

    Intervals are 95 %. `noise` and `transplant` are the controls over the same n: the success of random signs and
    of another image's perturbation, of the same norm. What is undefined (n = 0, or a single image) is None.
    `predictions` are its classes on `clean` and `adversarial` images by position; -1 for non-finite logits.
    """

    model: str
    fingerprint: str
    clean_accuracy: Share
    clean_accuracy_low: Share
    clean_accuracy_high: Share
    success: Share | None
    success_low: Share | None
    success_high: Share | None
    n: Count
    noise: Share | None
    noise_low: Share | None
    noise_high: Share | None
    transplant: Share | None
    transplant_low: Share | None
    transplant_high: Share | None
    predictions: Annotated[
        Mapping[str, Sequence[Prediction]], Keys(clean=Sequence[Prediction], adversarial=Sequence[Prediction])
    ]

    @classmethod
    def of(
        cls,
        model: Mapping[str, Any],
        labels: Sequence[int],
        goals: Sequence[int] | None,
        predictions: Mapping[str, Sequence[int]],
    ) -> Judgement:
        """Return the result of predictions on `clean`, `adversarial` and, if given, `noise` and `transplant`."""
        clean = [prediction == label for prediction, label in zip(predictions["clean"], labels, strict=True)]
        accuracy = Rate.of(sum(clean), len(labels))
        body: dict[str, Any] = {
            "model": model["string"],
            "fingerprint": model["fingerprint"],
            "clean_accuracy": accuracy.value,
            "clean_accuracy_low": accuracy.low,
            "clean_accuracy_high": accuracy.high,
            "n": sum(clean),
            "predictions": {name: list(predictions[name]) for name in ("clean", "adversarial")},
        }
        for name, what in (("success", "adversarial"), ("noise", "noise"), ("transplant", "transplant")):
            rate = None
            if what in predictions and any(clean):
                rate = Rate.of(sum(map(bool, _fooled(labels, goals, predictions, what))), sum(clean))
            body |= {
                name: rate and rate.value,
                f"{name}_low": rate and rate.low,
                f"{name}_high": rate and rate.high,
            }
        return cls(**body)

    def fooled(self, labels: Sequence[int], goals: Sequence[int] | None) -> list[bool | None]:
        """Return whether each image fooled the model; None where the clean image is misclassified."""
        return _fooled(labels, goals, self.predictions, "adversarial")

    @property
    def rate(self) -> Rate | None:
        """The success with its interval; None if the model classified no image correctly."""
        if self.success is None or self.success_low is None or self.success_high is None:
            return None
        return Rate(self.success, self.success_low, self.success_high, self.n)


def _fooled(
    labels: Sequence[int],
    goals: Sequence[int] | None,
    predictions: Mapping[str, Sequence[int]],
    what: str,
) -> list[bool | None]:
    found: list[bool | None] = []
    for index, (clean, prediction, label) in enumerate(
        zip(predictions["clean"], predictions[what], labels, strict=True)
    ):
        if clean != label:
            found.append(None)
        elif goals is None:
            found.append(prediction not in (label, -1))
        else:
            found.append(prediction == goals[index])
    return found


def worst(sets: Sequence[Sequence[bool | None]]) -> Rate | None:
    """Return the share fooled by any of several sets crafted from the same images (see `Judgement.fooled`).

    None if the model classified no image correctly, or there is no set.
    """
    right = [column for column in zip(*sets, strict=True) if column[0] is not None]
    return Rate.of(sum(any(column) for column in right), len(right)) if right else None


@dataclass(frozen=True)
class Point:
    """Success at one gradient budget: with `steps` of `step_size`, in the order of the run's targets.

    `steps` is None if one step costs more than the budget.
    """

    budget: Count
    steps: Count | None
    step_size: Amount | None
    gradients_per_image: Amount | None
    success: Sequence[Rate | None] = ()


@dataclass(frozen=True)
class Forecast:
    """The expected success on a model that is not a surrogate: each surrogate in turn is left out and attacked.

    `left_out` are the rates of success, in the surrogates' order. `expected` is their mean; `low` and `high` are a
    95 % prediction interval for one more model of their kind (`intervals.prediction_interval`). `images` is each
    image's share of the left-out surrogates that it fooled, None where all misclassify the clean image.
    """

    expected: Share | None
    low: Share
    high: Share
    left_out: Sequence[Rate | None]
    images: Sequence[Share | None]
    gradients_per_image: Amount

    @classmethod
    def of(cls, fooled: Sequence[Sequence[bool | None]], gradients_per_image: float) -> Forecast:
        """Return the forecast from the results on each left-out surrogate (members x images)."""
        rates = []
        for member in fooled:
            right = [hit for hit in member if hit is not None]
            rates.append(Rate.of(sum(right), len(right)) if right else None)
        known = [rate for rate in rates if rate]
        low, high = prediction_interval([(round(rate.value * rate.n), rate.n) for rate in known])
        images = []
        for column in zip(*fooled, strict=True):
            right = [hit for hit in column if hit is not None]
            images.append(sum(right) / len(right) if right else None)
        expected = sum(rate.value for rate in known) / len(known) if known else None
        return cls(expected, low, high, rates, images, gradients_per_image)


@dataclass(frozen=True)
class Saved:
    """The images as 8-bit files: the folder, the largest change in grey levels, the success of the files."""

    folder: str
    largest_change: Count
    success: Sequence[Rate | None]


@dataclass(frozen=True)
class Craft:
    """The record of a craft run; the fields are those of transfer.json.

    `labels`, and `goals` of a targeted attack, are by position in the data. `surrogates` and `targets` are
    judgements; `flags` are reasons to doubt them; `adversarial` (not in the file) are the images as a mapping of
    `index`, `x` and `y`, all of them.
    """

    run_id: str
    spec: CraftSpec
    n: Positive
    gradients_per_image: Amount
    forwards_per_image: Amount
    seconds: Amount
    labels: Sequence[Count]
    goals: Sequence[Count] | None
    not_finite: Count
    surrogates: Sequence[Judgement]
    targets: Sequence[Judgement]
    environment: Environment
    files: Mapping[str, str] = field(default_factory=dict)
    budgets: Sequence[Point] | None = None
    forecast: Forecast | None = None
    png: Saved | None = None
    flags: Sequence[Flag] = ()
    format: Format = FORMAT
    adversarial: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the record as transfer.json holds it, `format` first."""
        absent = {name for name in ("budgets", "forecast", "png", "flags") if not getattr(self, name)}
        kept = [f.name for f in fields(self) if f.name not in {"adversarial", "format"} | absent]
        return {"format": self.format, **json.loads(dumps({name: getattr(self, name) for name in kept}))}

    @classmethod
    def from_json(cls, body: Any, name: str = "this record") -> Craft:
        """Return the record of a parsed transfer.json; UsageError if it is invalid."""
        check_format(body, name)
        return build(cls, body, name)

    def faults(self) -> Iterator[str]:
        """Yield contradictions in the record."""
        rows: dict[str, Sequence[object] | None] = {"labels": self.labels, "goals": self.goals}
        rows["forecasts"] = self.forecast.images if self.forecast else None
        for judged in (*self.surrogates, *self.targets):
            rows |= {f"{what} predictions of {judged.model}": row for what, row in judged.predictions.items()}
        for what, row in rows.items():
            if row is not None and len(row) != self.n:
                yield f"has {len(row)} {what} of {self.n} images"
        for judged in (*self.surrogates, *self.targets):
            hits = [hit for hit in judged.fooled(self.labels, self.goals) if hit is not None]
            consistent = judged.rate.is_of(sum(hits), len(hits)) if judged.rate else not hits
            if judged.n != len(hits) or not consistent:
                yield f"says of {judged.model} what its predictions do not: {sum(hits)} of {len(hits)} fooled it"
        if any(point.steps is not None and len(point.success) > len(self.targets) for point in self.budgets or ()):
            yield f"has budgets of more than its {len(self.targets)} targets"

    def judged(self, more: Sequence[Judgement]) -> Craft:
        """Return the record with more targets after those that it has."""
        return replace(self, targets=[*self.targets, *more])


@dataclass(frozen=True)
class Matrix:
    """The success of images crafted on each of `models`, on each of them and on `targets`; matrix.json.

    `success` has a row for each model and a column for each of `models` and then `targets`; `worst` is the share
    of images fooled by any row but a model's own. `folders` are the craft runs of the rows, next to the file.
    """

    run_id: str
    models: Sequence[str]
    targets: Sequence[str]
    attack: Attack
    targeted: Choice | None
    data: Data
    threat: str
    seed: Count
    n: Positive
    gradients_per_image: Sequence[Amount]
    clean_accuracy: Sequence[Share]
    noise: Sequence[Share | None]
    success: Sequence[Sequence[Rate | None]]
    worst: Sequence[Rate | None]
    folders: Sequence[str]
    environment: Environment
    flags: Sequence[Flag] = ()
    format: Format = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return the record as matrix.json holds it, `format` first."""
        kept = [f.name for f in fields(self) if f.name != "format"]
        return {"format": self.format, **json.loads(dumps({name: getattr(self, name) for name in kept}))}

    @classmethod
    def from_json(cls, body: Any, name: str = "this record") -> Matrix:
        """Return the record of a parsed matrix.json; UsageError if it is invalid."""
        check_format(body, name)
        return build(cls, body, name)

    def faults(self) -> Iterator[str]:
        """Yield contradictions in the record."""
        rows, columns = len(self.models), len(self.models) + len(self.targets)
        if {len(self.success), len(self.gradients_per_image), len(self.folders)} != {rows}:
            yield f"has rows that are not of its {rows} models"
        if {len(self.clean_accuracy), len(self.noise), len(self.worst), *map(len, self.success)} != {columns}:
            yield f"has columns that are not of its {columns} models and targets"
