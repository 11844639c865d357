"""Labels renumbered to the class numbers of a loaded model."""

from __future__ import annotations

import torch

from robustkit.core.isolation import evaluation_mode, own_randomness
from robustkit.data.classes import WNID, match_classes
from robustkit.data.samples import Samples
from robustkit.models.classifier import Classifier


def matched_to(samples: Samples, model: Classifier) -> Samples:
    """Return the samples with the model's own labels, as far as the class names determine them (see `matched`)."""
    if samples.classes is None or samples.fixed:
        return samples
    count = model.num_classes
    if count is None and (samples.by_name or WNID.fullmatch(samples.classes[0])):
        count = _count(model, samples)
    return match_classes(samples, count, model.class_names)


def _count(model: Classifier, samples: Samples) -> int | None:
    """Return the number of logits for the first image; None if the model fails, which the run then reports."""
    try:
        image = samples.images([0])
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), image.device)
        with torch.no_grad(), own_randomness("classes"), evaluation_mode(model):
            return int(model(image.to(device)).shape[1])
    except Exception:
        return None
