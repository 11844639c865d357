"""Compare `auto` with AutoAttack `standard` on every net of the strictness zoo: verdicts, cost, and the bound.

    python scripts/benchmarks/strictness.py --zoo zoo --mnist mnist.npz --cifar cifar10_test.npz --images 500 \
        [--half open|held-out] [--only REGEX] [--runs DIR] [--cost 1000]

The zoo is made by scripts/reproductions/train_zoo.py. AutoAttack is the authors' package (pyautoattack) as it
is. Both get the same first test images. Each evaluation is a run folder in DIR, so the same command goes on
where it was stopped, and a second one prints the table of what is there. A row says: robust accuracy by each,
images that only one of them broke, passes (forward and backward) an image of each and their ratio, and the
bound that `auto` printed: how many images AutoAttack would still break at the most. With `--cost N` it runs `auto`
alone on N images as well, whose passes an image are compared with AutoAttack's on the fewer ones: what AutoAttack
takes of an image does not depend on how many there are, what `auto` takes does.

Hardware: CPU; about five minutes a net for 100 images on one core.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "reproductions"))

from train_zoo import MNIST_TEST, ZOO, Entry, held_out

from robustkit import evaluate, load_data, load_model
from robustkit.data.samples import Samples
from robustkit.runs.evaluation_record import Report


@dataclass(frozen=True)
class Row:
    """Both verdicts on one net."""

    entry: Entry
    theirs: Report
    ours: Report

    @property
    def missed(self) -> int:
        """Images that only AutoAttack broke."""
        return len(_broken(self.theirs) - _broken(self.ours))

    @property
    def gained(self) -> int:
        """Images that only `auto` broke."""
        return len(_broken(self.ours) - _broken(self.theirs))

    @property
    def ratio(self) -> float:
        """How many times fewer passes `auto` took."""
        return _passes(self.theirs) / _passes(self.ours)

    def text(self) -> str:
        """Return a line of the table."""
        bound = self.ours.strictness.images if self.ours.strictness else 0
        flags = ",".join(sorted(flag.code for flag in self.ours.flags if flag.warns))
        return (
            f"{self.entry.name:20} {self.entry.threat:11} {self.ours.n:4} {self.ours.clean_accuracy.value:7.1%} "
            f"{self.theirs.robust_accuracy.value:7.1%} {self.ours.robust_accuracy.value:7.1%} {self.missed:5} "
            f"{self.gained:5} {_passes(self.theirs):8,.0f} {_passes(self.ours):8,.0f} {self.ratio:6.1f} "
            f"{bound:6} {'yes' if self.missed <= bound else 'NO':4} {flags}"
        )


HEAD = (
    f"{'net':20} {'threat':11} {'n':>4} {'clean':>7} {'AutoAtt':>7} {'auto':>7} {'only':>5} {'only':>5} "
    f"{'passes':>8} {'passes':>8} {'':6} {'bound':>6} {'true':4} flags\n"
    f"{'':20} {'':11} {'':4} {'':7} {'':7} {'':7} {'AA':>5} {'auto':>5} {'AutoAtt':>8} {'auto':>8} {'ratio':>6}"
)


def _broken(report: Report) -> set[int]:
    return {verdict.index for verdict in report.verdicts if not verdict.robust}


def _passes(report: Report) -> float:
    return (report.cost.forwards + report.cost.backwards) / report.n


def _images(entry: Entry, arguments: argparse.Namespace) -> Samples | None:
    """Return the test images of a net, None if their file is not given."""
    if entry.data == "digits":
        return load_data("digits:test").head(arguments.images)
    file = {"mnist": arguments.mnist, "cifar": arguments.cifar}[entry.data]
    return load_data(str(file)).head(min(arguments.images, MNIST_TEST)) if file else None


def cost(entry: Entry, arguments: argparse.Namespace, theirs: Report) -> str:
    """Return a line about `auto` on `--cost` images, beside AutoAttack's passes on fewer of them."""
    many = argparse.Namespace(**{**vars(arguments), "images": arguments.cost})
    images = _images(entry, many)
    model = load_model(f"{arguments.zoo / entry.name}/", trust_code=True)
    ours = evaluate(model, images, threat=entry.threat, suite="auto", out=_place(many, entry, "auto"))
    return (
        f"{entry.name:20} {entry.threat:11} {ours.n:5} {ours.robust_accuracy.value:7.1%} {_passes(theirs):8,.0f} "
        f"{_passes(ours):8,.0f} {_passes(theirs) / _passes(ours):6.1f}"
    )


def compare(entry: Entry, arguments: argparse.Namespace) -> Row | None:
    """Return both evaluations of a net, run or read; None where net or images are absent."""
    folder, images = arguments.zoo / entry.name, _images(entry, arguments)
    if images is None or not (folder / "model.json").exists():
        return None
    model = load_model(f"{folder}/", trust_code=True)
    found = [
        evaluate(model, images, threat=entry.threat, suite=suite, out=_place(arguments, entry, suite))
        for suite in ("autoattack", "auto")
    ]
    return Row(entry, *found)


def _place(arguments: argparse.Namespace, entry: Entry, suite: str) -> Path:
    return arguments.runs / f"{entry.name}-{suite}-{arguments.images}"


def summary(rows: list[Row]) -> str:
    """Return what the rows say together."""
    images, missed = sum(row.ours.n for row in rows), sum(row.missed for row in rows)
    weaker = [row.entry.name for row in rows if row.ours.robust_accuracy.value > row.theirs.robust_accuracy.value]
    true = sum(row.missed <= (row.ours.strictness.images if row.ours.strictness else 0) for row in rows)
    return (
        f"{len(rows)} nets, {images:,} images: only AutoAttack broke {missed} ({missed / images:.2%}), only auto "
        f"{sum(row.gained for row in rows)}; auto above AutoAttack on {len(weaker)} nets "
        f"({', '.join(weaker) or 'none'}); the bound was true on {true} of {len(rows)}"
    )


def main() -> None:
    """Print a table for each half of the zoo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--half", choices=["open", "held-out"])
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--runs", type=Path, default=Path("runs/strictness"))
    parser.add_argument("--cost", type=int, help="images on which auto alone is run as well")
    arguments = parser.parse_args()
    apart = held_out()
    for half in ["open", "held-out"] if arguments.half is None else [arguments.half]:
        print(f"\nthe {half} half\n{HEAD}")
        rows = []
        for entry in ZOO:
            if (entry.name in apart) != (half == "held-out") or not re.search(arguments.only, entry.name):
                continue
            if row := compare(entry, arguments):
                rows.append(row)
                print(row.text(), flush=True)
        if rows:
            print(summary(rows))
        if arguments.cost:
            print(f"\n{'net':20} {'threat':11} {'n':>5} {'auto':>7} {'AutoAtt':>8} {'auto':>8} {'ratio':>6}")
            for row in rows:
                print(cost(row.entry, arguments, row.theirs), flush=True)


if __name__ == "__main__":
    main()
