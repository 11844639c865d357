"""Find the nearest adversarial image of each image, and print quantiles of the distances."""

from robustkit import load_data, load_model, minimum_norm

data = load_data("digits:test").head(8)
nearest = minimum_norm(
    load_model("robustkit:digits-cnn"), data.images(range(8)), data.labels, "l2", attack="fmn(steps=50)"
)

print("distances:", [round(float(distance), 3) for distance in nearest.distance])
print("median:   ", round(float(nearest.distance.median()), 3))
