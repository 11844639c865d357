"""Craft adversarial images on surrogate models, and measure how often they fool a target model."""

import tempfile

import torch

from robustkit import craft, load_data, train

data = load_data("digits:test").head(32)
images, labels = torch.as_tensor(data.images(range(32))), data.labels

with tempfile.TemporaryDirectory() as folder:
    train("standard", "digits:train", epochs=8, seed=1, out=f"{folder}/surrogate")
    record = craft(
        f"{folder}/surrogate/",  # the folder of a run is a model string
        images,
        labels,
        "linf:0.3",
        attack="mi-fgsm(steps=10)+di",
        targets=["robustkit:digits-cnn"],
    )

(target,) = record.targets
print(f"success on the surrogate: {record.surrogates[0].success:.1%}")
print(f"success on the target:    {target.success:.1%} (random signs: {target.noise:.1%})")
