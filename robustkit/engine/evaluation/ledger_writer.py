"""Writes verdicts and flags to the ledger, in chunks, and adds them to the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from robustkit.core.flags import Flag
from robustkit.engine.batching.samples import Finished
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.evaluation.verdicts import Verdicts
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.runs.ledger import Chunk, Verdict


class Sink(Protocol):
    """Where chunks are written: the ledger, or the main process that has it."""

    def write(self, *chunks: Chunk) -> None:
        """Write chunks, all of them or none."""


@dataclass(frozen=True)
class LedgerWriter:
    """Writes the chunks of one run."""

    ledger: Sink
    results: RunResults
    instrumented: InstrumentedModel

    def write(self, *chunks: Chunk) -> None:
        """Write chunks, all of them or none, and add them to the results."""
        self.ledger.write(*chunks)
        for chunk in chunks:
            self.results.add(chunk)

    def verdicts(self, judged: Verdicts, positions: np.ndarray, labels: np.ndarray) -> list[Verdict]:
        """Return the verdicts on the images at these positions."""
        images = judged.x.float().cpu().numpy()
        fooled = judged.fooled.tolist()
        rows = zip(
            positions.tolist(),
            labels.tolist(),
            judged.prediction.tolist(),
            judged.margin.tolist(),
            fooled,
            self.results.images.digests(positions),
            [images[i].tobytes() if hit else None for i, hit in enumerate(fooled)],
            *self._draw_columns(judged),
            strict=True,
        )
        return [Verdict(*row) for row in rows]

    def _draw_columns(self, judged: Verdicts) -> Iterator[Sequence[float | int | None]]:
        """Yield a verdict's values on a random model's draws; nothing for other models."""
        if self.instrumented.random:
            yield judged.right.tolist()
            yield judged.once.int().tolist()
            yield (judged.refused | judged.fooled).int().tolist()

    def write_finished(
        self, first: int, count: int, number: int, finished: Sequence[Finished], seconds: float
    ) -> None:
        """Write samples that went through `count` stages: a chunk for each stage, with the verdicts that it gave.

        The chunks have the same number; they share the seconds by their passes.
        """
        spent = np.concatenate([part.spent for part in finished]).sum(0)
        units = spent.sum(1) / max(spent.sum(), 1)
        verdicts: list[list[Verdict]] = [[] for _ in range(count)]
        refused = broken = 0
        for part in finished:
            rows = self.verdicts(part.judged, part.position, part.labels)
            for stage, verdict in zip(part.stage, rows, strict=True):
                verdicts[stage].append(verdict)
            # For a random model this can be due to the draws.
            refused += 0 if self.instrumented.random else int(part.judged.refused.sum())
            broken += int(part.judged.broken.sum())
        flags = noticed(refused, broken, self.instrumented)
        chunks = [
            Chunk(
                first + stage,
                number,
                int(spent[stage, 0]),
                int(spent[stage, 1]),
                seconds * float(units[stage]),
                verdicts[stage],
                flags if stage == 0 else [],
            )
            for stage in range(count)
        ]
        self.write(*chunks)


def noticed(refused: int, broken: int, instrumented: InstrumentedModel) -> list[Flag]:
    """Return flags of a chunk: refused claims, non-finite logits, a missing gradient."""
    flags = []
    if refused:
        flags.append(
            Flag(
                "claims-refused",
                "info",
                refused,
                "points fooled the model only outside the ball or the [0, 1] box; they do not count",
                "nothing to do, unless there are many: then the attack ignores the threat",
            )
        )
    if broken:
        flags.append(
            Flag(
                "non-finite",
                "warning",
                broken,
                "attacked images have NaN or infinite logits; they do not count as fooled",
                "find the cause in the model: an attacker could use it",
            )
        )
    if instrumented.detached:
        why = f"backward pass fails with {instrumented.backward_error}"
        if not instrumented.backward_error:
            why = "output does not depend on its input differentiably"
        flags.append(
            Flag(
                "no-gradient",
                "warning",
                None,
                f"the model's {why}: gradient attacks get zero",
                "use score-based attacks, or a differentiable version of the model",
            )
        )
    return flags
