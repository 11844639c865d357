"""Smallest perturbations by our attacks and by three libraries', counted and scored by AttackBench.

    python -m venv ab && . ab/bin/activate
    pip install . attackbenchlib==2.0.2 foolbox==3.3.4 "setuptools<81" wheel
    pip install --no-build-isolation visdom
    pip install --no-deps adv-lib==0.2.8 torchattacks==3.5.1
    python scripts/benchmarks/run_attackbench.py NET DATA [--images 32] --trust-code

AttackBench (Cina et al., arXiv:2404.19460) counts every forward and every backward pass of every image and freezes
an attack after 2,000 of them; it measures distances itself, at each query. Local optimality is its score: the area
between an attack's curve of robust accuracy against eps and the start, as a share of that of the best distance
that any attack of the table found. Attacks of other libraries run with the settings that AttackBench publishes for
them, in every norm that they have. The libraries are installed without their own pins: torchattacks requires a
`requests` of 2020, and visdom, which adversarial-library needs for plots, has to be built with an old setuptools.

Expected: local optimality of `minimum_norm` at least 0.98 in linf, l2 and l1 and above every library's; see
scripts/results/attackbench.txt. Hardware: one core, 3 minutes for a small net and 32 images.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robustkit import load_data, load_model, minimum_norm

os.environ["TQDM_DISABLE"] = "1"
import attackbench
from attackbench.metrics.distances import eval_optimality

NORMS = ("linf", "l2", "l1")
# Images that are attacked at once; AttackBench compares every query with every image of the batch.
BATCH = 32
# Images of the data of which the first that the net gets right are attacked.
LOOKED_AT = 1000
# The excess over the best distance from which an image is listed.
BEHIND = 0.01
# Steps for as much of the budget as the attack can use.
OURS = {
    "linf": ("auto", "fmn(steps=990)", "fab(restarts=1)"),
    "l2": ("auto", "fmn(steps=990)", "ddn(steps=990)", "fab(restarts=1)"),
    "l1": ("auto", "fmn(steps=990)", "fab(restarts=1)"),
}
# LIBRARY:ATTACK as AttackBench names them: the best of each library in its published tables.
RIVALS = {
    "linf": ("adv_lib:apgd_minimal", "adv_lib:fmn", "adv_lib:pdpgd", "foolbox:bim_minimal", "torchattacks:fab"),
    "l2": ("adv_lib:alma", "adv_lib:apgd_minimal", "adv_lib:ddn_NQ", "foolbox:ddn", "torchattacks:fab"),
    "l1": ("adv_lib:alma", "adv_lib:apgd_minimal", "adv_lib:pdpgd", "foolbox:fmn", "torchattacks:fab"),
}
PREFIX = {"adv_lib": "adv_lib", "foolbox": "fb", "torchattacks": "ta"}


def rival(name: str, norm: str) -> Callable[..., Tensor]:
    """Return an attack of another library with AttackBench's settings, those of the norm where there are any."""
    library, _, attack = name.partition(":")
    configs, prefix = import_module(f"attackbench.attacks.{library}.configs"), PREFIX[library]
    common = f"{prefix}_{attack}"
    own = f"{common}_{norm}"
    settings = {**getattr(configs, own if hasattr(configs, own) else common)(), "threat_model": norm}
    if library == "adv_lib" and norm == "l1" and "use_large_reps" in settings:
        # As the settings' own comment says.
        settings["use_large_reps"] = True
    make = getattr(configs, f"get_{prefix}_{attack}")
    made = make(**{key: settings[key] for key in signature(make).parameters if key in settings})
    return partial(configs._wrapper, attack=made)


def own(attack: str, norm: str) -> Callable[..., Tensor]:
    """Return `minimum_norm` with this attack, as AttackBench calls it."""

    def run(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return minimum_norm(model, inputs, labels, norm, attack=attack).x

    return run


def measure(net: nn.Module, data: TensorDataset, attack: Callable[..., Tensor], norm: str) -> dict[str, Any]:
    """Return AttackBench's record of one attack on one net."""
    begun = time.process_time()
    # A copy of the net, since each run leaves its hooks there.
    loader = DataLoader(data, batch_size=BATCH)
    record = attackbench.run_attack(copy.deepcopy(net), loader, attack, norm, device=torch.device("cpu"))
    record["seconds"] = time.process_time() - begun
    return record


def remembered(folder: Path | None, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file of this folder holds for a key, else run and write it there."""
    if folder is None:
        return run()
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run()))
    return json.loads(file.read_text())


def table(records: dict[str, dict[str, Any]], norm: str) -> list[str]:
    """Return a line for each attack, the best first, and one on where `auto` is behind."""
    found = {name: torch.tensor(record["distances"][norm]) for name, record in records.items()}
    best, by = torch.stack(list(found.values())).min(0)
    score = {name: eval_optimality(far.numpy(), best.numpy(), clean_acc=1.0) for name, far in found.items()}
    lines = [f"{norm:30}{'optimality':>10}{'median':>9}{'found':>7}{'best':>6}{'passes':>8}{'seconds':>9}"]
    for name in sorted(score, key=lambda each: -score[each]):
        far, record = found[name], records[name]
        passes = torch.tensor(record["num_forwards"]) + torch.tensor(record["num_backwards"])
        lines.append(
            f"{name:30}{score[name]:10.4f}{far.median():9.4f}{far.isfinite().float().mean():7.0%}"
            f"{int((far <= 1.001 * best).sum()):6}{passes.float().mean():8.0f}{record['seconds']:9.1f}"
            f"{'  failed on a batch' if any(record['batch_failures']) else ''}"
        )
    excess, names = found["robustkit:auto"] / best - 1, list(found)
    behind = [int(image) for image in excess.argsort(descending=True) if excess[image] > BEHIND]
    missed = ", ".join(f"{image} +{excess[image]:.1%} {names[int(by[image])]}" for image in behind)
    return [*lines, f"auto is more than {BEHIND:.0%} behind the best on image: {missed or 'none'}", ""]


def main() -> None:
    """Run everything and print a table for each net and norm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("net", help="a model string")
    parser.add_argument("data", help="a data string")
    parser.add_argument("--images", type=int, default=32, help="how many of the first that the net gets right")
    parser.add_argument("--norms", default=",".join(NORMS))
    parser.add_argument("--keep", type=Path, help="a folder where the libraries' results are kept and found again")
    parser.add_argument("--trust-code", action="store_true", help="run the code that a net's folder names")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    packages = ("torch", "attackbenchlib", "adv-lib", "foolbox", "torchattacks")
    print("  ".join(f"{package} {version(package)}" for package in packages))
    net = load_model(arguments.net, trust_code=arguments.trust_code).eval().requires_grad_(False)
    samples = load_data(arguments.data)
    samples = samples.head(min(LOOKED_AT, len(samples)))
    images, labels = samples.images(range(len(samples))), torch.from_numpy(samples.labels)
    # Only those that the net gets right: the distance of the others is 0 for every attack.
    right = net(images).argmax(1) == labels
    data = TensorDataset(images[right][: arguments.images], labels[right][: arguments.images])
    print(f"{Path(arguments.net).name}  clean accuracy {right.float().mean():.1%}  ", end="")
    print(f"{len(data)} images  {torch.get_num_threads()} thread  2,000 passes an image\n", flush=True)
    for norm in arguments.norms.split(","):
        records = {}
        for attack in RIVALS[norm]:
            run = partial(measure, net, data, rival(attack, norm), norm)
            records[attack] = remembered(arguments.keep, f"{arguments.net} {len(data)} {norm} {attack}", run)
        for attack in OURS[norm]:
            records[f"robustkit:{attack}"] = measure(net, data, own(attack, norm), norm)
        print("\n".join(table(records, norm)), flush=True)


if __name__ == "__main__":
    main()
