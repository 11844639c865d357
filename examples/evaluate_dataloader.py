"""Evaluate on a DataLoader, and list the verdict of each image."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from robustkit import evaluate, load_data, load_model

data = load_data("digits:test").head(16)
loader = DataLoader(TensorDataset(data.images(range(16)), torch.as_tensor(data.labels)), batch_size=5)

report = evaluate(load_model("robustkit:digits-cnn"), loader, threat="l2:0.5", suite="pgd(steps=10)")

for verdict in report.verdicts:
    result = "robust" if verdict.robust else f"fooled by {verdict.attack}"
    print(f"image {verdict.index}: label {verdict.label}, margin {verdict.margin:+.2f}, {result}")
