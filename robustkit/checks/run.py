"""All diagnoses of a model before it is attacked, and those of a run's result."""

from __future__ import annotations

import math

from robustkit.checks import gradients, outputs, randomness, signs, strength
from robustkit.checks.probe import Probe
from robustkit.core.flags import Flag

BEFORE_ATTACKS = (
    outputs.probabilities,
    outputs.never_positive,
    outputs.saturated,
    outputs.dlr_flat,
    outputs.underflow,
    outputs.too_large_for_half,
    outputs.few_classes,
    outputs.dim_images,
    outputs.batch_dependent,
    randomness.randomised,
    randomness.optimises_at_test_time,
    gradients.broken,
    gradients.zero,
    gradients.vanishing,
    gradients.disagrees,
    gradients.unlike,
    signs.unstable,
    strength.robust_at_any_eps,
    strength.unconverged,
    signs.silent,
    signs.incomplete,
    signs.finds_planted_points,
)

# Flags of models whose output for one image varies.
UNSTEADY = {"randomised", "batch-dependent"}
# Flags that make results of attacks on the model's own gradients unreliable.
DOUBTS = {
    *UNSTEADY,
    *("probabilities", "saturated-softmax", "zero-gradient", "vanishing-gradient", "wrong-gradient"),
    *("no-gradient", "test-time-optimisation", "survives-any-eps", "not-converged", "training-mode"),
    *("underflow", "unlike-gradients", "unstable-loss", "incomplete-optimisation", "attack-not-alive"),
    "broken-gradient",
}


def training_mode(was_training: bool, stuck: int) -> list[Flag]:
    """Return a flag if a model was in training mode, or `count` of its modules stay in it after eval()."""
    if stuck:
        return [
            Flag(
                "training-mode",
                "warning",
                stuck,
                "parts of the model stayed in training mode although eval() was called: batch norm there uses "
                "the other images of the batch, and dropout is random",
                "remove the call of train() from the model, unless it is intended",
            )
        ]
    if was_training:
        return [
            Flag(
                "training-mode",
                "warning",
                None,
                "the model was in training mode; it was evaluated in eval mode and then restored",
                "call model.eval() before the evaluation",
            )
        ]
    return []


def diagnose(probe: Probe) -> list[Flag]:
    """Return the flags that a model raises, and the measurements of the checks that raised none, in a fixed order.

    Short checks come first, and longer ones only where they do not decide. A deterministic net whose gradients
    are useful costs about 300 passes, whatever the number of images: 32 images forward and backward, 24 repeated
    forwards, 32 passes for finite differences, 12 starts of PGD without a limit of distance, 12 first steps and
    45 passes of short PGD runs, 81 to plant 8 points and find them, and more where an attack needs several steps.
    Where a short check finds a sign of a mask, the long ones cost a few thousand passes.
    """
    flags = (check(probe) for check in BEFORE_ATTACKS)
    return [_sound(flag) for flag in flags if flag is not None]


def _sound(flag: Flag) -> Flag:
    """Return the flag, without a value and raised if the measurement is NaN or infinite."""
    if flag.value is None or math.isfinite(flag.value):
        return flag
    return Flag(
        flag.code,
        "warning",
        None,
        "cannot be measured: the model returns NaN or infinite logits close to these images",
        "find the cause in the model: an attacker could use it",
    )
