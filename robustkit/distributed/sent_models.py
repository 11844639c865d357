"""How a model of the driver's gets to a worker: by its string, or itself if no string loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robustkit.core.devices import model_device
from robustkit.core.errors import RunError
from robustkit.distributed.pool import Handle, WorkerPool
from robustkit.distributed.sent_files import SentFile, send_files
from robustkit.models import load_model
from robustkit.models.classifier import Classifier


@dataclass(frozen=True)
class SentModel:
    """A model for workers.

    Attributes:
        string: its model string.
        fingerprint: its hash, which the model of a worker must have as well.
        trust_code: whether a worker may run Python code that the record of a run folder names, as the driver may.
        classes: how many logits it returns; None if that is not known.
        files: of the string, for machines that lack them.
        itself: the model, if it comes from Python.
    """

    string: str
    fingerprint: str
    trust_code: bool
    classes: int | None
    files: Sequence[SentFile]
    itself: Handle[Classifier] | None = None

    @classmethod
    def of(cls, pool: WorkerPool, model: Classifier) -> SentModel:
        """Return any model; UsageError if it comes from Python and cannot be pickled."""
        facts = model.string, model.fingerprint, model.trust_code
        if not model.string.startswith("python:"):
            return cls(*facts, model.reader.classes, send_files(pool, model.string))
        device = model_device(model)
        try:
            # A worker may have other devices than the driver.
            itself = pool.share(model.cpu(), "the model")
        finally:
            model.to(device)
        return cls(*facts, None, send_files(pool, ""), itself)

    def load(self, device: torch.device) -> Classifier:
        """Return the model on a device of the worker; it is the driver's to the last weight.

        Raises:
            UsageError: it cannot be loaded here.
            RunError: what the string names here is another model than the driver's.
        """
        for file in self.files:
            file.place()
        if self.itself is not None:
            return self.itself.get().to(device)
        model = load_model(self.string, device=device, trust_code=self.trust_code)
        if model.fingerprint != self.fingerprint:
            raise RunError(f"a worker found another model than the driver under {self.string}; load it anew.")
        return model.expect(self.classes)
