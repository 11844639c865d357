"""Models of any kind as one: `ensemble:[A;B;C]?combine=crossmax`, each with its own weights and normalisation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from robustkit.core.errors import UsageError
from robustkit.models.classifier import Classifier
from robustkit.models.ensembles.mixture import Members, combine_identity, joined_by
from robustkit.models.options import Options
from robustkit.models.randomness import drawing
from robustkit.models.sources.built import Built
from robustkit.models.strings import ModelString, joined

# Loads a model by its string and the seed of its initial weights.
Load = Callable[[str, int], Classifier]


class EnsembleOfClassifiers(Members):
    """Classifiers, each with its defenses and normalisation; a member may be an ensemble itself."""

    @property
    def weights_sha256(self) -> str:
        """SHA-256 over those of the members."""
        own = [net.weights_sha256 for net in self.nets if isinstance(net, Classifier)]
        return hashlib.sha256("".join(own).encode()).hexdigest()


def build(spec: ModelString, options: Options, load: Load, seed: int) -> Built:
    """Return the ensemble that a string names; members without weights get those of seeds in a row.

    Raises:
        UsageError: if a member cannot be loaded, or members do not take the same images to the same classes, or
            are one and the same where they must not be.
    """
    members = [load(text, seed + number) for number, text in enumerate(spec.members)]
    aggregate = joined_by(options.combine, len(members), f"model {str(spec)!r}")
    first = members[0]
    for member in members[1:]:
        _check_alike(first, member)
    if (options.combine or "").startswith("crossmax") and not drawing(first):
        _check_unlike(members)
    return Built(
        EnsembleOfClassifiers(members, aggregate),
        arch=joined([member.string for member in members]),
        identity={"ensemble": [member.fingerprint for member in members], **combine_identity(options.combine)},
        num_classes=first.num_classes,
        in_channels=first.in_channels,
        preprocess=first.preprocess,
    )


def _check_alike(one: Classifier, other: Classifier) -> None:
    """Refuse two that are known to differ in their classes or images; other differences show when they run."""
    both = f"{one.string!r} and {other.string!r}"
    for what, first, second in (
        ("classes", one.num_classes, other.num_classes),
        ("channels", one.in_channels, other.in_channels),
    ):
        if first and second and first != second:
            raise UsageError(
                f"{both} have {first} and {second} {what}: join models of the same images and classes."
            )
    if other.size is None and one.preprocess and other.preprocess and one.preprocess.size != other.preprocess.size:
        sizes = ["x".join(map(str, member.size)) for member in (one.preprocess, other.preprocess)]
        raise UsageError(
            f"{both} take images of {sizes[0]} and {sizes[1]}: write ?size={sizes[1].replace('x', ',')} at the "
            "end of the second's string."
        )


def _check_unlike(members: list[Classifier]) -> None:
    """Refuse copies of one net under CrossMax: all classes would have equal logits."""
    if len({member.fingerprint for member in members}) == 1:
        raise UsageError(
            f"crossmax of {len(members)} times {members[0].string!r} is 0 for every class: join nets that differ."
        )
