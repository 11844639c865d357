"""Fine-tune a model by adversarial training, and evaluate it beside the original."""

import tempfile

from robustkit import evaluate, load_data, load_model, train

data = load_data("digits:test").head(48)
images, labels = data.images(range(48)), data.labels


def show(name, model):
    """Print clean and robust accuracy of a model."""
    report = evaluate(model, images, labels, "linf:0.15", suite="pgd(steps=10)")
    print(f"{name}: clean {report.clean_accuracy.value:.1%}, robust {report.robust_accuracy.value:.1%}")


with tempfile.TemporaryDirectory() as folder:
    method = "pgd-at(threat=linf:0.15,steps=3)"
    train(
        method, "digits:train", arch="robustkit:digits-cnn?pretrained=true", epochs=8, lr=0.05, out=f"{folder}/run"
    )
    show("trained on clean images", load_model("robustkit:digits-cnn"))
    show("fine-tuned adversarially", load_model(f"{folder}/run/"))  # the folder of a run is a model string
