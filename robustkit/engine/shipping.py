"""How a model of the driver's gets to a worker: by its string, or as it is if it comes from Python."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import torch

from robustkit.errors import RunError, UsageError
from robustkit.models import load_model
from robustkit.models.classifier import Classifier


@dataclass(frozen=True)
class Parcelled:
    """A model on its way: its string and fingerprint, and itself on the CPU if no string loads it."""

    string: str
    fingerprint: str
    itself: bytes | None

    @classmethod
    def of(cls, model: Classifier) -> Parcelled:
        """Return a model packed; UsageError if it is of Python and cannot be pickled."""
        itself = None
        if model.string.startswith("python:"):
            try:
                itself = pickle.dumps(model)
            except Exception as error:
                raise UsageError(
                    f"the model cannot be sent to workers ({type(error).__name__}: {error}); "
                    "define its classes and functions at the top of a module, or leave --workers out."
                ) from error
        return cls(model.string, model.fingerprint, itself)

    def unpack(self, device: torch.device) -> Classifier:
        """Return the model that the driver has, on a device."""
        if self.itself is None:
            model = load_model(self.string, device=device)
            if model.fingerprint != self.fingerprint:
                raise RunError(f"a worker found another model than the driver under {self.string}; load it anew.")
            return model
        try:
            loaded: Classifier = pickle.loads(self.itself)
        except Exception as error:
            raise UsageError(
                f"a worker cannot load the model ({type(error).__name__}: {error}); "
                "define it in a module that can be imported, or leave --workers out."
            ) from error
        return loaded.to(device)
