"""Count kernel launches and host synchronisations of one step, with the lines that make them, on a simulated GPU.

    python scripts/tools/step_costs.py [NAME ...] [--lines 12] [--frames 1]

Names are those of ATTACKS (a continuous batch of eight images), CRAFT and TRAIN below; by default all. A figure is
the difference of two runs that take other numbers of steps, over the difference of their steps: what a run
costs once is not in it. The net is one linear layer, with a launch for its forward pass and one for its backward
pass; all else is the engine's own. A line is the innermost one of robustkit's code; with --frames 3 its two
callers are printed as well. The simulated GPU is that of tests/gpu: no GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/gpu"))

from simulated_gpu import GPU, SimulatedGpu, simulated_gpu

import robustkit
from robustkit.core import criteria
from robustkit.core.threat import ThreatModel
from robustkit.engine.batching.continuous_batch import ContinuousBatch
from robustkit.engine.batching.samples import Admitted
from robustkit.engine.evaluation.block_runner import GPU_STEPS_PER_READ
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.models import as_classifier
from robustkit.registry import parse_suite

# Attacks of one continuous batch, with {} for the number of steps. Samples enter "several at once" one by one, so
# that all four attacks have rows in every step, as in `rapid`.
ATTACKS = {
    "pgd": "pgd(steps={},loss=margin)",
    "race": "race(targets=2,probe=1,steps={},restarts=1,doubt=1e9)",
    "apgd": "apgd(steps={},loss=ce)",
    "apgd-t": "apgd-t(steps={},targets=1)",
    "fab-t": "fab-t(steps={},targets=1)",
    "square": "square(queries={})",
    "several at once": "pgd(steps={},loss=margin),pgd(steps={}),race(targets=1,steps={}),apgd(steps={})",
}
CRAFT = {"craft mi-fgsm": "mi-fgsm(steps={})", "craft cwa": "cwa(steps={})"}
TRAIN = {"train standard": "standard", "train dverge": "dverge"}
NAMES = [*ATTACKS, *CRAFT, *TRAIN]

IMAGES, SHAPE, CLASSES = 8, (3, 6, 8), 10
ARCH = "robustkit:digits-cnn"  # of training: its own launches are in the figures
THREAT = "linf:1e-6"  # no image is fooled, so that every step takes place
SHORT, LONG = 7, 15  # with the query that ends a run, multiples of the steps between two reads


@dataclass
class StepCosts:
    """Launches and synchronisations of one step.

    Attributes:
        launches: of kernels.
        syncs: waits of the host for the device.
        lines: both by kind (`launch` or `sync`) and line.
    """

    launches: float = 0
    syncs: float = 0
    lines: dict[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def between(cls, short: SimulatedGpu, long: SimulatedGpu, steps: int) -> StepCosts:
        """Return the costs of one of the steps that the long run took in addition."""
        lines = {key: (long.counts[key] - short.counts[key]) / steps for key in short.counts | long.counts}
        launches, syncs = ((long.total(kind) - short.total(kind)) / steps for kind in ("launch", "sync"))
        return cls(launches, syncs, lines)

    def text(self, kind: str, most: int | None = None) -> str:
        """Return the lines with most events of a kind (`launch` or `sync`), one a row."""
        lines = Counter({line: value for (found, line), value in self.lines.items() if found == kind and value})
        return "\n".join(f"{kind:<8}{value:>7.2f}  {line}" for line, value in lines.most_common(most))


def net() -> nn.Module:
    """Return the net, which has two kernels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), CLASSES))


def images(n: int) -> torch.Tensor:
    """Return random images."""
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))


def step_costs(name: str, frames: int = 1) -> StepCosts:
    """Return the costs of a step of one of NAMES, with that many lines of robustkit's for each event."""
    if name in ATTACKS:
        work: Callable[[int], int] = partial(run_batch, ATTACKS[name])
    elif name in CRAFT:
        work = partial(_craft, CRAFT[name])
    else:
        work = partial(_train, TRAIN[name])
    counts, steps = list[SimulatedGpu](), list[int]()
    for number in (SHORT, LONG):
        # What a run chooses by measured times is the same in both runs, by a clock that ticks when it is read.
        with simulated_gpu(frames=frames) as gpu, mock.patch("time.perf_counter", count(0, 1e-3).__next__):
            steps.append(work(number))
        counts.append(gpu)
    return StepCosts.between(counts[0], counts[1], steps[1] - steps[0])


def run_batch(suite: str, steps: int) -> int:
    """Run a continuous batch with attacks of ATTACKS on the GPU, and return its steps.

    One attack takes `steps` with all images at once. Of several, each takes SHORT steps; the longer run has more
    images, each of which enters when the one before has left the first attack.
    """
    several = suite.count("{}") > 1
    entries = parse_suite(suite.replace("{}", str(SHORT if several else steps)), "linf")
    n = len(entries) + steps // LONG if several else IMAGES
    x = images(n).to(GPU)
    model = InstrumentedModel(as_classifier(net()).to(GPU), GPU)
    measure(model, x[:1], IMAGES)
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(1)
    clean = criteria.margin(logits, labels)
    waiting = np.arange(n)

    def admit(free: int) -> Admitted:
        nonlocal waiting
        taken = int(batch.queues[0].batch is None) if several else free
        now, waiting = waiting[:taken], waiting[taken:]
        part = torch.from_numpy(now).to(GPU)
        values = clean[part]
        # The nearest point so far is close to the boundary, else fab-t would not attack the image.
        return Admitted(now, part, x[part], labels[part], values, values / 100, later=len(waiting) > 0)

    def recover() -> None:
        raise MemoryError

    batch = ContinuousBatch(
        model,
        ThreatModel.parse(THREAT),
        entries,
        [str(number) for number in range(len(entries))],
        0,
        IMAGES,
        admit,
        recover,
        steps_per_read=GPU_STEPS_PER_READ,
        deterministic=True,
    )
    first = type(entries[0].attack)
    with mock.patch.object(first, "step", autospec=True, side_effect=first.step) as step:
        for _ in batch.run():
            pass
    return step.call_count // sum(isinstance(entry.attack, first) for entry in entries)


def _craft(attack: str, steps: int) -> int:
    """Craft images with so many steps."""
    x, call = images(IMAGES), attack.format(steps)
    robustkit.craft([net()], x, torch.arange(IMAGES), "linf:0.1", attack=call, device="cuda")
    return steps


def _train(method: str, steps: int) -> int:
    """Train one epoch of so many batches."""
    x = images(steps * IMAGES)
    y = torch.arange(len(x)) % CLASSES
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"batch_size": IMAGES, "epochs": 1, "out": Path(folder) / "run"}
        robustkit.train(method, x, y, arch=ARCH, device="cuda", precision="fp32", **options)
    return steps


def main() -> None:
    """Print a table, and for each name the lines with most launches and all that synchronise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--lines", type=int, default=12, help="how many lines with launches to print")
    parser.add_argument("--frames", type=int, default=1, help="how many lines of the stack to print for each")
    given = parser.parse_args()
    print("python scripts/tools/step_costs.py", *sys.argv[1:])
    costs = {name: step_costs(name, given.frames) for name in given.names or NAMES}
    print(f"\n{'':<20}{'launches':>10}{'syncs':>8}   per step")
    for name, cost in costs.items():
        print(f"{name:<20}{cost.launches:>10.1f}{cost.syncs:>8.2f}")
    for name, cost in costs.items():
        print(f"\n{name}\n{cost.text('sync')}\n{cost.text('launch', given.lines)}")


if __name__ == "__main__":
    main()
