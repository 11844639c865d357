"""Evaluate a defense that hides its gradient: the flags and the attacks on views of the model reveal it."""

from robustkit import evaluate, load_data, load_model

data = load_data("digits:test").head(12)
images, labels = data.images(range(12)), data.labels
rounded = load_model("robustkit:digits-cnn?defense=bit-depth:4")  # rounding has a gradient of zero

plain = evaluate(rounded, images, labels, "linf:0.15", suite="pgd(steps=10)")
adaptive = evaluate(rounded, images, labels, "linf:0.15", suite="pgd(steps=10),pgd(steps=10)@mended")

print(f"PGD on the model's own gradient: {plain.robust_accuracy.value:.1%}")
print(f"PGD on the view 'mended':        {adaptive.robust_accuracy.value:.1%}")
print("flags:", ", ".join(flag.code for flag in plain.flags if flag.warns))
