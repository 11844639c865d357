"""The reliability of a run's results: flags, score attacks that beat gradient attacks, views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from robustkit.checks.run import DOUBTS
from robustkit.checks.strength import masked, scores_beat_gradients, unattacked
from robustkit.core.flags import Flag, passed
from robustkit.core.out_of_memory import try_in_memory
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.gradient_views.discovery import GradientViews, discover_views
from robustkit.registry import SuiteEntry
from robustkit.runs.recorded_outputs import recording
from robustkit.runs.unfinished_work import Store


@dataclass
class Reliability:
    """Whether a run's results so far can be trusted; this decides on its conditional attacks.

    The `store` keeps the search for gradient views as a task of this `name`.
    """

    samples: Samples
    instrumented: InstrumentedModel
    results: RunResults
    entries: Sequence[SuiteEntry]
    store: Store
    name: str
    views: GradientViews | None = field(default=None, init=False)

    def find_views(self) -> GradientViews:
        """Return the differentiable substitutes of the model's gradients, searched for once.

        The instrumented model has them as its `views` from then on.
        """
        if self.views is None:
            model = self.instrumented
            images = min(model.trial_batch, len(self.samples))
            x = self.samples.images(range(images)).to(model.device)
            with recording(self.store, self.name):
                self.views = try_in_memory(partial(discover_views, model.model, x, model.random), model.device)
            if self.views is None:
                self.views = discover_views(model.model, x[:1], model.random)
            model.views = self.views.views
        return self.views

    def doubtful(self) -> bool:
        """Return whether conditional attacks should run: because of gradient views, or of a flag."""
        return self.find_views().doubtful or self.suspect()

    def suspect(self) -> bool:
        """Return whether a flag or a result makes the gradients unreliable; being an ensemble alone does not."""
        flags = {code for code, flag in self.results.flags.items() if flag.raised}
        seen = self.results.seen
        return bool(DOUBTS & flags) or self._scores_against_gradients(seen).raised or self._masked(seen).raised

    def flags(self) -> list[Flag]:
        """Return the flags that follow from the results of all attacks and from the model's views."""
        views, robust = [entry.view for entry in self.entries], self.results.robust
        idle = unattacked(views, self.find_views().views, robust) if all(views) and robust else None
        flags = [self._scores_against_gradients(self.results.scope), self._masked(self.results.scope)]
        return [*flags, *([idle] if idle else [])]

    def _scores_against_gradients(self, positions: np.ndarray) -> Flag:
        return scores_beat_gradients(self.results.stages(positions), self._access())

    def _masked(self, positions: np.ndarray) -> Flag:
        views = ["", *(entry.view for entry in self.entries)]
        reported = [views[number] for number in self.results.reported]
        if any(views) and not any(reported) and not self.results.robust:
            return passed("masked-gradient", 0, "images were left to attacks on views of the model")
        places = self.find_views().places if any(reported) else []
        plain = any(views) and not self.find_views().doubtful
        return masked(self.results.stages(positions), self._access(), reported, places, plain)

    def _access(self) -> list[str]:
        """Return what the attack of each reported stage needs of the model: `gradient`, `score` or none."""
        access = ["", *(entry.attack.info.access for entry in self.entries)]
        return [access[number] for number in self.results.reported]
