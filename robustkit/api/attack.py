"""`robustkit.attack`: adversarial images of a model, for notebooks and scripts."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from robustkit.api.inputs import load_or_wrap, place_of, samples_and_threat
from robustkit.api.options.evaluate import AttackArguments
from robustkit.api.verbs import verb
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.isolation import evaluation_mode, own_randomness
from robustkit.core.rng import RowRng
from robustkit.engine.evaluation.sanity import check_logits
from robustkit.engine.evaluation.verdicts import image_hashes, judge, sample_ids
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.engine.model.random_verdicts import is_random
from robustkit.models.label_matching import matched_to
from robustkit.registry import parse_suite


@verb(AttackArguments)
def attack(arguments: AttackArguments) -> Tensor:
    """Return an adversarial image for each image that the attack fools the model on, else the image itself.

    Every image that differs from its clean one is verified: it is inside the threat, and the model misclassifies
    it in float32. An image that the model misclassifies as it is, or that the attack did not break, is returned
    unchanged. For a robust accuracy with its checks and its record use `robustkit.evaluate`.

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
    x, seed, batch_size = arguments.x, arguments.seed, arguments.batch_size
    samples, rules = samples_and_threat(x, arguments.y, arguments.threat)
    if rules.minimal:
        raise UsageError(f"threat '{rules}' has no eps; use robustkit.minimum_norm, or an eps such as linf:8/255.")
    entries = parse_suite(arguments.attack, rules.norm)
    if any(entry.view or entry.conditional or entry.arm for entry in entries):
        raise UsageError(
            "suites with views or with attacks that not every image gets, such as auto, need an evaluation: use "
            "robustkit.evaluate, or pass attacks such as 'pgd(steps=40),square'."
        )
    net = load_or_wrap(arguments.model, arguments.trust_code)
    target = place_of(net, arguments.device)
    samples = matched_to(samples, net)
    instrumented = InstrumentedModel(net.to(target).expect(samples.num_classes), target)
    names = [entry.name for entry in entries]
    found = []
    with evaluation_mode(net), own_randomness(seed, "attack"):
        image = samples.images([0]).to(target)
        measure(instrumented, image, batch_size)
        instrumented.random = is_random(partial(InstrumentedModel.logits_fp32, instrumented), image)
        for begin in range(0, len(samples), batch_size):
            part = np.arange(begin, min(begin + batch_size, len(samples)))
            clean, labels = samples.images(part).to(target), torch.from_numpy(samples.labels[part]).to(target)
            logits = instrumented.logits_fp32(clean)
            check_logits(logits, samples.labels[part], part)
            ids = sample_ids(image_hashes(clean)).to(target)
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
