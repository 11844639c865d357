"""The `rapid` suite against AutoAttack `standard`, on the same images, with the same threads, in one process.

    python scripts/benchmarks/bench_evaluate.py --model MODEL --data FILE.npz --limit N [--threat T] \
        [--precision auto fp32]

pyautoattack is called as its authors do, in float32 with one batch; `rapid` as `robustkit evaluate` does it, run
folder, checks and verification included. Printed for both: images left robust, propagations through the model for
each image, seconds; then the images that only one of them broke, the ratios, and where rapid's budget went. Needs
1 to 15 minutes for a net on 2 cores, nearly all of them AutoAttack's; see scripts/results/.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from bench_overhead import by_hand

from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.engine.evaluation.run import Evaluation
from robustkit.models import load_model


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--precision", default=["auto"], nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = load_model(arguments.model).requires_grad_(False)
    samples = load_data(arguments.data).head(arguments.limit)
    threat, n = ThreatModel.parse(arguments.threat), len(samples)
    name = arguments.model.rpartition("/")[2]
    print(
        f"{name}  {threat}  {n} images  torch {torch.__version__}  {torch.get_num_threads()} threads", flush=True
    )
    theirs, their_seconds, instrumented = by_hand(model, samples, threat, arguments.seed)
    their_units = (instrumented.forwards + instrumented.backwards) / n
    print(
        f"  autoattack       robust {len(theirs):>4}  {their_units:>8.1f} units/image  {their_seconds:>7.1f} s",
        flush=True,
    )
    for precision in arguments.precision:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            plan = Evaluation(model, samples, threat, "rapid", arguments.seed, precision=precision)
            report = plan.run(Path(folder) / "run")
        seconds = time.perf_counter() - begun
        ours = {verdict.index for verdict in report.verdicts if verdict.robust}
        units = (report.cost.forwards + report.cost.backwards) / n
        print(
            f"  rapid {precision:<10} robust {len(ours):>4}  {units:>8.1f} units/image  {seconds:>7.1f} s", end=""
        )
        print(f"   ratios: units {their_units / units:.1f}, time {their_seconds / seconds:.1f}")
        print(f"    broken by autoattack alone {sorted(ours - theirs)}, by rapid alone {sorted(theirs - ours)}")
        around = report.environment
        print(f"    searched in {around['precision']} {around['layout']}, {around['slots']} slots, ", end="")
        occupancy = "–" if around["occupancy"] is None else f"{around['occupancy']:.1%}"
        print(f"occupancy {occupancy}, {around['claims_refused']} claims refused", end="")
        print(f", {around['searched_again']} images searched again")
        for stage in report.stages:
            spent = (stage.forwards + stage.backwards) / n
            print(f"      {stage.attack:<8} fooled {stage.fooled:>4}  ", end="")
            print(f"{spent:>7.1f} units/image  {stage.seconds:>6.1f} s")
        flags = ", ".join(flag.code for flag in report.flags)
        print(f"    flags: {flags or 'none'}", flush=True)


if __name__ == "__main__":
    main()
