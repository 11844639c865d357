"""Reports made by hand, with their examples, for tests of pages and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robustkit.core.flags import Flag
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Cost, Outcome, Rate, Stage
from robustkit.runs.spec import RunSpec, dumps

FLAG = Flag(
    "zero-gradient", "warning", 7, "the gradient is zero for some images", "run an attack without gradients"
)


def make_report(
    n: int = 40,
    fooled: int = 12,
    *,
    wrong: int = 4,
    classes: int = 10,
    attacks: tuple[str, ...] = ("pgd", "autoattack:square"),
    flags: tuple[Flag, ...] = (),
    model: str = "robustkit:digits-cnn",
    data: str = "digits:test",
    threat: str = "linf:8/255",
    seed: int = 0,
    fingerprint: str = "cd" * 32,
) -> Report:
    """The first `wrong` images are wrong as they are, the next `fooled` fall to the attacks in turn."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(2, 1, n).__abs__() + 0.01
    verdicts, falls = [], [0] * (len(attacks) + 1)
    for index in range(n):
        label = index % classes
        if index < wrong:
            falls[0] += 1
            verdicts.append(Outcome(index, label, label + 1, False, "clean", -margins[index]))
        elif index < wrong + fooled:
            falls[1 + index % len(attacks)] += 1
            verdicts.append(
                Outcome(index, label, label, False, attacks[index % len(attacks)], -margins[index] / 9)
            )
        else:
            verdicts.append(Outcome(index, label, label, True, None, margins[index]))
    stages, left = [], n
    for number, attack in enumerate(("clean", *attacks)):
        gone = falls[number]
        spent = left * (1 if number == 0 else 40)
        left -= gone
        stages.append(Stage(attack, Rate.of(left, n), gone, spent, spent if number else 0, 0.25 + number))
    spec = RunSpec(
        model={"string": model, "fingerprint": "ab" * 32},
        data={"string": data, "n": n, "fingerprint": fingerprint},
        threat=threat,
        suite=[{"name": attack, "steps": 40, "step_size": 0.1, "random_start": True} for attack in attacks],
        seed=seed,
    )
    return Report(
        run_id=spec.run_id,
        spec=spec,
        n=n,
        clean_accuracy=stages[0].robust_accuracy,
        robust_accuracy=stages[-1].robust_accuracy,
        stages=stages,
        cost=Cost(
            sum(s.forwards for s in stages), sum(s.backwards for s in stages), sum(s.seconds for s in stages)
        ),
        flags=list(flags),
        verdicts=verdicts,
        environment={
            "versions": {"python": "3.11.7", "robustkit": "0.1.0", "timm": None},
            "device": "cpu",
            "device_name": "x86_64",
            "commit": None,
            "precision": "fp32",
        },
    )


def make_examples(
    report: Report, shape: tuple[int, ...] = (3, 32, 32), *, classes: tuple[str, ...] = (), side: int = 96
) -> dict[str, Any]:
    """Noise on noise, within the report's threat if that is linf:8/255; images above `side` are cut to it."""
    rng = np.random.default_rng(1)
    index = np.array([v.index for v in report.verdicts if not v.robust and v.attack != "clean"], np.int64)
    shown = index[:16]
    small = (shape[0], min(shape[1], side), min(shape[2], side))
    clean = rng.random((len(shown), *small), dtype=np.float32)
    change = rng.uniform(-8 / 255, 8 / 255, clean.shape).astype(np.float32)
    labels = np.array([report.verdicts[image].label for image in index], np.int64)
    return {
        "index": index,
        "distance": rng.uniform(0.5, 1, len(index)) * 8 / 255,
        "prediction": labels + 1,
        "shown": shown,
        "hard": np.arange(len(shown)) < (len(shown) + 1) // 2,
        "clean": clean,
        "adversarial": np.clip(clean + change, 0, 1),
        "shape": np.array(shape, np.int64),
        "classes": np.array(classes, np.str_),
    }


def write_run(path: Path, report: Report, examples: dict[str, Any] | None = None) -> Path:
    """Write the part of a run folder that views read."""
    path.mkdir()
    (path / run_folder.SPEC).write_text(dumps(report.spec))
    if examples is not None:
        run_folder.write_examples(path, examples)
    (path / run_folder.REPORT).write_text(dumps(report.to_json(), indent=2))
    return path
