"""How a model of the driver's gets to a worker: by its string, or as it is if it comes from Python."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import torch

from robustkit.core.errors import RunError, UsageError
from robustkit.distributed.files import Ask, files_of, here
from robustkit.engine.model.loaded_models import Net
from robustkit.models import load_model
from robustkit.models.classifier import Classifier


@dataclass(frozen=True)
class Parcelled:
    """A model on its way: its string and fingerprint, and itself on the CPU if no string loads it.

    `files` are the driver's that the string names; a machine that lacks one asks for it. `classes` is how many
    logits it returns, where that is known; `trust_code` whether the driver may run Python code that a run folder
    names: so may a worker.
    """

    string: str
    fingerprint: str
    itself: bytes | None = None
    files: tuple[str, ...] = ()
    classes: int | None = None
    trust_code: bool = False

    @classmethod
    def named(cls, model: Classifier | Net, classes: int | None) -> Parcelled:
        """Return a model that its string loads, packed."""
        files = tuple(files_of(model.string))
        return cls(model.string, model.fingerprint, files=files, classes=classes, trust_code=model.trust_code)

    @classmethod
    def of(cls, model: Classifier) -> Parcelled:
        """Return a model packed; UsageError if it is of Python and cannot be pickled."""
        if not model.string.startswith("python:"):
            return cls.named(model, model.reader.classes)
        try:
            return cls(model.string, model.fingerprint, pickle.dumps(model))
        except Exception as error:
            raise UsageError(
                f"the model cannot be sent to workers ({type(error).__name__}: {error}); "
                "define its classes and functions at the top of a module, or leave --workers out."
            ) from error

    def unpack(self, device: torch.device, ask: Ask) -> Classifier:
        """Return the model that the driver has, on a device; `ask` for files that are not here."""
        if self.itself is None:
            string = here(self.string, self.files, ask)
            model = load_model(string, device=device, trust_code=self.trust_code)
            if model.fingerprint != self.fingerprint:
                raise RunError(f"a worker found another model than the driver under {self.string}; load it anew.")
            return model.expect(self.classes)
        try:
            # From this run's own driver, over a connection that knows the run's key.
            loaded: Classifier = pickle.loads(self.itself)
        except Exception as error:
            raise UsageError(
                f"a worker cannot load the model ({type(error).__name__}: {error}); "
                "define it in a module that can be imported, or leave --workers out."
            ) from error
        return loaded.to(device)
