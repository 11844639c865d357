"""Measure robust accuracy at 16 values of eps in one run."""

from robustkit import evaluate, load_data, load_model

data = load_data("digits:test").head(12)
report = evaluate(
    load_model("robustkit:digits-cnn"),
    data.images(range(12)),
    data.labels,
    "linf:0.1",
    suite="pgd(steps=5)",
    curve=True,
)

for radius, accuracy in zip(report.curve.radii, report.curve.robust_accuracy, strict=True):
    print(f"eps {radius:.4f}   robust accuracy {accuracy.value:6.1%}   {'#' * round(40 * accuracy.value)}")
print("median smallest fooling eps:", report.curve.median)
