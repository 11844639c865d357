"""Keep a run in a folder: the same call resumes it, and `verify` checks every stored adversarial image again."""

import tempfile
from pathlib import Path

import numpy as np

from robustkit import evaluate, load_data, load_model, verify

model = load_model("robustkit:digits-cnn")
data = load_data("digits:test").head(16)
images, labels = data.images(range(16)), data.labels

with tempfile.TemporaryDirectory() as folder:
    run = Path(folder) / "run"
    first = evaluate(model, images, labels, "linf:0.15", suite="pgd(steps=10)", out=run)
    again = evaluate(model, images, labels, "linf:0.15", suite="pgd(steps=10)", out=run)  # read from the folder
    print(f"run {first.run_id}, and again {again.run_id}")

    adversarial = np.load(run / "adversarial.npz")
    print("files:", ", ".join(sorted(file.name for file in run.iterdir() if not file.name.startswith("."))))
    print("adversarial images:", adversarial["x"].shape, "at positions", adversarial["index"].tolist())

    result = verify(run, model, images, labels)
    print(f"verified: {result.checked} adversarial images, {len(result.bad)} bad records")
