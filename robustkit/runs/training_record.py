"""Spec and record of a training run: spec.json and model.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from robustkit.core.flags import Flag
from robustkit.core.schema import (
    FORMAT,
    Amount,
    Count,
    HasFieldsOf,
    Keys,
    OneOf,
    Positive,
    Share,
    build,
    check_format,
)
from robustkit.runs.spec import Data, Environment, Format, Model, Named, Spec

# Files of a run: the record once it is finished; metrics per epoch; the weights if there is no posterior.
RECORD, METRICS, WEIGHTS = "model.json", "metrics.jsonl", "model.safetensors"
# The state of an unfinished run, and the one before it, in case the newest is damaged.
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")
# Folders in a run's: training states from which the method makes samples, curves for TensorBoard.
KEPT, CURVES = "kept", "tensorboard"

# Facts of an epoch, of a posterior sample, and of an accuracy (see `Trained`).
Epoch = Annotated[
    Mapping[str, Any],
    Keys(
        epoch=Positive,
        step=Count,
        loss=float,
        rate=Amount,
        images_per_second=Amount,
        seconds=Amount,
        test_accuracy=Share | None,
        test_loss=float | None,
        best_member=Share | None,
        any_right=Share | None,
        all_right=Share | None,
        transfer=Share | None,
        white_box=Share | None,
        cosine=float | None,
    ),
]
Sample = Annotated[
    Mapping[str, Any],
    Keys(
        step=Count | None,
        epoch=Positive | None,
        cycle=Positive | None,
        rate=Amount | None,
        accuracy=Share | None,
        loss=float | None,
    ),
]
Accuracy = Annotated[Mapping[str, Any], Keys(value=Share, low=Share, high=Share, n=Positive)]


@dataclass(frozen=True)
class TrainSpec(Spec):
    """Everything that determines the weights, and the strings that locate nets and data.

    `method` is a record of name and fields; `arch` has `string` and `fingerprint`, which is that of the initial
    weights of the first member; `data` has `string`, `n` and `fingerprint`, and so has `test`, on which the
    net is judged, or None.
    """

    method: Named
    arch: Model
    data: Data
    test: Data | None
    epochs: Positive
    batch_size: Positive
    lr: Amount
    members: Positive
    ema: Share
    augment: str
    precision: str
    seed: Count
    verb: Annotated[str, OneOf("train")] = "train"
    format: Format = FORMAT


@dataclass(frozen=True)
class Trained:
    """A finished training run.

    Attributes:
        run_id: of its spec.
        arch: the model string of the architecture, without weights.
        mean: subtracted from each channel, in [0, 1] pixel units; None where nothing is.
        std: divides each channel afterwards.
        classes: K.
        method: a record of name and fields.
        data: the training data's string.
        spec: see `TrainSpec`.
        members: nets in `model.safetensors`, as `0.NAME`, `1.NAME` … where there are several.
        history: facts of each epoch: `epoch`, `step`, `loss`, `rate`, `images_per_second`, `seconds`, and
            `test_accuracy` and `test_loss` where they were measured; of several members also what oracles would
            reach, `best_member`, `any_right` and `all_right`, and, on a few images, the shares fooled by a short
            attack, `transfer` between members and `white_box` of their mean, and the mean `cosine` of gradients.
        samples: facts of each posterior sample: `step`, `epoch`, `cycle`, `rate`, and `accuracy` and `loss` on
            the test data; null where they make no sense. Empty for a method that has no posterior.
        accuracy: on the test data, `{value, low, high, n}` with a 95 % interval, or None; of several members or
            samples, that of their mean probabilities.
        member_accuracy: the share each member alone classifies correctly.
        input: channels, height and width of its images, where the method put something around the net.
        cost: `forwards` and `backwards`, sample-propagations; `flops`; `seconds`.
        hashes: sha256 of each file of weights.
        environment: versions, device, commit.
        class_names: what the training data calls the classes, in the order of the outputs; None without names.
        flags: reasons to doubt the accuracy.
    """

    run_id: str
    arch: str
    mean: Sequence[float] | None
    std: Sequence[float] | None
    classes: Positive
    method: Named
    data: str
    spec: Annotated[Mapping[str, Any], HasFieldsOf(TrainSpec)]
    members: Positive
    history: Sequence[Epoch]
    cost: Annotated[Mapping[str, Any], Keys(forwards=Count, backwards=Count, flops=Count, seconds=Amount)]
    hashes: Mapping[str, str]
    samples: Sequence[Sample] = ()
    accuracy: Accuracy | None = None
    member_accuracy: Sequence[Share] = ()
    input: Sequence[Positive] | None = None
    environment: Environment = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    flags: Sequence[Flag] = ()
    format: Format = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return the fields of model.json, `format` first."""
        body = asdict(self)
        return {"format": body.pop("format"), **body}

    @classmethod
    def from_json(cls, body: Any, name: str = "this record") -> Trained:
        """Return the record of a parsed model.json; UsageError if it is invalid."""
        check_format(body, name)
        return build(cls, body, name)
