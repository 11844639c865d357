"""How far an evaluation scales: a simulation of ImageNet's validation images on 1 to 512 devices.

    python scripts/benchmarks/simulate_scale.py --measure FILE.npz --models MODEL MODEL
    python scripts/benchmarks/simulate_scale.py [--png FILE] [options]

What is simulated is the engine with its workers (`robustkit.engine.planning.simulation`, which `robustkit plan`
uses too).
With --measure it measures here what can be: the driver's time for images and verdicts of 3 x 224 x 224, and
what images of CIFAR-10 cost in propagations and successive passes on an undefended and an adversarially trained
net. That goes into results/simulate_scale.json, which the simulation reads; 5 minutes on one core. The
simulation takes 2 minutes and needs no GPU.

Where its figures come from:

- What images cost: the file. ASSUMED: that ImageNet's take as many passes as those of CIFAR-10.
- The driver's times: the file; decoding is of a synthetic JPEG of 500 x 375 by Pillow.
- ASSUMED, not measured here: the speed of a V100 and an A100 on ResNet-50, from NVIDIA's published tables
  (DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5, container 21.03): training at 367
  images/s on one V100 16 GB in FP32, at 938 on one A100 80 GB in TF32, at 2470 in mixed precision; a training
  image is taken for three propagations. A pass with one image takes 10.4 ms (V100, FP32, inference); with its
  backward pass it is taken for twice that, on all of them.
- ASSUMED: WRN-50-2 takes 11.4 / 4.09 times as long as ResNet-50, torchvision's GFLOPS of both, in the same
  passes.
- ASSUMED: a worker starts in 15 s, the 5 s of docs/scale.md and 10 for CUDA and the net.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from robustkit.engine.planning.forecast import HANDOUT, HANDOUT_BYTE, MESSAGE, SPAWN, VERDICT, VERDICT_BYTE
from robustkit.engine.planning.simulation import PARTS, Course, Job, Site, simulate

RESULTS = Path(__file__).parents[1] / "results" / "simulate_scale.json"
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Published training images a second, and so propagations a second at three for an image.
TRAINING = {"V100 FP32": 367, "A100 TF32": 938, "A100 AMP": 2470}
NETS = {"ResNet-50": 1.0, "WRN-50-2": 11.4 / 4.09}
ALONE = 2 * 0.0104
SHAPE = (3, 224, 224)
# Propagations of the checks, about what they are on any net (README); and what the engine takes around the model,
# measured on a CPU (scripts/results/profile_rapid.txt), ASSUMED on a GPU's host.
CHECKS, AROUND = 1000, 1.1


def main() -> None:
    """Measure, or simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", metavar="FILE.npz", help="CIFAR-10 images to measure with, instead")
    parser.add_argument("--models", nargs=2, metavar="MODEL", help="with --measure: an undefended, a trained net")
    parser.add_argument("--seconds", type=float, default=170.0, help="with --measure: on each net, at most")
    parser.add_argument("--limit", type=int, default=48, help="with --measure: images")
    parser.add_argument("--images", type=int, default=50_000, help="of the simulated data")
    parser.add_argument("--gpu", choices=TRAINING, default="A100 TF32")
    parser.add_argument("--slots", type=int, default=512, help="images on board of a device")
    parser.add_argument("--startup", type=float, default=SPAWN + 10, help="seconds of a worker")
    parser.add_argument("--readers", type=int, default=8, help="threads of the driver that decode")
    parser.add_argument("--png", type=Path, help="draw efficiency over devices")
    asked = parser.parse_args()
    if asked.measure:
        facts = measure(asked.measure, asked.models, asked.limit, asked.seconds)
        RESULTS.write_text(json.dumps(facts) + "\n")
        return
    facts = json.loads(RESULTS.read_text())
    print(f"python {' '.join(sys.argv)}")
    print(f"{asked.images:,} images of {'x'.join(map(str, SHAPE))}, {asked.gpu} (ASSUMED), {asked.slots} on board")
    driver = {name: f"{1000 * value:.2f} ms" for name, value in facts["driver"].items()}
    said = ", ".join(f"{name} {value}" for name, value in driver.items())
    print(f"the driver's times of an image, measured: {said}; {asked.readers} threads decode (ASSUMED)")
    curves = {}
    for pool, costs in facts["costs"].items():
        units = [forwards + backwards for forwards, backwards, _ in costs["images"]]
        print(
            f"\n{pool}: {len(units)} images of {costs['model']}, {np.mean(units):,.0f} propagations each, "
            f"at most {max(units):,}; {np.mean([passes for *_, passes in costs['images']]):,.0f} passes, at most "
            f"{max(passes for *_, passes in costs['images']):,}; {costs['robust']} withstand all"
        )
        for net in NETS:
            curves[f"{net}, {pool}"] = table(f"{net}, {pool}", asked, facts, pool, net, asked.readers)
    hard = list(facts["costs"])[-1]
    print("\nwhat would help, on ResNet-50, " + hard)
    table("images from an array in memory, nothing to decode", asked, facts, hard, "ResNet-50", 0)
    table("and reading and writing left to the workers", asked, facts, hard, "ResNet-50", None)
    if asked.png:
        draw(curves, asked.png)


def table(
    title: str, asked: argparse.Namespace, facts: dict[str, Any], pool: str, net: str, readers: int | None
) -> list[tuple[int, float]]:
    """Print how a run goes on each number of devices; return their efficiency."""
    pace = 3 * TRAINING[asked.gpu] / NETS[net]
    each = max(AROUND / pace - ALONE / (2 * asked.slots), 0.0)
    costs, known = facts["costs"][pool], facts["driver"]
    images = [Job((f + b) * each, passes) for f, b, passes in costs["images"]]
    order = np.random.default_rng(0).permutation(asked.images) % len(images)
    # What the net gets wrong as it is goes no further than the clean pass; what withstands leaves no adversarial.
    jobs = [images[at] for at in order if images[at].passes]
    fooled = 1 - costs["robust"] / sum(job.passes > 0 for job in images)
    decode = known["decode"] / readers if readers else 0.0
    reading = asked.images * (decode + known["handout"])
    site = Site(
        devices=1,
        slots=asked.slots,
        overhead=ALONE,
        startup=asked.startup,
        opening=CHECKS / pace,
        clean=asked.images * (known["hash"] + 1 / pace),
        reading=reading if readers is not None else 0.0,
        handout=decode + known["handout"] if readers is not None else 0.0,
        verdict=fooled * known["verdict"] if readers is not None else 0.0,
        message=known["message"],
    )
    print(f"\n{title}\ndevices       time   efficiency   " + "".join(f"{name:>8}" for name in PARTS))
    found: list[tuple[int, float]] = []
    first = half = None
    for count in DEVICES:
        course = simulate(jobs, replace(site, devices=count))
        first = first or course.seconds
        efficiency = first / (count * course.seconds)
        found.append((count, efficiency))
        print(f"{count:7}{clock(course.seconds):>11}{100 * efficiency:11.0f} %   ", end="")
        print("".join(f"{100 * course.shares[part]:7.1f}%" for part in PARTS))
        if efficiency < 0.5 and half is None:
            half = (count, course)
    print(verdict(half))
    return found


def verdict(half: tuple[int, Course] | None) -> str:
    """Return where a curve stops to scale, and why."""
    words = {
        "passes": "passes that are not full",
        "start": "start-up",
        "clean": "clean pass and checks",
        "driver": "the driver, which reads, hands out and writes down",
        "tail": "the slowest images",
    }
    if half is None:
        return f"more than half of the pace is left at {DEVICES[-1]} devices"
    count, course = half
    lost = sorted(words, key=lambda name: -course.shares[name])[:2]
    said = " and ".join(f"{words[name]} ({100 * course.shares[name]:.0f} %)" for name in lost)
    return f"less than half of the pace is left at {count} devices; most goes to {said}"


def clock(seconds: float) -> str:
    """Return `1h02m03`, or `12.3 s` below two minutes."""
    whole = round(seconds)
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m{whole % 60:02d}"


def draw(curves: dict[str, list[tuple[int, float]]], to: Path) -> None:
    """Draw efficiency over devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=False):
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEVICES, list(map(str, DEVICES)))
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("devices (simulated; their speed is assumed, see scripts/benchmarks/simulate_scale.py)")
    axes.set_ylabel("share of so many times one device's pace")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(to, dpi=120)


def measure(data: str, models: list[str] | None, limit: int, seconds: float) -> dict[str, Any]:
    """Return what can be measured here."""
    from robustkit import ThreatModel, load_data, load_model
    from robustkit.engine.planning.pilot import CostProbe

    facts: dict[str, Any] = {"driver": driver(), "costs": {}}
    print(facts["driver"])
    small = {name: value for name, value in driver((3, 32, 32)).items() if name != "decode"}
    print(f"of 3 x 32 x 32: {small}")
    print(f"robustkit plan has {MESSAGE=} {HANDOUT=} {HANDOUT_BYTE=} {VERDICT=} {VERDICT_BYTE=}")
    threat = ThreatModel.parse("linf:8/255")
    for pool, string in zip(("undefended", "adversarially trained"), models or [], strict=False):
        samples, net = load_data(data).head(limit), load_model(string)
        found = CostProbe(net, samples, threat, "rapid", precision="fp32", budget=seconds).look()
        columns = (found.forwards, found.backwards, found.passes)
        facts["costs"][pool] = {
            "model": string.rpartition("/")[2],
            "unfinished": int((~found.through).sum()),
            "robust": found.robust,
            "images": np.stack(columns, 1)[found.through].tolist(),
        }
        print(
            pool, {name: of for name, of in facts["costs"][pool].items() if name != "images"}, len(found.through)
        )
    return facts


def driver(shape: tuple[int, ...] = SHAPE, images: int = 32) -> dict[str, float]:
    """Return the driver's seconds, of its processor, for an image handed out or written down, and a message."""
    import torch

    from robustkit.engine.evaluation.results import RunResults
    from robustkit.engine.evaluation.tasks import Boarded, Done, Link, Parcel
    from robustkit.engine.evaluation.verdicts import image_hashes
    from robustkit.runs.ledger import Chunk, Ledger, Verdict

    x = torch.rand(images, *shape)
    begun = time.process_time()
    hashes = image_hashes(x)
    hashing = (time.process_time() - begun) / images
    rows = [Verdict(at, 0, 1, 0.5, True, hashes[at], x[at].numpy().tobytes()) for at in range(images)]
    here, there = multiprocessing.get_context("spawn").Pipe()
    peer = multiprocessing.get_context("spawn").Process(target=answer, args=(there, rows), daemon=True)
    peer.start()
    there.close()
    link, rounds = Link(here), 12
    link.receive()
    times: dict[str, list[float]] = {"handout": [], "verdict": [], "message": []}
    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.sqlite", "0") as ledger:
        results = RunResults.of(rounds * images, [{"name": "x"}])
        for number in range(rounds):
            begun = time.process_time()
            parcel = Parcel(np.arange(images), x.numpy(), hashes, np.zeros(images))
            link.send(Boarded(parcel, True))
            times["handout"].append((time.process_time() - begun) / images)
            begun = time.process_time()
            message = link.receive()
            if isinstance(message, Done):
                verdicts = [replace(row, position=number * images + at) for at, row in enumerate(rows)]
                chunk = Chunk(1, number, 0, 0, 0.0, verdicts)
                ledger.write(chunk)
                results.add(chunk)
            times["verdict"].append((time.process_time() - begun) / images)
            begun = time.process_time()
            link.send(None)
            link.receive()
            times["message"].append(time.process_time() - begun)
    link.close()
    peer.join()
    found = {name: float(np.median(of)) for name, of in times.items()}
    return {**found, "hash": hashing, "decode": decoding(images)}


def answer(connection: Connection, rows: list[Any]) -> None:
    """Be a worker that sends verdicts for images."""
    from robustkit.engine.evaluation.tasks import Boarded, Done, Gone, Link
    from robustkit.runs.ledger import Chunk

    link = Link(connection)
    link.send(None)
    try:
        while True:
            message = link.receive()
            link.send(Done([Chunk(1, 0, 0, 0, 0.0, rows)]) if isinstance(message, Boarded) else None)
    except Gone:
        return


def decoding(images: int) -> float:
    """Return the seconds of one thread to decode an image of 500 x 375 and to bring it to 224 x 224."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    begun = time.process_time()
    for _ in range(images):
        image = Image.open(io.BytesIO(content.getvalue()), formats=("JPEG",)).convert("RGB").resize((341, 256))
        np.asarray(image.crop((58, 16, 282, 240))).astype(np.float32).transpose(2, 0, 1).copy()
    return (time.process_time() - begun) / images


if __name__ == "__main__":
    main()
