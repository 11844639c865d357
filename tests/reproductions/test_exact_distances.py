"""The exact solver of scripts/benchmarks/exact_distances.py against closed forms and a grid."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
from exact_distances import GAP, forward, nearest

NORMS = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_a_linear_model_has_the_distance_of_the_closed_form(norm, seed):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(4, 6)), rng.uniform(0.45, 0.55, 6)
    bias = rng.uniform(-0.2, 0.2, 4) - weight @ x
    logits = weight @ x + bias
    label = int(logits.argmax())
    change = np.delete(weight, label, 0) - weight[label]
    short = logits[label] - np.delete(logits, label)
    closed = (short / np.linalg.norm(change, DUAL[norm], axis=1)).min()
    witness = x + 1.01 * short[0] * change[0] / np.square(change[0]).sum()

    found = nearest([(weight, bias)], x, label, norm, witness)

    assert found.bound <= found.distance * (1 + 1e-9)
    assert found.distance == pytest.approx(closed, rel=GAP)
    assert found.distance == pytest.approx(np.linalg.norm(found.point - x, NORMS[norm]))


@pytest.mark.parametrize(("norm", "distance"), [("linf", 0.2), ("l2", 0.2062), ("l1", 0.25)])
def test_the_box_holds_back_the_nearest_point(norm, distance):
    layers = [(np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([1.5, 0.0]))]

    found = nearest(layers, np.array([0.3, 0.95]), 0, norm, np.ones(2))

    assert found.distance == pytest.approx(distance, rel=GAP)


@pytest.mark.parametrize("norm", NORMS)
def test_a_relu_net_has_the_distance_that_a_fine_grid_shows(norm):
    rng = np.random.default_rng(5)
    layers = [(rng.normal(size=shape), 0.5 * rng.normal(size=shape[0])) for shape in ((7, 2), (5, 7), (3, 5))]
    x, steps = np.array([0.4, 0.7]), np.linspace(0, 1, 81)
    label = int(forward(layers, x).argmax())
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    wrong = grid[[forward(layers, point).argmax() != label for point in grid]]
    distances = np.linalg.norm(wrong - x, NORMS[norm], axis=1)

    found = nearest(layers, x, label, norm, wrong[distances.argmax()])

    assert distances.min() - 0.025 <= found.bound <= found.distance <= distances.min() + 1e-6


def test_a_witness_that_is_classified_correctly_is_refused():
    layers = [(np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([1.5, 0.0]))]

    with pytest.raises(RuntimeError, match="must be misclassified"):
        nearest(layers, np.array([0.3, 0.9]), 0, "l2", np.array([0.3, 0.4]))
