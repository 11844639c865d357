"""Draw with a classifier: images of each class from grey noise, and images changed into every other class.

    python scripts/tools/generate_images.py MODEL --data digits:test --out FILE.png

The multi-resolution prior of Fort & Lakshminarayanan 2024 (arXiv:2408.05446) moves an image towards a class: from
grey by at most 128/255, as in the authors' notebook, and from an image by --threat. The first row of the grid
begins in grey, each other row in the image at its left; columns are classes. Each step has one draw of a model
that draws. The table says which share of the pictures the model takes for their class, and how surely, on a draw
that no step has seen: the pictures tell what it looks for, not whether it can be fooled by less.
Hardware: 1 CPU core. Minutes: under 1 for digits, 2 for ten classes of a ResNet-20 with --steps 200.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustkit import load_model
from robustkit.attack_api import Model, Rows, RowWise, query
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.registry import make

GREY, NOISE = "linf:128/255", 0.05
# Pixels between pictures, and the least height of one.
GAP, LEAST = 2, 64


def towards(model: Model, start: Tensor, classes: Tensor, threat: ThreatModel, attack: RowWise) -> Tensor:
    """Return the images after all steps of an attack towards their classes (B), which does not end at success."""
    goal = Goal(classes, classes)
    rows = Rows(start, goal, threat, RowRng(0, "pictures", torch.arange(len(start))), goal)
    state = attack.init(rows)
    for number in range(attack.steps):
        rows = replace(rows, rng=rows.rng.at(step=number + 1))
        state = attack.step(rows, state, query(model, state["x"], goal, "ce"))
    return state["x"]


def pictures(
    model: Model, images: Tensor, classes: int, threat: ThreatModel, attack: RowWise, seed: int = 0
) -> Tensor:
    """Return the grid's pictures (rows, classes + 1, C, H, W); the first column is what a row begins with."""
    noise = RowRng(seed, "grey", torch.zeros(1, dtype=torch.int64)).uniform(*images.shape[1:])
    begun = torch.cat([0.5 + NOISE * (noise - 0.5), images])
    found = []
    for number, start in enumerate(begun):
        rules = ThreatModel.parse(GREY) if number == 0 else threat
        made = towards(model, start.repeat(classes, 1, 1, 1), torch.arange(classes), rules, attack)
        found.append(torch.cat([start[None], made]))
    return torch.stack(found)


def sureness(model: Model, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row which share of the pictures is taken for its class, and the mean probability of that."""
    rows, columns = grid.shape[:2]
    with torch.no_grad():
        chances = model(grid[:, 1:].flatten(0, 1)).softmax(1).view(rows, columns - 1, -1)
    own = chances.diagonal(dim1=1, dim2=2)
    return (own == chances.amax(2)).float().mean(1), own.mean(1)


def draw(grid: Tensor) -> Image.Image:
    """Return the grid as one picture."""
    scale = -(-LEAST // grid.shape[3])
    large = grid.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    padded = torch.nn.functional.pad(large, (0, GAP, 0, GAP), value=1.0)
    rows, columns, channels, height, width = padded.shape
    sheet = padded.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    pixels = (sheet * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="robustkit:digits-cnn")
    parser.add_argument("--data", default="digits:test")
    parser.add_argument("--threat", default="linf:96/255")
    parser.add_argument("--rows", type=int, default=4, help="images that are changed, of as many classes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--skip", type=int, default=0, help="finest resolutions that are left out")
    parser.add_argument("--out", type=Path, default=Path("pictures.png"))
    given = parser.parse_args()
    model = load_model(given.model)
    samples = load_data(given.data)
    first = [int(np.flatnonzero(samples.labels == label)[0]) for label in np.unique(samples.labels)[: given.rows]]
    images = samples.images(first)
    with torch.no_grad():
        classes = model(images).shape[1]
    attack = make("multires-prior", steps=given.steps, skip=given.skip)
    grid = pictures(model, images, classes, ThreatModel.parse(given.threat), attack)
    draw(grid).save(given.out)
    for name, share, sure in zip(["grey", *(f"image {n}" for n in first)], *sureness(model, grid), strict=True):
        print(f"{name:<10} taken for its class: {100 * float(share):5.1f} %   mean probability {float(sure):.3f}")
    print(given.out)


if __name__ == "__main__":
    main()
