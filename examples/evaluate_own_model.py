"""Evaluate a model: any callable from images on [0, 1] (B C H W) to logits (B K)."""

from robustkit import ThreatModel, evaluate, load_data, load_model

net = load_model("robustkit:digits-cnn")
data = load_data("digits:test").head(32)
images, labels = data.images(range(32)), data.labels


def model(x):
    """Return the logits of a batch of images; preprocessing such as normalisation belongs in here."""
    return net(x)


report = evaluate(model, images, labels, ThreatModel.parse("linf:0.1"), suite="pgd(steps=10),apgd(steps=10)")

print(f"clean accuracy  {report.clean_accuracy.value:.1%}")
print(f"robust accuracy {report.robust_accuracy.value:.1%}")
print(f"95 % interval   {report.robust_accuracy.low:.1%} to {report.robust_accuracy.high:.1%}")
for flag in report.flags:
    print(f"{flag.level} {flag.code}: {flag.meaning}")
