"""The fastest way to run a model in a search: folded batch norms, precision, memory layout; found by trial."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from robustkit.core.devices import ComputeDevice
from robustkit.core.isolation import quietly
from robustkit.core.memory import free_memory
from robustkit.core.out_of_memory import try_in_memory
from robustkit.core.shapes import Images, Logits
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.batchnorm_folding import folded
from robustkit.engine.model.converted_weights import module_state, with_converted_weights
from robustkit.engine.model.instrumented_model import MAX_TRIAL_BATCH, ExecutionConfig, InstrumentedModel
from robustkit.engine.model.profiling import MAX_TIME_SHARE, timed_pass
from robustkit.engine.model.rounding import measured_rounding
from robustkit.models.classifier import Classifier
from robustkit.runs.recorded_outputs import run_once

# A config is given up if two images take so many times the current config's time, and so many seconds.
GIVE_UP_FACTOR, GIVE_UP_SECONDS = 3, 0.05
# A config is timed on more images only if it takes at most this multiple of the fastest one's time.
MAX_TIME_FACTOR = 1.5
# Configs are timed in turn, at most so many times each; after so many seconds no further turn begins.
MAX_TURNS, MAX_TURN_SECONDS = 3, 0.25
# Logits of a config that differ by more than this share of the mean difference of the two largest are wrong.
MAX_SHIFT = 0.1
# Copies of the net with converted weights take at most this share of the free memory.
MAX_COPIES_SHARE = 0.25
# How many passes of each image measure the rounding of a config.
ROUNDING_PASSES = 3
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Trial:
    """A config with its least seconds for a pass of `rows` images, and their logits; `images` were run in all."""

    config: ExecutionConfig
    seconds: float = math.inf
    rows: int = 0
    images: int = 0
    logits: Logits | None = None

    def time(self, model: InstrumentedModel, x: Images) -> None:
        """Time a forward and backward pass of x; the time is infinite if the model raises an error."""
        try:
            with quietly(), model.using(self.config):
                timed = try_in_memory(lambda: timed_pass(model, x), model.device)
        except Exception:  # whatever the model's code raises under a config that it was not made for
            timed = None
        seconds, logits = timed or (math.inf, None)
        self.seconds = min(seconds, self.seconds) if self.rows == len(x) else seconds
        self.rows, self.logits, self.images = len(x), logits, self.images + len(x)

    def record(self, rounding: float) -> dict[str, Any]:
        """Return what builds the config again, as plain values."""
        return {
            "fold": self.config.folded,
            "precision": self.config.precision,
            "layout": next(name for name, layout in LAYOUTS.items() if layout == self.config.layout),
            "converted": self.config.original is not None,
            "rounding": rounding,
        }


class ConfigBuilder:
    """Builds execution configs of a model; each copy of it is made once."""

    def __init__(self, model: InstrumentedModel, x: Images) -> None:
        """Fold the batch norms of the model, if its logits of x (B C H W) stay the same."""
        self.model, self.device = model.model, model.device
        self.folded = folded(model.model, x)
        self.copies = dict[tuple[torch.dtype | None, str], Classifier | None]()

    def config(self, *, fold: bool, precision: str, layout: str, converted: bool) -> ExecutionConfig:
        """Return the config of these values; without converted weights where there is no such copy."""
        net = (self.folded if fold else None) or self.model
        config = ExecutionConfig(net, precision, LAYOUTS[layout], folded=net is not self.model)
        if not converted:
            return config
        key = config.dtype, layout
        if key not in self.copies:
            room = MAX_COPIES_SHARE * free_memory(self.device) / (1 + len(self.copies))
            self.copies[key] = with_converted_weights(net, config.dtype, config.layout, room)
        copy = self.copies[key]
        return config if copy is None else replace(config, net=copy, original=net)


def tune(
    model: InstrumentedModel,
    x: Images,
    *,
    precision: bool,
    rows: int | None = None,
    threat: ThreatModel | None = None,
) -> int:
    """Set `model.config` to the fastest for a forward and backward pass; return how many images were run for it.

    Tried are batch norms folded into convolutions, two memory layouts and, if `precision`, bfloat16, and TF32 on a
    device that has it, each with weights that are converted once where that is possible. A config is rejected if
    the model raises an error or its logits shift by more than a tenth of the mean difference between the two
    largest of an image: CrossMax makes it so small that a search in bfloat16 takes twice the passes. The choice is
    made once per run: a resumed run uses the same one.

    Args:
        model: with the config to start from.
        x: images to try on (B C H W).
        precision: whether to try other precisions.
        rows: images of a step, for which x is repeated; None for as many as x has.
        threat: in which the rounding of a low precision is measured; None to measure it on clean images.
    """
    builder = ConfigBuilder(model, x)

    def choose() -> dict[str, Any]:
        return _choose(model, builder, x, precision=precision, rows=rows or len(x), threat=threat)

    choice = run_once(f"config {model.device.type}", choose)
    images, rounding = int(choice.pop("images")), choice.pop("rounding", 0.0)
    if choice:
        model.config = replace(builder.config(**choice), rounding=rounding)
    if model.config.original is not None and model.micro_batch is not None:
        # The copy takes memory.
        fits = free_memory(model.device) // 2 // max(model.saved_bytes, 1)
        model.micro_batch = min(model.micro_batch, max(1, fits))
    return images


def _choose(
    model: InstrumentedModel,
    builder: ConfigBuilder,
    x: Images,
    *,
    precision: bool,
    rows: int,
    threat: ThreatModel | None,
) -> dict[str, Any]:
    """Return the arguments of `ConfigBuilder.config` for the fastest config, its rounding, and the images run.

    Configs are timed on few images first, and only the fastest of them on as many as a step has.
    """
    plain = Trial(model.config)
    started, rejected_images = _started(model, builder, plain, x[:2], precision)
    few, alive = x[:MAX_TRIAL_BATCH], started
    for size in dict.fromkeys((len(few), max(rows, len(few)))):
        if size == len(few):
            _time_in_turns(model, alive, few)
            alive = [trial for trial in alive if _agrees(trial, plain)]
        elif len(alive) > 1:
            _time_in_turns(model, alive, x.repeat(-(-size // len(x)), 1, 1, 1)[:size])
        limit = MAX_TIME_FACTOR * min((trial.seconds for trial in alive), default=0.0)
        alive = [trial for trial in alive if trial.seconds <= limit]
    images = rejected_images + sum(trial.images for trial in started)
    ranked = [trial for trial in started if trial.seconds < math.inf and _agrees(trial, plain)]
    ranked.sort(key=lambda trial: (-trial.rows, trial.seconds))
    given = plain.config.precision
    for trial in ranked:
        if not all(_saves_time(trial, other) for other in ranked if _is_preferred(other, trial, plain)):
            continue
        rounding, helps = 0.0, True
        if trial.config.precision != "fp32":
            rounding, helps = measured_rounding(model, trial.config, few, threat)
            images += ROUNDING_PASSES * len(few)
        if helps or trial.config.precision == given:
            return {"images": images, **trial.record(rounding)}
    return {"images": images}


def _is_preferred(other: Trial, trial: Trial, plain: Trial) -> bool:
    """Return whether a config has to save a tenth of the time of another one.

    The other one is the config that is used now or, for a lower precision, has the precision that is used now.
    """
    given = plain.config.precision
    lower = trial.config.precision != given and other.config.precision == given
    return trial is not plain and (other is plain or lower)


def _saves_time(trial: Trial, other: Trial) -> bool:
    # Of two that were timed on different numbers of images, the one with fewer was given up as slow.
    if trial.rows != other.rows:
        return trial.rows > other.rows
    return trial.seconds < MAX_TIME_SHARE * other.seconds


def _agrees(trial: Trial, plain: Trial) -> bool:
    """Return whether logits are finite and nearly those of the config that is used now."""
    if trial is plain:
        return True
    if trial.logits is None or plain.logits is None or not trial.logits.isfinite().all():
        return False
    if len(trial.logits) != len(plain.logits):
        return True
    shift = (trial.logits - plain.logits).abs().amax()
    best, second = plain.logits.topk(2, 1).values.unbind(1)
    return bool(shift <= MAX_SHIFT * (best - second).mean())


def _time_in_turns(model: InstrumentedModel, trials: list[Trial], x: Images) -> None:
    """Time each config on x in turn, since other work on the machine slows all of them alike then."""
    begun = time.perf_counter()
    for _ in range(MAX_TURNS):
        for trial in trials:
            trial.time(model, x)
        if time.perf_counter() - begun > MAX_TURN_SECONDS:
            return


def _started(
    model: InstrumentedModel, builder: ConfigBuilder, plain: Trial, two: Images, precision: bool
) -> tuple[list[Trial], int]:
    """Return trials of the configs that are not far slower on two images, and the images run by the others."""
    for _ in range(2):
        plain.time(model, two)
    limit = max(GIVE_UP_FACTOR * plain.seconds, GIVE_UP_SECONDS)
    precisions = [model.config.precision]
    if precision:
        precisions += ["tf32", "bf16"] if ComputeDevice(model.device).has_tf32 else ["bf16"]
    started, rejected = [plain], 0
    if plain.logits is None:
        return [], plain.images
    for name, layout in itertools.product(precisions, LAYOUTS):
        for converted in (True, False):
            config = builder.config(fold=True, precision=name, layout=layout, converted=converted)
            # A copy with random draws of its own, or one that changes itself, is another model.
            if config == model.config or (config.original is not None and model.random):
                continue
            trial = Trial(config)
            before = module_state(config.net.net)
            for _ in range(2):
                trial.time(model, two)
            changed = config.original is not None and module_state(config.net.net) != before
            if trial.seconds <= limit and not changed:
                started.append(trial)
                break
            rejected += trial.images
            if config.original is None or (trial.seconds < math.inf and not changed):
                break
    return started, rejected
