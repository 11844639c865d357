"""How far our minimum-norm attacks are above the true smallest perturbations of small ReLU nets.

    python scripts/benchmarks/exact_distances.py [--images 16] [--norms linf,l2,l1] [--keep FOLDER]

Two nets for the built-in 8 x 8 digits, one of ordinary training and one adversarially trained, are trained here in
seconds. For each image an exact method finds the distance of the nearest misclassified image: a mixed-integer
program, solved by HiGHS, in which a binary variable says whether a ReLU is active (Tjeng et al.,
arXiv:1711.07356). linf and l1 are linear; in l2 the squares are bounded from below by tangents, and the program is
solved again with more tangents until bound and solution agree. Every solution is checked by running the net on it.
Printed for each attack: mean and largest excess over the truth.

Expected: mean excess of `minimum_norm` at most 1 % in every norm; see scripts/results/exact_distances.txt.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from torch import Tensor, nn

import robustkit

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
# Weights (out, in) and biases (out) of the linear layers, with a ReLU between each two.
Layers = Sequence[tuple[Array, Array]]
# Places of variables, and a matrix for them; the sum over all terms is what is bounded or minimised.
Terms = Sequence[tuple[Index, Array]]

# How far l2's lower bound may be below the solution, as a share.
GAP = 2e-3
# How often l2's tangents are added for one target at most.
ROUNDS = 200
# By how much a solution may miss the boundary, in logits: HiGHS keeps each constraint to within 1e-6.
SLACK = 1e-4
# By how much HiGHS's bounds of a ReLU's input are widened, for its tolerance.
WIDER = 1e-6
OPTIMAL, INFEASIBLE = 0, 2

NETS = {"plain": "standard", "adversarial": "pgd-at(threat=linf:0.1,steps=7)"}
ARCHITECTURE = f"{Path(__file__).parents[1] / 'reproductions' / 'zoo_nets.py'}:mlp?inputs=64&width=12&mean=0&std=1"
EPOCHS = 40
ATTACKS = {
    "linf": ("fmn", "fab(restarts=1)", "fab-t"),
    "l2": ("fmn", "ddn", "fab(restarts=1)", "fab-t"),
    "l1": ("fmn", "fab(restarts=1)", "fab-t"),
}


class Row(NamedTuple):
    """Constraints low <= sum of terms <= high, one for each row of the matrices."""

    terms: Terms
    low: Array | float
    high: Array | float


@dataclass
class Program:
    """A mixed-integer linear program, written block by block."""

    low: list[Array] = field(default_factory=list)
    high: list[Array] = field(default_factory=list)
    integer: list[Array] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, low: Array, high: Array, *, integer: bool = False) -> Index:
        """Add variables with these bounds; return their places."""
        begin = sum(map(len, self.low))
        self.low.append(low)
        self.high.append(high)
        self.integer.append(np.full(len(low), float(integer)))
        return np.arange(begin, begin + len(low))

    def minimise(self, cost: Terms, rows: Sequence[Row] = (), *, relaxed: bool = False) -> OptimizeResult:
        """Return HiGHS's result with these rows besides the program's own; `relaxed`: without integrality."""
        integer = np.concatenate(self.integer)
        every = [*self.rows, *rows]
        matrix = np.concatenate([_matrix(row.terms, len(integer)) for row in every])
        bounds = [
            np.concatenate([np.broadcast_to(row[side], len(row.terms[0][1])) for row in every]) for side in (1, 2)
        ]
        return milp(
            _matrix(cost, len(integer))[0],
            integrality=np.zeros_like(integer) if relaxed else integer,
            bounds=Bounds(np.concatenate(self.low), np.concatenate(self.high)),
            constraints=LinearConstraint(matrix, *bounds),
            options={"mip_rel_gap": 0.0},
        )


def _matrix(terms: Terms, size: int) -> Array:
    full = np.zeros((len(terms[0][1]), size))
    for places, matrix in terms:
        full[:, places] += matrix
    return full


class Nearest(NamedTuple):
    """A misclassified point (D), its distance, and a lower bound on the distance of every misclassified point."""

    point: Array
    distance: float
    bound: float


@dataclass
class Ball:
    """The points of the box [0, 1] up to a distance from an image, and the distance as an objective.

    Attributes:
        program: what they are written into.
        x: the image (D).
        norm: `linf`, `l2` or `l1`.
        reach: the largest distance.
        point: places of the point.
        cost: the terms of the distance as a share of the reach, in l2 of its square.
    """

    program: Program
    x: Array
    norm: str
    reach: float
    point: Index = field(init=False)
    cost: Terms = field(init=False)

    def __post_init__(self) -> None:
        """Write the variables and constraints."""
        x, reach = self.x, self.reach
        self.point = self.program.add((x - reach).clip(min=0), (x + reach).clip(max=1))
        count = 1 if self.norm == "linf" else len(x)
        sizes = self.program.add(np.zeros(count), np.ones(count))
        self.cost = [(sizes, np.ones((1, count)))]
        if self.norm == "l2":
            for share in (0.05, 0.15, 0.3, 0.5):
                self.refine(np.full(len(x), share * reach))
                self.refine(np.full(len(x), -share * reach))
            return
        each = reach * (np.ones((len(x), 1)) if self.norm == "linf" else np.eye(len(x)))
        self.program.rows += [
            Row([(self.point, np.eye(len(x))), (sizes, -each)], -np.inf, x),
            Row([(self.point, np.eye(len(x))), (sizes, each)], x, np.inf),
        ]

    def within(self, distance: float) -> float:
        """Return what the objective is at this distance: a share of the reach, in l2 its square."""
        share = distance / self.reach
        return share**2 if self.norm == "l2" else share

    def distance(self, objective: float) -> float:
        """Return the distance of this objective."""
        return self.reach * (max(objective, 0.0) ** 0.5 if self.norm == "l2" else objective)

    def refine(self, shift: Array) -> None:
        """Bound each square from below by its tangent at a shift (D)."""
        slope = 2 * shift / self.reach**2
        terms = [(self.cost[0][0], np.eye(len(shift))), (self.point, -np.diag(slope))]
        self.program.rows.append(Row(terms, -slope * (self.x + shift / 2), np.inf))

    def rise(self, weight: Array) -> Array:
        """Return by how much each linear function (out, D) changes at most in the ball."""
        order = {"linf": 1, "l2": 2, "l1": np.inf}[self.norm]
        return self.reach * np.linalg.norm(weight, order, axis=1)


def nearest(layers: Layers, x: Array, label: int, norm: str, witness: Array) -> Nearest:
    """Return the nearest point of the box [0, 1] that a ReLU net does not give this label.

    Args:
        layers: the net.
        x: the image (D), in [0, 1].
        label: its label.
        norm: `linf`, `l2` or `l1`.
        witness: any misclassified point (D); nothing farther is looked at, so the nearer it is the faster.

    Raises:
        RuntimeError: where HiGHS does not come to an end, or its solution is not misclassified.
    """
    best = checked(layers, x, label, norm, witness)
    program = Program()
    ball = Ball(program, x, norm, best.distance)
    if norm == "l2":
        ball.refine(witness - x)
    last = hidden(program, layers, ball)
    weight, bias = layers[-1]
    bound = best.distance
    for target in np.argsort(-forward(layers, x), kind="stable"):
        if target == label:
            continue
        wins = Row([(last, (weight[target] - weight[label])[None])], bias[label] - bias[target], np.inf)
        for _ in range(ROUNDS):
            nearer = Row(ball.cost, -np.inf, ball.within(best.distance))
            result = program.minimise(ball.cost, [wins, nearer])
            if result.status == INFEASIBLE:
                break
            if result.status != OPTIMAL:
                raise RuntimeError(f"HiGHS: {result.message}")
            point, below = result.x[ball.point].clip(0, 1), ball.distance(result.fun)
            best = min(best, checked(layers, x, label, norm, point), key=lambda each: each.distance)
            if below >= (1 - GAP) * best.distance:
                bound = min(bound, below)
                break
            ball.refine(point - x)
        else:
            raise RuntimeError(
                f"bound {below:.6g} and solution {best.distance:.6g} must agree in {ROUNDS} rounds."
            )
    return best._replace(bound=min(bound, best.distance))


def checked(layers: Layers, x: Array, label: int, norm: str, point: Array) -> Nearest:
    """Return a point with its distance, or fail where the net does give it this label."""
    logits = forward(layers, point)
    short = logits[label] - np.delete(logits, label).max()
    if short > SLACK:
        raise RuntimeError(f"the point must be misclassified, got a label's logit {short:.2g} above the others.")
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    return Nearest(point, float(np.linalg.norm(point - x, order)), 0.0)


def forward(layers: Layers, x: Array) -> Array:
    """Return the logits of an image (D)."""
    for weight, bias in layers[:-1]:
        x = (weight @ x + bias).clip(min=0)
    weight, bias = layers[-1]
    return weight @ x + bias


def hidden(program: Program, layers: Layers, ball: Ball) -> Index:
    """Write all layers but the last; return the places of the last's inputs."""
    before = ball.point
    for number, (weight, bias) in enumerate(layers[:-1]):
        low, high = preactivations(program, before, weight, bias)
        if number == 0:
            middle, rise = weight @ ball.x + bias, ball.rise(weight)
            low, high = np.maximum(low, middle - rise), np.minimum(high, middle + rise)
        else:
            low, high = tightened(program, before, weight, bias, low, high)
        before = relu(program, before, weight, bias, low, high)
    return before


def preactivations(program: Program, before: Index, weight: Array, bias: Array) -> tuple[Array, Array]:
    """Return the bounds of weight @ inputs + bias by interval arithmetic."""
    low, high = np.concatenate(program.low)[before], np.concatenate(program.high)[before]
    up, down = weight.clip(min=0), weight.clip(max=0)
    return up @ low + down @ high + bias, up @ high + down @ low + bias


def tightened(
    program: Program, before: Index, weight: Array, bias: Array, low: Array, high: Array
) -> tuple[Array, Array]:
    """Return the bounds that linear programs give where the sign is open."""
    low, high = low.copy(), high.copy()
    for unit in np.flatnonzero((low < 0) & (high > 0)):
        for side, sign in ((low, 1.0), (high, -1.0)):
            result = program.minimise([(before, sign * weight[unit][None])], relaxed=True)
            if result.status != OPTIMAL:
                raise RuntimeError(f"HiGHS: {result.message}")
            side[unit] = sign * (result.fun - WIDER) + bias[unit]
    return low, high


def relu(program: Program, before: Index, weight: Array, bias: Array, low: Array, high: Array) -> Index:
    """Write max(0, weight @ inputs + bias), whose argument is in these bounds; return the outputs' places."""
    after = program.add(low.clip(min=0), high.clip(min=0))
    on, unsure = low >= 0, (low < 0) & (high > 0)
    active = program.add(np.zeros(unsure.sum()), np.ones(unsure.sum()), integer=True)
    below, above, offset, eye = low[unsure], high[unsure], bias[unsure], np.eye(unsure.sum())
    change = [(after[unsure], eye), (before, -weight[unsure])]
    program.rows += [
        Row([(after[on], np.eye(on.sum())), (before, -weight[on])], bias[on], bias[on]),
        Row(change, offset, np.inf),
        Row([*change, (active, -np.diag(below))], -np.inf, offset - below),
        Row([(after[unsure], eye), (active, -np.diag(above))], -np.inf, 0.0),
    ]
    return after


def trained(method: str, folder: Path) -> tuple[nn.Module, Layers]:
    """Return a net and its layers; train it where the folder does not hold it."""
    if not (folder / "model.json").exists():
        robustkit.train(method, robustkit.load_data("digits:train"), arch=ARCHITECTURE, epochs=EPOCHS, out=folder)
    net = robustkit.load_model(str(folder), trust_code=True).eval()
    parts = [part for part in net.modules() if isinstance(part, nn.Linear)]
    return net, [(part.weight.detach().double().numpy(), part.bias.detach().double().numpy()) for part in parts]


def truths(file: Path, layers: Layers, images: Tensor, labels: Tensor, norm: str, witnesses: Tensor) -> Array:
    """Return the exact distances and their lower bounds (2 B); solve where the file does not hold them."""
    if not file.exists():
        x, points = (each.double().flatten(1).numpy() for each in (images, witnesses))
        solved = [nearest(layers, *each) for each in zip(x, labels.tolist(), [norm] * len(x), points, strict=True)]
        np.save(file, [[each.distance for each in solved], [each.bound for each in solved]])
    found: Array = np.load(file)
    return found


def compare(folder: Path, count: int, norms: Sequence[str]) -> None:
    """Train, attack, solve, and print a table for each net and norm."""
    samples = robustkit.load_data("digits:test")
    x, y = samples.images(range(len(samples))), torch.from_numpy(samples.labels)
    for name, method in NETS.items():
        net, layers = trained(method, folder / name)
        with torch.no_grad():
            right = net(x).argmax(1) == y
        images, labels = x[right][:count], y[right][:count]
        for norm in norms:
            begun = time.process_time()
            runs = {
                attack: robustkit.minimum_norm(net, images, labels, norm, attack=attack)
                for attack in ("auto", *ATTACKS[norm])
            }
            middle = time.process_time()
            by = torch.stack([run.distance for run in runs.values()]).argmin(0)
            witnesses = torch.stack([run.x for run in runs.values()])[by, torch.arange(len(images))]
            file = folder / f"{name}-{norm}-{count}.npy"
            exact, bound = torch.from_numpy(truths(file, layers, images, labels, norm, witnesses))
            print(
                f"{name} net  {norm}  clean accuracy {right.float().mean():.1%}  {len(images)} images  "
                f"median distance {exact.median():.4f}  truth known to {(1 - bound / exact).max():.1e}  "
                f"attacks {middle - begun:.0f} s  solver {time.process_time() - middle:.0f} s"
            )
            print(
                f"{'attack':16}{'mean excess':>12}{'largest':>10}{'within 1 %':>12}{'passes':>8}   5 worst images"
            )
            for attack, run in runs.items():
                excess = run.distance / exact - 1
                worst = ", ".join(f"{image} +{excess[image]:.1%}" for image in excess.argsort(descending=True)[:5])
                print(
                    f"{attack:16}{excess.mean():12.3%}{excess.max():10.2%}{(excess <= 0.01).float().mean():12.0%}"
                    f"{run.passes:8.0f}   {worst}"
                )
            print(flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--norms", default="linf,l2,l1")
    parser.add_argument(
        "--keep", type=Path, help="a folder where nets and exact distances are kept and found again"
    )
    arguments = parser.parse_args()
    print("  ".join(f"{package} {version(package)}" for package in ("torch", "scipy")), end="\n\n")
    with tempfile.TemporaryDirectory() as passing:
        folder = arguments.keep or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        compare(folder, arguments.images, arguments.norms.split(","))


if __name__ == "__main__":
    main()
