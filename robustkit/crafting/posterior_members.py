"""Posteriors and trained ensembles as members of an ensemble of surrogates: any of their nets, when it is asked.

Samples of a posterior take turns in one net, whose weights are swapped; what is not swapped in stays on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustkit.core.isolation import evaluation_mode
from robustkit.core.shapes import Images, Logits
from robustkit.crafting.lazy_models import ModelSlot
from robustkit.engine.model.instrumented_model import ExecutionConfig, InstrumentedModel
from robustkit.engine.model.loaded_models import Net
from robustkit.engine.model.profiling import tune
from robustkit.models.classifier import Classifier
from robustkit.models.ensembles.mixture import Mixture


class PosteriorMembers:
    """A `Population` of `attack_api.posterior_surrogates`: the nets of a mixture. It counts what all are asked.

    Without a shelf the mixture stays loaded; with one it is taken from there for every call. `layout` is the
    memory layout of the images. Batch norms are never folded, since the weights under them change.
    """

    def __init__(self, net: Net, device: torch.device, shelf: ModelSlot | None = None) -> None:
        """Load it, or wait until it is asked."""
        self.net, self.device, self.shelf = net, device, shelf
        self.layout = torch.contiguous_format
        self._forwards = self._backwards = 0
        self.whole = net.load(device) if shelf is None else None
        # Each net, by its identity, as the attack sees it.
        self._meters: dict[int, InstrumentedModel] = {}

    def __len__(self) -> int:
        """How many nets."""
        return self.net.count

    def __call__(self, x: Images) -> Logits:
        """Return the logits of all nets together."""
        with self._loaded() as whole:
            self._forwards += len(self) * len(x)
            return self.net.instrumented(whole, self.device)(x)

    def sample(self, number: int) -> Sample:
        """Return one of the nets as a member of its own."""
        return Sample(self, number)

    def place(self, number: int) -> object:
        """Return what nets share that are not to be asked at the same time."""
        return self if self.whole is None else mixture_of(self.whole).place(number)

    @contextmanager
    def at(self, number: int) -> Iterator[InstrumentedModel]:
        """Give one of the nets inside, loaded."""
        with self._loaded() as whole:
            net = mixture_of(whole).at(number)
            if id(net) not in self._meters:
                self._meters[id(net)] = self.net.instrumented(whole.with_net(net), self.device)
            instrumented = self._meters[id(net)]
            instrumented.config = ExecutionConfig(instrumented.model, None, self.layout)
            yield instrumented

    def tune_layout(self, x: Images) -> None:
        """Choose the memory layout that is fastest on x."""
        with self.at(0) as instrumented:
            tune(instrumented, x, precision=False)
            self.layout = instrumented.config.layout

    @property
    def forwards(self) -> int:
        """Forward passes so far, one for each image and net."""
        return self._forwards + sum(instrumented.forwards for instrumented in self._meters.values())

    @property
    def backwards(self) -> int:
        """Backward passes so far, one for each image and net."""
        return self._backwards + sum(instrumented.backwards for instrumented in self._meters.values())

    def forget(self) -> None:
        """Count from nothing again."""
        self._forwards = self._backwards = 0
        self._meters = {}

    @contextmanager
    def _loaded(self) -> Iterator[Classifier]:
        if self.whole is not None:
            yield self.whole
            return
        if self.shelf is None:
            raise RuntimeError("neither loaded nor on a shelf.")
        whole = self.shelf.take(self).model
        try:
            with evaluation_mode(whole):
                yield whole
        finally:
            # What is kept here would stay in memory when the shelf takes another net.
            self._forwards, self._backwards = self.forwards, self.backwards
            self._meters = {}


class Sample:
    """One net of a `Sampled`, put into its place by `resident`."""

    def __init__(self, of: PosteriorMembers, number: int) -> None:
        """Name it."""
        self.of, self.number = of, number

    @property
    def place(self) -> object:
        """What it shares with others of its kind."""
        return self.of.place(self.number)

    def __call__(self, x: Images) -> Logits:
        """Return its logits, as any member does."""
        with self.resident() as model:
            return model(x)

    @contextmanager
    def resident(self) -> Iterator[InstrumentedModel]:
        """Give the net inside."""
        with self.of.at(self.number) as instrumented:
            yield instrumented


def mixture_of(classifier: Classifier) -> Mixture:
    """Return the nets of a classifier that is several."""
    if not isinstance(classifier.net, Mixture):
        raise RuntimeError(f"{classifier.string} is one net.")
    return classifier.net
