"""Diagnoses that raise flags: reasons why the number of a run may not be what it seems."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from robustkit.engine.meter import Meter
from robustkit.record import Flag, Stage
from robustkit.shapes import Images, Labels

SQUARE_GAIN = 0.002

TRAINING_MODE = Flag(
    "training-mode",
    "warning",
    None,
    "the model was in training mode; it was evaluated in eval mode and then put back",
    "call model.eval() before, so that you know which model the number is about",
)


def before(meter: Meter, x: Images, labels: Labels, attacks: Sequence[Any]) -> list[Flag]:
    """Return AutoAttack's own diagnoses of the model on a first batch (B C H W), as flags.

    Costs 7 forwards per image: randomness 5, probabilities 1, optimisation at test time 1. A suite whose
    every attack averages over draws is not asked about randomness, as in AutoAttack's `rand`.
    """
    from pyautoattack import checks

    averaging = all(getattr(attack, "eot_iter", 1) > 1 for attack in attacks)
    heard = _Ear()
    flags = []
    with torch.no_grad():
        if not averaging:
            checks.check_randomized(meter, x, labels, bs=len(x), logger=heard)
            flags += heard.flag(
                "randomised",
                "the model answers the same images differently each time, so one draw decides a verdict",
                "use --suite autoattack-rand, which averages gradients over draws",
            )
        classes = checks.check_range_output(meter, x, logger=heard)
        flags += heard.flag(
            "probabilities",
            "the outputs are non-negative and sum to 1: probabilities, whose gradients vanish when confident",
            "let the model return logits",
        )
        with _fresh_counters(checks):
            checks.check_dynamic(meter, x, logger=heard)
        flags += heard.flag(
            "test-time-optimisation",
            "the model computes gradients in its forward pass, which AutoAttack does not see through",
            "attack it with an adaptive attack as well",
        )
    wanted = max((getattr(attack, "targets", 0) or 0 for attack in attacks), default=0)
    if wanted > classes - 1:
        flags.append(
            Flag(
                "few-classes",
                "info",
                classes,
                f"there are {classes} classes, so targeted attacks aim at {classes - 1}, not {wanted}",
                "nothing to do: every other class is aimed at",
            )
        )
    return flags


def after(stages: Sequence[Stage]) -> list[Flag]:
    """Return the diagnoses that the stages' results allow."""
    for number, stage in enumerate(stages):
        gain = stages[number - 1].robust_accuracy.value - stage.robust_accuracy.value
        if stage.attack.endswith("square") and number > 1 and gain > SQUARE_GAIN:
            return [
                Flag(
                    "square-beats-gradient",
                    "warning",
                    round(gain, 6),
                    "the score-based square attack fooled images that every gradient attack before it left: "
                    "the gradients may be masked",
                    "run square with more queries and restarts, and an adaptive attack",
                )
            ]
    return []


def judging(refused: int, broken: int, detached: bool) -> list[Flag]:
    """Return what the engine noticed while it judged a chunk: counts of images, and a missing gradient."""
    flags = []
    if refused:
        flags.append(
            Flag(
                "claims-refused",
                "info",
                refused,
                "points fooled the model only outside the ball or the [0, 1] box; they do not count",
                "nothing to do, unless there are many: then the attack does not keep to the threat",
            )
        )
    if broken:
        flags.append(
            Flag(
                "non-finite",
                "warning",
                broken,
                "attacked images gave NaN or infinite logits; they do not count as fooled",
                "find out why the model breaks there: an attacker could use it",
            )
        )
    if detached:
        flags.append(
            Flag(
                "no-gradient",
                "warning",
                None,
                "the model's output does not depend on its input differentiably: gradient attacks see zero",
                "judge by score-based attacks, or give a differentiable version of the model",
            )
        )
    return flags


class _Ear:
    """Stands in for the logger that pyautoattack's checks speak to."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warning(self, message: str) -> None:
        self.messages.append(message)

    def flag(self, code: str, meaning: str, remedy: str) -> list[Flag]:
        """Return the flag if anything was heard since the last call."""
        heard, self.messages = self.messages, []
        return [Flag(code, "warning", None, meaning, remedy)] if heard else []


class _fresh_counters:
    """The package counts gradient calls in a module global that it never resets, and drops any tracer."""

    def __init__(self, checks: Any) -> None:
        self.counts = checks.funcs

    def __enter__(self) -> None:
        self.before, self.tracer = dict(self.counts), sys.gettrace()
        self.counts.update(dict.fromkeys(self.counts, 0))

    def __exit__(self, *_: object) -> None:
        self.counts.update(self.before)
        sys.settrace(self.tracer)
