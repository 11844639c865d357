"""Compare two models on the same images: the paired difference, its interval, and McNemar's test."""

import torch

from robustkit import evaluate, load_data, load_model
from robustkit.reporting.paired import compare

net = load_model("robustkit:digits-cnn")
data = load_data("digits:test").head(24)
images, labels = data.images(range(24)), data.labels


def blurred(x):
    """Return the logits of images that are averaged over 3 x 3 pixels first."""
    return net(torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1))


first, second = (evaluate(model, images, labels, "linf:0.1", suite="pgd(steps=10)") for model in (net, blurred))
result = compare(first, second)

print(f"robust accuracy {first.robust_accuracy.value:.1%} and {second.robust_accuracy.value:.1%}")
print(f"difference {result.difference:.1%} ({result.low:.1%} to {result.high:.1%}), p = {result.p:.3g}")
