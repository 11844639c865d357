"""What an evaluation does, the same in each of its processes."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.core.threat import ThreatModel
from robustkit.registry import Suite, SuiteEntry


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that its workers share.

    Attributes:
        threat: the threat model.
        suite: the suite as it was given, to send to workers.
        entries: its attacks in order; the attack of stage n is `entries[n - 1]`.
        seed: of the run.
        batch_size: images that an attack gets at once, and of a chunk.
        slots: rows in one pass of the row-wise attacks.
        max_slots: the most rows that the search may choose where more are faster.
        precision: a key of DTYPES.
        choose_precision: whether the search may choose another precision.
        end_early: whether an arm may leave an image before its last query, at its checkpoints.
        deterministic: whether only deterministic kernels are used.
    """

    threat: ThreatModel
    suite: Suite
    entries: list[SuiteEntry]
    seed: int
    batch_size: int
    slots: int
    max_slots: int
    precision: str = "fp32"
    choose_precision: bool = False
    end_early: bool = True
    deterministic: bool = False

    def attacks_from(self, stage: int, count: int) -> list[SuiteEntry]:
        """Return the entries of `count` stages from `stage` on."""
        return self.entries[stage - 1 : stage - 1 + count]
