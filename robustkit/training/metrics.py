"""Metrics of a run during training: one line per epoch in metrics.jsonl, and curves for TensorBoard."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustkit.core.writing import refuse_link, subfolder, write
from robustkit.runs.spec import dumps
from robustkit.runs.training_record import CURVES, METRICS

MISSING = "no curves for TensorBoard: pip install tensorboard writes them"


class Metrics:
    """Writes the metrics of each epoch; a resumed run rewrites those of its finished epochs first."""

    def __init__(self, folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
        """Open both files; `curves` is None if TensorBoard is not installed."""
        self.file = folder / METRICS
        write(self.file, "".join(dumps(facts) + "\n" for facts in history).encode())
        self.curves = _curves(folder, len(history))

    def add(self, facts: Mapping[str, Any]) -> None:
        """Write the metrics of one epoch."""
        refuse_link(self.file)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(dumps(facts) + "\n")
        if self.curves is not None:
            for name, value in facts.items():
                if isinstance(value, float):
                    self.curves.add_scalar(name, value, facts["epoch"])
            self.curves.flush()

    def close(self) -> None:
        """Close the file of the curves."""
        if self.curves is not None:
            self.curves.close()


def _curves(folder: Path, epochs: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(subfolder(folder, CURVES)), purge_step=epochs + 1)
