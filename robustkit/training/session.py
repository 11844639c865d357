"""What every process of a run is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustkit.core.flags import Flag
from robustkit.models.strings import ModelString
from robustkit.runs.training_record import TrainSpec
from robustkit.training.images import ImageSet
from robustkit.training.method import Method, Plan
from robustkit.training.progress import TrainProgress


@dataclass(frozen=True)
class Job:
    """All that a process needs to train; it must pickle.

    Attributes:
        spec: what determines the weights.
        method: the hooks.
        plan: what they may know.
        archs: of each member, complete and normalised (`robustkit.training.nets`).
        trust_code: whether Python code that a run folder among them names is run.
        train: on the CPU.
        test: on the CPU, if there is any.
        parallel: how processes share the run, one of `robustkit.training.parallel.data_parallel.CHOICES`.
        folder: of the run.
        progress: who to tell.
        class_names: what the training data calls the classes.
        flags: reasons to doubt the data.
    """

    spec: TrainSpec
    method: Method
    plan: Plan
    archs: tuple[ModelString, ...]
    trust_code: bool
    train: ImageSet
    test: ImageSet | None
    parallel: str
    folder: Path
    progress: TrainProgress
    class_names: tuple[str, ...] | None = None
    flags: tuple[Flag, ...] = ()
