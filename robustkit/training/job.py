"""What every process of a training run receives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustkit.core.flags import Flag
from robustkit.models.strings import ModelString
from robustkit.runs.training_record import TrainSpec
from robustkit.training.images import ImageSet
from robustkit.training.method import Method, Plan
from robustkit.training.parallel.data_parallel import DATA
from robustkit.training.progress import TrainProgress


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The fields that a request to train and the job of each process share.

    Args:
        method: the hooks of the training method.
        parallel: how processes share the run, one of `robustkit.training.parallel.data_parallel.CHOICES`.
        trust_code: whether Python code that a run folder names as architecture may be run.
    """

    method: Method
    parallel: str = DATA
    trust_code: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingJob(MethodOptions):
    """All that a process needs to train. It must be picklable.

    Args:
        spec: what determines the weights.
        plan: the size of the run.
        archs: model string of each member, complete and with normalisation (`robustkit.training.nets`).
        train: training images, on the CPU.
        test: test images, on the CPU, if there are any.
        folder: folder of the run.
        progress: receives the events of the run.
        class_names: names of the classes in the training data.
        flags: reasons to doubt the data.
        deterministic: use deterministic kernels only.
    """

    spec: TrainSpec
    plan: Plan
    archs: tuple[ModelString, ...]
    train: ImageSet
    test: ImageSet | None
    folder: Path
    progress: TrainProgress
    class_names: tuple[str, ...] | None = None
    flags: tuple[Flag, ...] = ()
    deterministic: bool = False
