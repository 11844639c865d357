"""`robustkit.attack`: adversarial images of a model, for notebooks and scripts."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkit.api.inputs import Model, Threat, place_of, samples_and_threat
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.isolation import default_torch_modes, evaluation_mode, own_randomness
from robustkit.core.rng import RowRng
from robustkit.engine.evaluation.sanity import check_logits
from robustkit.engine.evaluation.verdicts import image_hashes, judge, sample_ids
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.engine.model.random_verdicts import is_random
from robustkit.models import as_classifier, load_model
from robustkit.models.label_matching import matched_to
from robustkit.registry import Suite, parse_suite


@default_torch_modes()
def attack(
    model: Model,
    x: Any,
    y: Any = None,
    threat: Threat = "linf:8/255",
    attack: Suite = "pgd(steps=40)",
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 256,
    trust_code: bool = False,
) -> Tensor:
    """Return an adversarial image for each image that the attack fools the model on, else the image itself.

    Every image that differs from its clean one is verified: it is inside the threat, and the model misclassifies
    it in float32. An image that the model misclassifies as it is, or that the attack did not break, is returned
    unchanged. For a robust accuracy with its checks and its record use `robustkit.evaluate`.

    Args:
        model: a model string, or any function from images (B C H W) in [0, 1] to logits (B K).
        x: images (N C H W) in [0, 1] or uint8, or data that holds its labels, as in `evaluate`.
        y: labels (N), from 0 to K - 1.
        threat: the perturbations that are allowed, e.g. `linf:8/255`, or `l2:0.5`.
        attack: an attack or several, which run in turn on the images that are left: names with parameters, attack
            objects, or functions `(model, x, y, eps) -> x_adv`.
        seed: of every random number.
        device: where to compute; `auto` is where the model's parameters are.
        batch_size: images that an attack gets at once, at least 1.
        trust_code: run Python code that the record of a run folder names, too.

    Returns:
        Images (N C H W), float32 in [0, 1], on the device of `x`.

    Raises:
        UsageError: the request cannot be carried out.
        RunError: the attack or the model failed.

    Example:
        >>> import robustkit
        >>> data = robustkit.load_data("digits:test").head(8)
        >>> x_adv = robustkit.attack("robustkit:digits-cnn", data, threat="linf:0.15", attack="pgd(steps=10)")
        >>> tuple(x_adv.shape)
        (8, 1, 8, 8)
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}.")
    samples, rules = samples_and_threat(x, y, threat)
    if rules.minimal:
        raise UsageError(f"threat '{rules}' has no eps; use robustkit.minimum_norm, or an eps such as linf:8/255.")
    entries = parse_suite(attack, rules.norm)
    if any(entry.view or entry.spare or entry.arm for entry in entries):
        raise UsageError(
            "suites with views or with attacks that not every image gets, such as auto, need an evaluation: use "
            "robustkit.evaluate, or pass attacks such as 'pgd(steps=40),square'."
        )
    net = load_model(model, trust_code=trust_code) if isinstance(model, str) else as_classifier(model)
    place = place_of(net, device)
    samples = matched_to(samples, net)
    instrumented = InstrumentedModel(net.to(place).expect(samples.num_classes), place)
    names = [entry.name for entry in entries]
    found = []
    with evaluation_mode(net), own_randomness(seed, "attack"):
        image = samples.images([0]).to(place)
        measure(instrumented, image, batch_size)
        instrumented.random = is_random(partial(InstrumentedModel.logits_fp32, instrumented), image)
        for begin in range(0, len(samples), batch_size):
            part = np.arange(begin, min(begin + batch_size, len(samples)))
            clean, labels = samples.images(part).to(place), torch.from_numpy(samples.labels[part]).to(place)
            logits = instrumented.logits_fp32(clean)
            check_logits(logits, samples.labels[part], part)
            ids = sample_ids(image_hashes(clean)).to(place)
            points, left = clean.clone(), (logits.argmax(1) == labels).nonzero()[:, 0]
            for number, entry in enumerate(entries):
                if len(left):
                    rng = RowRng(seed, f"{names[number]}/{names[:number].count(names[number])}", ids[left])
                    start = clean[left].clone()
                    tried = entry.attack(instrumented, start, Goal(labels[left]), rules, rng=rng)
                    judged = judge(instrumented, clean[left], labels[left], tried, rules)
                    points[left[judged.fooled]] = judged.x[judged.fooled]
                    left = left[~judged.fooled]
            found.append(points)
    return torch.cat(found).to(x.device if isinstance(x, Tensor) else "cpu")
