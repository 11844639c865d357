"""What speaks against a run's number: flags, rivals that see less and find more, views with other gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from robustkit.checks.run import DOUBTS
from robustkit.checks.strength import masked, scores_beat_gradients, unattacked
from robustkit.core.flags import Flag
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.failures import is_out_of_memory
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.gradient_views.discovery import GradientViews, discover_views
from robustkit.registry import SuiteEntry
from robustkit.runs.recorded_outputs import recording
from robustkit.runs.unfinished_work import Store


@dataclass
class Reliability:
    """The doubts about one run, as far as it has come; they decide on its spare attacks.

    The `store` keeps by this `name` what was found out about views.
    """

    samples: Samples
    instrumented: InstrumentedModel
    results: RunResults
    entries: Sequence[SuiteEntry]
    store: Store
    name: str

    @cached_property
    def outlook(self) -> GradientViews:
        """What the model offers to climb on beside its own gradients; the meter knows of it from then on."""
        x = self.samples.images(range(min(self.instrumented.trial_batch, len(self.samples)))).to(
            self.instrumented.device
        )
        try:
            with recording(self.store, self.name):
                found = discover_views(self.instrumented.model, x, self.instrumented.random)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found = discover_views(self.instrumented.model, x[:1], self.instrumented.random)
        self.instrumented.views = found.views
        return found

    @property
    def doubtful(self) -> bool:
        """Whether spare attacks are called for: by a view that is not the model's own gradient, or by a flag."""
        return self.outlook.doubtful or self.suspect

    @property
    def suspect(self) -> bool:
        """Whether something speaks against gradients; that a model is an ensemble does not."""
        flags = {code for code, flag in self.results.flags.items() if flag.raised}
        seen = self.results.seen
        return bool(DOUBTS & flags) or self._rivalry(seen).raised or self._masked(seen).raised

    def afterthoughts(self) -> list[Flag]:
        """Return what the suite's stages and the model's views say against the number, or for it."""
        views = [entry.view for entry in self.entries]
        idle = unattacked(views, self.outlook.views, self.results.robust) if all(views) else None
        return [self._rivalry(self.results.scope), self._masked(self.results.scope), *([idle] if idle else [])]

    @property
    def _access(self) -> list[str]:
        """What the attack of each stage that is told of needs of the model."""
        access = ["", *(entry.attack.info.access for entry in self.entries)]
        return [access[number] for number in self.results.told]

    def _rivalry(self, among: np.ndarray) -> Flag:
        return scores_beat_gradients(self.results.stages(among), self._access)

    def _masked(self, among: np.ndarray) -> Flag:
        views = ["", *(entry.view for entry in self.entries)]
        told = [views[number] for number in self.results.told]
        places = self.outlook.places if any(told) else []
        plain = any(views) and not self.outlook.doubtful
        return masked(self.results.stages(among), self._access, told, places, plain)
