"""Evaluates more targets on the images of a craft run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.crafting.judging import TargetEvaluator, clean_flags
from robustkit.data.samples import Samples
from robustkit.engine.model.loaded_models import Net
from robustkit.engine.progress import Progress
from robustkit.runs import run_folder
from robustkit.runs.craft_record import Craft
from robustkit.runs.opening import open_for_writing, require_writable


def judge_more(
    path: Path, samples: Samples, targets: Sequence[Net], device: torch.device, progress: Progress
) -> Craft:
    """Evaluate these targets on the images of a craft run; write and return its record.

    The images are checked first: their hash, and that each is inside ball and box.

    Raises:
        UsageError: if the folder holds no images, or others than its record says, or a target has other classes
            than the surrogates.
    """
    record = run_folder.read_craft(path)
    _check_classes(record, targets)
    threat = ThreatModel.parse(record.spec.threat)
    with open_for_writing(path, record.spec) as writable:
        require_writable(path, writable, "targets")
        run_folder.check_seals(path, record)
        images = run_folder.read_adversarial(path)["x"]
        _check_inside(images, samples, threat, path)
        known = {judged.fingerprint for judged in record.targets}
        evaluator = TargetEvaluator(samples, threat, record.goals, record.spec.seed, device)
        missing = [net for net in targets if net.fingerprint not in known]
        progress.stage("targets", record.n * max(len(missing), 1), record.n, record.n)
        try:
            for number, net in enumerate(missing):
                record = record.judged([judged := evaluator.judge(net, images, controls=True)])
                record = replace(record, flags=[*record.flags, *clean_flags([judged], record.labels, net.classes)])
                run_folder.write_record(path, record)
                progress.advance(record.n * (number + 1), record.n)
        finally:
            progress.close()
    return record


def _check_classes(record: Craft, targets: Sequence[Net]) -> None:
    classes = record.environment.get("classes")
    for net in targets:
        if classes not in (None, net.classes):
            raise UsageError(
                f"target {net.string!r} has {net.classes} classes, the surrogates have {classes}; give models "
                "of the same classes."
            )


def _check_inside(images: np.ndarray, samples: Samples, threat: ThreatModel, path: Path) -> None:
    for begin in range(0, len(samples), 256):
        positions = np.arange(begin, min(begin + 256, len(samples)))
        inside = threat.contains(torch.from_numpy(images[positions]), samples.images(positions))
        if not bool(inside.all()):
            position = begin + int((~inside).nonzero()[0])
            raise UsageError(
                f"{path / run_folder.ADVERSARIAL}: the image at position {position} is not within {threat}."
            )
