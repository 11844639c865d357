"""Bayesian surrogates against independently trained nets, in the shape of the paper's tables (arXiv:2011.05074).

    python scripts/reproductions/reproduce_bayesian.py --scale digits   about 10 minutes on one core
    python scripts/reproductions/reproduce_bayesian.py --scale cifar-small --data DIR       hours on two cores
    python scripts/reproductions/reproduce_bayesian.py --scale cifar --data DIR   as published: a GPU, days

DIR holds cifar10_train.npz and cifar10_test.npz (`x` uint8 NHWC, `y`). It trains nets of one architecture, one
cSGLD posterior with the training compute of one of them, and targets: another net of the architecture and one
each of others, unless --target names some. Then it attacks the first test images and prints, on each target, the
share of those that it classifies correctly which are fooled, with 95 % Wilson intervals; T-DEE, the number of
independent nets that an ensemble needs for the same success, with a paired bootstrap interval; and the training
compute. Attacks are the paper's: I-FGSM of 50 steps of a tenth of eps, MI-FGSM with momentum 0.9, PGD, FGSM;
`light` uses one sample for each step, `full` all, logits averaged. What is trained or crafted already in --out
is taken from there, so that a run that was cut off continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deep_ensemble_equivalent import deep_ensemble_equivalent

from robustkit import craft, load_data, load_model, train
from robustkit.data.samples import Samples
from robustkit.models import Classifier
from robustkit.models.ensembles.mixture import Members
from robustkit.runs.craft_record import Craft, Judgement
from robustkit.runs.training_record import Trained
from robustkit.training.nets import net_of

TABLES = ("main", "attacks", "iterations", "cycles", "techniques", "weakness", "temperature")
RULE = "i-fgsm(steps={steps},step_size={size:g}eps)"


@dataclass(frozen=True)
class Scale:
    """What is trained and attacked.

    Attributes:
        train: data string of the training set, with {data} for the folder.
        test: data string of the images to attack.
        limit: number of training images; None for all.
        images: how many test images are attacked.
        judged: number of test images that the accuracy of a trained model is measured on.
        arch: model string of the nets and of the posterior's net.
        others: architectures of the other targets.
        nets: how many independent nets are surrogates.
        cycles: number of cycles of cSGLD's learning rate.
        epochs: epochs of one cycle; a net is trained for as many as all cycles have.
        lr: cSGLD's learning rate at the start of a cycle.
        threats: threats of all tables, l2 first.
        temperatures: temperatures of the temperature table.
        samples: posterior samples of one cycle.
        temperature: temperature of the posterior in all other tables.
        steps: steps of the iterative attacks.
    """

    train: str
    test: str
    limit: int | None
    images: int
    arch: str
    others: Sequence[str]
    nets: int
    cycles: int
    epochs: int
    lr: float
    threats: Sequence[str]
    temperatures: Sequence[float]
    samples: int = 3
    temperature: float = 0.08
    steps: int = 50
    judged: int = 2000


FILES = ("{data}/cifar10_train.npz", "{data}/cifar10_test.npz")
HELD_OUT = ("robustkit:cifar-vgg", "robustkit:cifar-mobilenet")
SCALES = {
    "digits": Scale(
        train="digits:train",
        test="digits:test",
        limit=None,
        images=200,
        arch="robustkit:digits-cnn",
        others=("robustkit:cifar-resnet20?in_channels=1",),
        nets=5,
        cycles=5,
        epochs=16,
        lr=0.5,
        threats=("l2:0.7", "linf:0.1"),
        temperatures=(0.0, 0.001, 0.01, 0.08, 0.5),
    ),
    "cifar-small": Scale(
        *FILES,
        limit=20_000,
        images=400,
        arch="robustkit:cifar-resnet20",
        others=HELD_OUT,
        nets=5,
        cycles=5,
        epochs=6,
        lr=0.5,
        threats=("l2:0.5", "linf:4/255"),
        temperatures=(),
    ),
    "cifar": Scale(
        *FILES,
        limit=None,
        images=10_000,
        arch="robustkit:cifar-preresnet110",
        others=HELD_OUT,
        nets=15,
        cycles=5,
        epochs=50,
        lr=0.5,
        threats=("l2:0.5", "linf:4/255"),
        temperatures=(),
    ),
}

Surrogate = str | Classifier


class Study:
    """Trained nets and crafted images, each made once and then taken from its folder."""

    def __init__(self, scale: Scale, data: Path, out: Path, device: str, given: Sequence[str] = ()) -> None:
        self.scale, self.out, self.device, self.given = scale, out, device, given
        self.train, self.test = (text.format(data=data) for text in (scale.train, scale.test))

    @cached_property
    def samples(self) -> Samples:
        """The images to attack."""
        return load_data(self.test).head(self.scale.images)

    def net(self, name: str, method: str, seed: int, **words: Any) -> Trained:
        """Train a net, or return the one that was trained before."""
        say(f"training {name}: {method}")
        scale, held_out = self.scale, load_data(self.test)
        words = {"arch": scale.arch, "epochs": scale.cycles * scale.epochs, **words}
        return train(
            method,
            self.train,
            test=held_out.head(min(scale.judged, len(held_out))),
            limit=scale.limit,
            seed=seed,
            device=self.device,
            out=self.out / name,
            **words,
        )

    @cached_property
    def nets(self) -> list[Trained]:
        """Independent nets, with their own initial weights and batches."""
        return [self.net(f"net-{seed}", "standard", seed) for seed in range(self.scale.nets)]

    def posterior(self, temperature: float, name: str = "csgld") -> Trained:
        """A posterior of the compute of one net."""
        scale = self.scale
        method = (
            f"csgld(cycles={scale.cycles},samples_per_cycle={scale.samples},noise_epochs={scale.samples},"
            f"temperature={temperature:g})"
        )
        return self.net(name, method, 100, lr=scale.lr, batch_size=64)

    @cached_property
    def trained_targets(self) -> dict[str, Trained]:
        """The nets that are trained to be targets, by the names of their folders after `target-`."""
        if self.given:
            return {}
        named = {"same": self.net("target-same", "standard", 1000)}
        for arch in self.scale.others:
            name = arch.partition(":")[2].partition("?")[0]
            named[name] = self.net(f"target-{name}", "standard", 1001, arch=arch)
        return named

    @property
    def targets(self) -> dict[str, str]:
        """Model strings of the targets, by what to call them."""
        if self.given:
            return {Path(string).stem: string for string in self.given}
        words = {"same": "the same architecture"}
        return {words.get(name, name): f"{self.out}/target-{name}/" for name in self.trained_targets}

    def ensemble(self, count: int) -> Surrogate:
        """The first nets as one surrogate, of which `light` attacks use one at a time."""
        strings = [f"{self.out}/net-{number}/" for number in range(count)]
        models = [load_model(string) for string in strings]
        first = models[0]
        if count == 1:
            return strings[0]
        mean, std = (
            None if values is None else tuple(values.flatten().tolist()) for values in (first.mean, first.std)
        )
        return Classifier(
            Members([net_of(model) for model in models]),
            string=" ".join(strings),
            identity={"members": [model.fingerprint for model in models]},
            mean=mean,
            std=std,
            num_classes=first.num_classes,
        ).eval()

    def posterior_samples(self, numbers: Iterable[int] | None = None, name: str = "csgld") -> Surrogate:
        """The posterior, or some of its samples."""
        chosen = "" if numbers is None else "#" + "+".join(map(str, numbers))
        return f"{self.out}/{name}/{chosen}"

    def attack(self, name: str, surrogates: Surrogate | Sequence[Surrogate], attack: str, threat: str) -> Craft:
        """Craft on surrogates of this name and evaluate on all targets."""
        say(f"{attack} on {name}, {threat}")
        words = f"{len(self.samples)} {name} {attack} {threat}"
        folder = "".join(sign if sign.isalnum() or sign in ".-=" else "_" for sign in words)
        given = [surrogates] if isinstance(surrogates, (str, Classifier)) else list(surrogates)
        return craft(
            given,
            self.samples,
            None,
            threat,
            attack=attack,
            combine="logits",
            targets=list(self.targets.values()),
            device=self.device,
            out=self.out / "craft" / folder,
        )


# --- tables


def main_table(study: Study) -> None:
    """Success of 1 to N nets and of 1 to S samples, light and full, with T-DEE."""
    scale = study.scale
    count = scale.cycles * scale.samples
    sample_counts = sorted({1, *range(scale.samples, count + 1, scale.samples)})
    cost = [sum(one.cost["flops"] for one in study.nets[:n]) for n in range(1, scale.nets + 1)]
    rows: list[tuple[str, float, dict[str, Craft | None]]] = []
    posterior = study.posterior(scale.temperature)
    for n in range(1, scale.nets + 1):
        rows.append(
            (
                f"{n} net{'s' * (n > 1)}",
                cost[n - 1],
                _light_and_full(study, f"{n}-nets", study.ensemble(n), n, True),
            )
        )
    for n in sample_counts:
        # The share of the training that the last of these samples came after.
        spent = posterior.cost["flops"] * posterior.samples[n - 1]["epoch"] / (scale.cycles * scale.epochs)
        found = _light_and_full(study, f"csgld-{n}", study.posterior_samples(range(n)), n, n == count)
        rows.append((f"cSGLD, {n} sample{'s' * (n > 1)}", spent, found))
    columns = [f"{form} {threat}" for threat in scale.threats for form in ("light", "full")]
    for place, target in enumerate(study.targets):
        title(f"success on {target}: {scale.arch.partition(':')[2]}, I-FGSM, {scale.steps} steps")
        table = []
        for name, flops, crafted in rows:
            cells = ["–" if (one := crafted[column]) is None else _cell(one.targets[place]) for column in columns]
            table.append([name, f"{flops:.1e}", *cells])
        show(["surrogate", "training FLOP", *columns], table)
        title(f"T-DEE on {target}: independent nets with the success of cSGLD's {count} samples")
        final = rows[-1][2]
        cells = []
        for column in columns:
            # A single net is used in the same way in both forms.
            nets = {
                n: _fooled(rows[n - 1][2][column] or rows[n - 1][2][column.replace("full", "light")], place)
                for n in range(1, scale.nets + 1)
            }
            posterior_fooled = _fooled(final[column], place)
            right = any(hit is not None for hit in posterior_fooled)
            cells.append(str(deep_ensemble_equivalent(nets, posterior_fooled)) if right else "–")
        show(["", *columns], [["cSGLD", *cells]])


def _light_and_full(
    study: Study, name: str, surrogate: Surrogate, count: int, full: bool
) -> dict[str, Craft | None]:
    found: dict[str, Craft | None] = {}
    for threat in study.scale.threats:
        attack = RULE.format(steps=study.scale.steps, size=0.1)
        found[f"light {threat}"] = study.attack(name, surrogate, attack, threat)
        one = study.attack(name, surrogate, f"{attack}+full", threat) if full and count > 1 else None
        found[f"full {threat}"] = one
    return found


def attacks_table(study: Study) -> None:
    """Four attacks on one net, on all nets and on the posterior."""
    steps = study.scale.steps
    rules = {
        "FGSM, full": "fgsm+full",
        "I-FGSM, light": RULE.format(steps=steps, size=0.1),
        "MI-FGSM, light": f"mi-fgsm(steps={steps},step_size=0.1eps,momentum=0.9)",
        "PGD, light": f"pgd(steps={steps},step_size=0.1eps)",
    }
    compared(study, "attacks", rules)


def techniques_table(study: Study) -> None:
    """Test-time techniques on top of light I-FGSM."""
    rule = RULE.format(steps=study.scale.steps, size=0.1)
    names = ["di", "ti"]
    if "resnet" in study.scale.arch:
        names += ["ghost", "sgm"]
    compared(study, "techniques", {"none": rule, **{name: f"{rule}+{name}" for name in names}})


def iterations_table(study: Study) -> None:
    """Success against the number of steps, of eps / 10 or as long as they must be to reach eps."""
    counts = (1, 5, 10, 20, 50, 100, 200)
    rules = {f"{steps} steps": RULE.format(steps=steps, size=max(0.1, 1 / steps)) for steps in counts}
    compared(study, "iterations", rules)


def compared(study: Study, what: str, rules: dict[str, str]) -> None:
    """Print attacks on one net, all nets and the posterior, on each target."""
    scale = study.scale
    study.posterior(scale.temperature)
    surrogates = {
        "1 net": ("1-nets", study.ensemble(1)),
        f"{scale.nets} nets": (f"{scale.nets}-nets", study.ensemble(scale.nets)),
        "cSGLD": (
            f"csgld-{scale.cycles * scale.samples}",
            study.posterior_samples(range(scale.cycles * scale.samples)),
        ),
    }
    grid(
        study,
        what,
        {
            f"{label}   {threat}": [
                study.attack(name, surrogate, attack, threat) for name, surrogate in surrogates.values()
            ]
            for threat in scale.threats
            for label, attack in rules.items()
        },
        list(surrogates),
    )


def cycles_table(study: Study) -> None:
    """Success of light I-FGSM against the number of cycles, and of samples from each."""
    scale = study.scale
    study.posterior(scale.temperature)
    rule, each = RULE.format(steps=scale.steps, size=0.1), scale.samples
    choices: dict[str, Sequence[int]] = {
        f"{cycles} cycles, {each} samples each": range(cycles * each) for cycles in range(1, scale.cycles + 1)
    }
    for kept in range(1, each):
        last = [cycle * each + place for cycle in range(scale.cycles) for place in range(each - kept, each)]
        choices[f"{scale.cycles} cycles, {kept} samples each"] = last
    rows = {}
    for label, numbers in choices.items():
        name = f"csgld-{'-'.join(map(str, numbers))}"
        rows[label] = [
            study.attack(name, study.posterior_samples(numbers), rule, threat) for threat in scale.threats
        ]
    grid(study, "cycles and samples", rows, list(scale.threats))


def temperature_table(study: Study) -> None:
    """Success of light I-FGSM on posteriors of other temperatures, with the accuracy of their samples."""
    scale = study.scale
    rule = RULE.format(steps=scale.steps, size=0.1)
    rows = {}
    for temperature in scale.temperatures:
        name = f"csgld-t{temperature:g}"
        record = study.posterior(temperature, name)
        each = [100 * sample["accuracy"] for sample in record.samples if sample["accuracy"] is not None]
        heading = f"temperature {temperature:g}   a sample {sum(each) / len(each):.1f} % accurate"
        rows[heading] = [
            study.attack(name, study.posterior_samples(name=name), rule, threat) for threat in scale.threats
        ]
    grid(study, "temperatures", rows, list(scale.threats))


def weakness_table(study: Study, others: Sequence[str]) -> None:
    """CWA on nets against CWA whose members are fresh posterior samples, at the same gradients per image."""
    scale = study.scale
    study.posterior(scale.temperature)
    members, steps = min(3, scale.nets), 10
    nets = [f"{study.out}/net-{number}/" for number in range(members)]
    one = study.posterior_samples(range(scale.cycles * scale.samples))
    light = f"light(samples={members})"
    turned = round(steps * 2 / 3)
    runs: dict[str, tuple[Sequence[Surrogate], str]] = {
        f"CWA on {members} nets": (nets, f"cwa(steps={steps})"),
        f"CWA on {members} nets, antithetic": (nets, f"cwa(steps={turned},order=antithetic)"),
        "light-CWA": ([one], f"cwa(steps={steps})+{light}"),
        "light-CWA, antithetic": ([one], f"cwa(steps={turned},order=antithetic)+{light}"),
        "light-CWA, antithetic, fresh in each step": (
            [one],
            f"cwa(steps={turned},order=antithetic)+light(samples={members},fresh=step)",
        ),
        f"MI-FGSM on {members} nets": (nets, f"mi-fgsm(steps={2 * steps})"),
        "MI-FGSM, light": ([one], f"mi-fgsm(steps={2 * steps})+{light}"),
    }
    rows = {}
    for label, (surrogates, attack) in runs.items():
        name = " ".join(["weakness", label.partition(",")[0], *(Path(other).stem for other in others)])
        found = [study.attack(name, [*surrogates, *others], attack, threat) for threat in scale.threats]
        rows[f"{label}   {found[0].gradients_per_image:.0f} gradients"] = found
    more = f" with {', '.join(others)}" if others else ""
    grid(study, f"common weakness{more}", rows, list(scale.threats))


# --- printing


def grid(study: Study, what: str, rows: dict[str, list[Craft]], columns: Sequence[str]) -> None:
    """Print a table for each target."""
    for place, target in enumerate(study.targets):
        title(f"{what}: success on {target}")
        show(
            ["", *columns], [[name, *(_cell(one.targets[place]) for one in found)] for name, found in rows.items()]
        )


def _fooled(record: Craft | None, place: int) -> list[bool | None]:
    if record is None:
        raise ValueError("there is no such attack.")
    return record.targets[place].fooled(record.labels, record.goals)


def _cell(judged: Judgement) -> str:
    rate = judged.rate
    return "–" if rate is None else f"{100 * rate.value:.1f} ({100 * rate.low:.1f} – {100 * rate.high:.1f})"


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, numbers to the right."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join(
                cell.ljust(w) if not column else cell.rjust(w)
                for column, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def title(text: str) -> None:
    """Print what the next table is."""
    print(f"\n{text}\n")


def say(text: str) -> None:
    """Print a progress message to stderr."""
    print(text, file=sys.stderr, flush=True)


def about(study: Study) -> None:
    """Print the accuracy of all that was trained, and its cost."""
    names = {**{f"net {n + 1}": one for n, one in enumerate(study.nets)}}
    names["cSGLD, all samples"] = study.posterior(study.scale.temperature)
    names |= {f"target, {name}": one for name, one in study.trained_targets.items()}
    title(f"{study.train}, {study.scale.limit or 'all'} images; attacked: {len(study.samples)} of {study.test}")
    rows = [
        [name, str(len(one.history)), f"{100 * one.accuracy['value']:.1f}", f"{one.cost['flops']:.1e}"]
        for name, one in names.items()
        if one.accuracy is not None
    ]
    show(["trained", "epochs", "test accuracy", "training FLOP"], rows)


def main() -> None:
    """Train, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="digits")
    parser.add_argument(
        "--data", type=Path, default=Path("."), help="folder of cifar10_train.npz, cifar10_test.npz"
    )
    parser.add_argument("--out", type=Path, help="folder of all runs [default: runs/bayesian-SCALE]")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument(
        "--with", dest="others", nargs="*", default=[], help="more surrogates of the weakness table"
    )
    parser.add_argument("--temperatures", nargs="*", type=float, help="of the sweep [default: digits only]")
    parser.add_argument("--target", nargs="+", default=[], help="model strings to attack, in place of own nets")
    parser.add_argument("--arch", help="of the nets and the posterior; ARCH@WEIGHTS starts all of them there")
    parser.add_argument("--device", default="auto")
    for name in ("limit", "images", "judged", "nets", "cycles", "epochs", "samples", "steps"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    changes = {
        name: value
        for name in (
            "arch",
            "limit",
            "images",
            "judged",
            "nets",
            "cycles",
            "epochs",
            "samples",
            "steps",
            "temperatures",
        )
        if (value := getattr(given, name)) is not None
    }
    scale = replace(SCALES[given.scale], **changes)
    study = Study(
        scale, given.data, given.out or Path("runs") / f"bayesian-{given.scale}", given.device, given.target
    )
    about(study)
    tables: dict[str, Callable[[Study], None]] = {
        "main": main_table,
        "attacks": attacks_table,
        "iterations": iterations_table,
        "cycles": cycles_table,
        "techniques": techniques_table,
        "weakness": lambda study: weakness_table(study, given.others),
        "temperature": temperature_table,
    }
    for name in TABLES:
        if name in given.tables and (name != "temperature" or scale.temperatures):
            tables[name](study)


if __name__ == "__main__":
    main()
