"""What a training run is and what it made: spec.json and model.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from robustkit.errors import UsageError
from robustkit.record import FORMAT, Spec

# A run's record, by which it is finished, a line for each epoch, and the weights of a run without a posterior.
RECORD, METRICS, WEIGHTS = "model.json", "metrics.jsonl", "model.safetensors"
# The state of an unfinished run, and the one before it, in case the newest is damaged.
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")
# Folders in a run's: states that wait for the method that makes its samples of them, curves for TensorBoard.
KEPT, CURVES = "kept", "tensorboard"


@dataclass(frozen=True)
class TrainSpec(Spec):
    """Everything that determines the weights, and nothing else but where to find nets and data.

    `method` is a record of name and fields; `arch` has `string` and `fingerprint`, which is that of the initial
    weights of the first member; `data` has `string`, `n` and `fingerprint`, and so has `test`, on which the
    net is judged, or None.
    """

    method: Mapping[str, Any]
    arch: Mapping[str, Any]
    data: Mapping[str, Any]
    test: Mapping[str, Any] | None
    epochs: int
    batch_size: int
    lr: float
    members: int
    ema: float
    augment: str
    precision: str
    seed: int
    verb: str = "train"
    format: int = FORMAT


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
    """

    run_id: str
    arch: str
    mean: Sequence[float] | None
    std: Sequence[float] | None
    classes: int
    method: Mapping[str, Any]
    data: str
    spec: Mapping[str, Any]
    members: int
    history: Sequence[Mapping[str, Any]]
    cost: Mapping[str, Any]
    hashes: Mapping[str, str]
    samples: Sequence[Mapping[str, Any]] = ()
    accuracy: Mapping[str, Any] | None = None
    member_accuracy: Sequence[float] = ()
    input: Sequence[int] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return the fields of model.json, `format` first."""
        body = asdict(self)
        return {"format": body.pop("format"), **body}

    @classmethod
    def from_json(cls, body: Any) -> Trained:
        """Return the record of a parsed model.json.

        Raises:
            UsageError: if it is of another format, or lacks something.
        """
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else None
            raise UsageError(f"model.json has format {found!r}; this version reads {FORMAT}.")
        known = {one.name for one in fields(cls)}
        try:
            return cls(**{key: value for key, value in body.items() if key in known})
        except TypeError as error:
            raise UsageError(f"model.json lacks what it should hold: {error}.") from error
