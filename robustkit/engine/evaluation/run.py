"""One evaluation: clean pass, checks, then the suite's attacks over whatever still stands, into a ledger."""

from __future__ import annotations

import itertools
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch

from robustkit import registry
from robustkit.attack_api import RowWise
from robustkit.checks.relabelled import clean_doubts
from robustkit.checks.run import training_mode
from robustkit.core.errors import RunError, UsageError
from robustkit.core.flags import Flag
from robustkit.core.isolation import evaluation_mode, threads, training_count
from robustkit.core.threat import ThreatModel
from robustkit.core.writing import subfolder
from robustkit.data.samples import Samples
from robustkit.distributed.crew import Agency, Alone
from robustkit.engine import gradient_budgets
from robustkit.engine.allocation.arms import spread
from robustkit.engine.allocation.rounds import Rounds
from robustkit.engine.allocation.strictness import STRICTNESS
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.early_stopping import Limits, TimeUp, shuffled, unfinished_images
from robustkit.engine.evaluation.eps_curve import CurveSearch
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.evaluation.sanity import refuse_randomness
from robustkit.engine.evaluation.scheduler import Scheduler
from robustkit.engine.model.image_size import enlarged_images, pixel_space
from robustkit.engine.model.instrumented_model import DTYPES, InstrumentedModel
from robustkit.engine.progress import Progress
from robustkit.gradient_views.discovery import is_applicable
from robustkit.models.classifier import Classifier
from robustkit.runs import examples, run_folder
from robustkit.runs.environment import environment
from robustkit.runs.evaluation_record import Audit, Cost, Report, RunSpec, Stop
from robustkit.runs.ledger import Ledger
from robustkit.runs.opening import open_for_writing, require_writable
from robustkit.runs.recorded_outputs import recording
from robustkit.runs.unfinished_work import Store
from robustkit.runs.versions import noted

BATCH_SIZE, MINIMAL_BATCH_SIZE = 256, 32
SLOTS_CPU, SLOTS_GPU = 128, 512
# How far a GPU's slots may grow where larger batches are faster.
MOST_SLOTS = 4096
AUDITOR = "autoattack"


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate and how. `run` does it; `spec` says what it is, before anything has run.

    `batch_size` is how many images an attack gets at once. It is part of the run's identity only where an
    attack's random numbers depend on it (AutoAttack's and foolbox's do, ours do not). `curve` asks for robust
    accuracy at other eps as well, `audit` for full AutoAttack on so many survivors; `limits` may end the run
    early; `workers` is how many processes share the attacks, by themselves or on the cluster at the address `ray`.
    None of these changes a verdict or is part of the identity. `strictness` is: the share of the images that a
    suite with arms may leave in doubt, by its upper bound.
    """

    model: Classifier
    samples: Samples
    threat: ThreatModel
    suite: registry.Suite = registry.DEFAULT_SUITE
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "auto"
    batch_size: int | None = None
    curve: bool = False
    audit: int = 0
    strictness: float | None = None
    limits: Limits = field(default_factory=Limits)
    workers: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        if self.precision not in ("auto", *DTYPES):
            raise UsageError(f"precision {self.precision!r}: write auto, {', '.join(DTYPES)}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: write at least 1, or auto.")
        if not len(self.samples):
            raise UsageError(f"{self.samples.name} holds no images.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed}: write a whole number from 0 to 2**63 - 1.")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers {self.workers}: write how many processes shall share the work, e.g. 2.")
        if self.audit < 0:
            raise UsageError(f"audit {self.audit}: write how many survivors AutoAttack shall try, e.g. 50.")
        if self.threat.minimal:
            self._refuse_eps()
        if self.strictness is not None and not any(entry.arm for entry in self.entries):
            raise UsageError(
                f"suite {registry.suite_text(self.suite)!r} gives every image the same attacks, so it has no "
                "strictness to set; write --suite auto, or leave --strictness out."
            )
        self.model.expect(self.samples.num_classes)
        if self.limits and any(entry.attack.info.coupled for entry in self.entries):
            raise UsageError(
                "a run that may stop early needs attacks whose random numbers do not depend on the batch; "
                "write --suite rapid, or leave --time-limit and --stop-at-width out."
            )
        if self.limits and self.curve:
            raise UsageError("a curve is of all images; leave out --curve, or --time-limit and --stop-at-width.")
        if self.curve and not self.threat.eps:
            raise UsageError(f"threat '{self.threat}' has no curve; write an eps above 0, or leave --curve out.")

    def _refuse_eps(self) -> None:
        """Refuse what has no meaning where the threat has no eps."""
        asked = {
            "curve": (self.curve, "gives robust accuracy at every eps already"),
            "audit": (self.audit, "has no eps that AutoAttack could keep to"),
            "strictness": (self.strictness is not None, "has no eps that AutoAttack could keep to"),
            "stop at width": (self.limits.width is not None, "gives distances, and no share to stop at"),
            f"precision {self.precision}": (self._precision != "fp32", "is searched in float32"),
        }
        for name, (given, why) in asked.items():
            if given:
                raise UsageError(f"threat '{self.threat}' {why}; leave out {name}.")

    @cached_property
    def entries(self) -> list[registry.SuiteEntry]:
        """The suite's attacks, in order."""
        return registry.parse_suite(self.suite, self.threat.norm, minimal=self.threat.minimal)

    @cached_property
    def spec(self) -> RunSpec:
        """Everything that determines the numbers."""
        coupled = any(entry.attack.info.coupled for entry in self.entries)
        return RunSpec(
            model={"string": self.model.string, "fingerprint": self.model.fingerprint},
            data={
                "string": self.samples.name,
                "n": len(self.samples),
                "fingerprint": self.samples.fingerprint,
            },
            threat=str(self.threat),
            suite=[entry.spec for entry in self.entries],
            seed=self.seed,
            batch_size=self.batch if coupled else None,
            strictness=self.strictness,
        )

    @property
    def share(self) -> float:
        """The share of the images that the arms may leave in doubt."""
        return STRICTNESS if self.strictness is None else self.strictness

    @property
    def batch(self) -> int:
        """How many images an attack gets at once."""
        # Kept small where no image leaves a batch early: what a kill may lose, and workers share, is a batch.
        usual = MINIMAL_BATCH_SIZE if self.threat.minimal and self.device.type == "cpu" else BATCH_SIZE
        return min(self.batch_size or usual, len(self.samples))

    @property
    def slots(self) -> int:
        """How many images a row-wise attack's passes take."""
        return self.batch_size or (SLOTS_CPU if self.device.type == "cpu" else SLOTS_GPU)

    @property
    def _precision(self) -> str:
        return "fp32" if self.precision == "auto" else self.precision

    def run(
        self,
        out: Path | None = None,
        progress: Progress | None = None,
        agency: Agency | None = None,
        overwrite: bool = False,
    ) -> Report:
        """Run, or resume, or return the stored result of a finished run.

        Args:
            out: the run folder; without one nothing is written.
            progress: who to tell on the way.
            agency: where workers come from, if other runs share them; else the run hires its own.
            overwrite: remove the run that `out` holds, and begin anew.

        Raises:
            UsageError: for a request that cannot be carried out.
            RunError: when it fails on the way; the same call resumes.
        """
        progress = progress or Progress()
        opened = open_for_writing(out, self.spec, overwrite=overwrite, say=progress.say) if out else None
        with opened or nullcontext(True) as writable:
            store = Store(out / run_folder.UNFINISHED if out and writable else None, self.spec.run_id)
            try:
                report = self._at_eps(out, writable, progress, agency, store)
                if self.curve and report.curve is None:
                    require_writable(out, writable, "a curve")
                    report = self._with_curve(report, out, progress, store)
                if self.audit > len(report.audit.audited if report.audit else ()):
                    require_writable(out, writable, "an audit")
                    report = self._with_audit(report, out, progress, agency)
                if report.stopped is None:
                    store.clear()
                return report
            finally:
                progress.close()

    def _at_eps(
        self, out: Path | None, writable: bool, progress: Progress, agency: Agency | None, store: Store
    ) -> Report:
        if out and (out / run_folder.REPORT).exists():
            if run_folder.read_report(out).stopped is None or not writable:
                return self._stored(out, progress)
        with Ledger.open(out and out / run_folder.LEDGER, self.spec.run_id) as ledger:
            return self._finish(ledger, *self._work(ledger, progress, agency, store), out)

    def _stored(self, out: Path, progress: Progress) -> Report:
        report = run_folder.read_report(out)
        if broken := run_folder.broken_seals(out, report):
            raise RunError(f"{broken[0]} See: robustkit verify {out}")
        news = "its curve is searched now" if self.curve and report.curve is None else "this is its stored result"
        progress.say(f"run {report.run_id} was finished before; {news}")
        return report

    def _with_curve(self, report: Report, out: Path | None, progress: Progress, store: Store) -> Report:
        found = run_folder.read_adversarial(out) if out else report.adversarial or {}
        instrumented = InstrumentedModel(self.model, self.device, self._precision)
        search = CurveSearch(instrumented, self.samples, self.threat, progress)
        with recording(store, "curve"):
            report = search.add(report, found["index"], found["x"])
        if out:
            # The page was made without the curve.
            (out / run_folder.PAGE).unlink(missing_ok=True)
            run_folder.write_report(out, report)
        return report

    def _with_audit(self, report: Report, out: Path | None, progress: Progress, agency: Agency | None) -> Report:
        standing = np.array([verdict.index for verdict in report.verdicts if verdict.robust], np.int64)
        margins = np.array([verdict.margin for verdict in report.verdicts if verdict.robust])
        chosen = standing[spread(margins, shuffled(len(standing), self.seed), self.audit)]
        found = None
        if len(chosen):
            subset = self.samples.pick(chosen)
            place = out and subfolder(out, run_folder.AUDIT)
            found = replace(self, samples=subset, suite=AUDITOR, curve=False, audit=0, limits=Limits()).run(
                place, progress, agency
            )
        broke = [int(chosen[v.index]) for v in found.verdicts if not v.robust] if found else []
        cost = found.cost if found else Cost(0, 0, 0.0)
        report = report.with_audit(Audit.of(chosen.tolist(), broke, len(standing), report.n, cost))
        if out:
            (out / run_folder.PAGE).unlink(missing_ok=True)
            run_folder.write_report(out, report)
            shutil.rmtree(out / run_folder.AUDIT, ignore_errors=True)
        return report

    def _work(
        self, ledger: Ledger, progress: Progress, agency: Agency | None, store: Store
    ) -> tuple[BlockRunner, list[Flag]]:
        results = RunResults.of(len(self.samples), self.spec.suite)
        ledger.require(len(self.samples), self.samples.images([0]).nbytes, len(self.spec.suite))
        noted(ledger)
        for chunk in ledger.chunks():
            results.add(chunk)
        if results.chunks:
            progress.say(
                f"resuming {self.spec.run_id}: {len(results.chunks)} chunks done, "
                f"{results.settled} of {results.n} images settled"
            )
        with evaluation_mode(self.model) as was_training:
            instrumented = InstrumentedModel(self.model, self.device, self._precision)
            parts = (
                self.samples,
                self.threat,
                self.entries,
                self.seed,
                self.batch,
                ledger,
                results,
                instrumented,
                progress,
                self.slots,
                self.precision == "auto",
                MOST_SLOTS if self.batch_size is None and self.device.type == "cuda" else self.slots,
            )
            alone = agency is None and self.ray is None and self.workers in (None, 1)
            if alone:
                worker = BlockRunner(*parts, store=store)
            else:
                worker = Scheduler(*parts, suite=self.suite, precision=self._precision, store=store)
            worker.prepare()
            refuse_randomness(self.threat, random=instrumented.random)
            with self._helped(worker, agency), threads(instrumented.threads):
                self._through(worker)
            return worker, training_mode(was_training, training_count(self.model))

    def _helped(self, worker: BlockRunner, agency: Agency | None) -> AbstractContextManager[None]:
        """Have the workers of a run with several inside."""
        if not isinstance(worker, Scheduler):
            return nullcontext()
        return worker.hired(agency or Alone(self.workers, self.ray, worker.progress))

    def _through(self, worker: BlockRunner) -> None:
        """Take all images through clean pass and suite, or as many blocks of them as the limits allow."""
        results = worker.results
        if not self.limits:
            return self._block(worker, results.scope)
        if self.limits.seconds is not None:
            worker.deadline = time.perf_counter() + self.limits.seconds
        block = results.scope[:0]
        try:
            for block in self.limits.blocks(results, self.seed):
                self._block(worker, block)
        except TimeUp:
            results.stopped = Stop("time-limit", results.n) if len(results.scope) else self._part(worker, block)
        return None

    def _part(self, worker: BlockRunner, block: np.ndarray) -> Stop:
        """Have those images of the first block count that were classified before time was up."""
        results = worker.results
        spared = [number for number, entry in enumerate(self.entries, 1) if not (entry.spare or entry.arm)]
        results.scope = block[results.judged[block] >= 0]
        if not len(results.scope):
            raise RunError(
                f"no image was classified within {self.limits.seconds:g} seconds; run the same command again to "
                "go on, or give it more time."
            )
        last = len(self.entries) if worker.reliability.doubtful else max(spared, default=0)
        return Stop("time-limit", results.n, results.unfinished(results.scope, last))

    def _block(self, worker: BlockRunner, among: np.ndarray) -> None:
        worker.clean(among)
        if self.threat.minimal:
            return worker.attack(1, among)
        stage = 1
        for (arm, spare, flies, scores), group in itertools.groupby(self.entries, _kind):
            entries = list(group)
            count = len(entries)
            if any(entry.view for entry in entries):
                worker.reliability.outlook  # noqa: B018  (seen before the first attack on a view)
            if arm:
                self._allocate(worker, among)
            elif spare and not (worker.reliability.suspect if scores else worker.reliability.doubtful):
                pass
            elif flies:
                worker.fly(stage, count, among)
            else:
                for number, entry in enumerate(entries, stage):
                    if is_applicable(
                        entry.view, worker.instrumented.views, [entry.view for entry in self.entries]
                    ):
                        worker.attack(number, among)
            stage += count

    def _allocate(self, worker: BlockRunner, among: np.ndarray) -> None:
        """Give the arms to these images."""
        self._rounds(worker).run(among)

    def _rounds(self, worker: BlockRunner) -> Rounds:
        # The driver's worker writes to the ledger itself.
        ledger = cast("Ledger", worker.ledger)
        return Rounds(worker, ledger, self.share)

    def _finish(self, ledger: Ledger, worker: BlockRunner, mode: list[Flag], out: Path | None) -> Report:
        results, instrumented = worker.results, worker.instrumented
        space = pixel_space(self.model, self.samples)
        reliability = [*self._data_doubts(results, instrumented), *enlarged_images(space), *self._short_steps()]
        flags = [*reliability, *worker.reliability.afterthoughts(), *mode, *unfinished_images(results)]
        fooled = np.fromiter(ledger.fooled(), np.dtype((np.int64, 3)))
        counts = np.isin(fooled[:, 0], results.scope)
        index, labels, predictions = fooled[counts].T
        shape = tuple(self.samples.images([0]).shape[1:])
        rows = run_folder.Adversarials(
            index, labels, shape, lambda: itertools.compress(ledger.adversarials(), counts)
        )
        facts = environment(self.device, instrumented.precision, instrumented.micro_batch, instrumented.threads)
        surroundings = facts | worker.ran
        surroundings["parts"] = noted(ledger)
        surroundings |= {"pixels": space, "model_notes": list(self.model.notes)}
        strictness = self._rounds(worker).doubt(results.scope)
        if out is None:
            return results.report(self.spec, flags, surroundings, {}, strictness, rows.arrays())
        run_folder.write_adversarial(out, rows)
        chosen = examples.choose(rows.index, *self._hardness(results))
        run_folder.write_examples(out, examples.arrays(rows, predictions, chosen, self.samples, self.threat))
        ledger.seal()
        seals = {name: run_folder.sha256(out / name) for name in run_folder.SEALED}
        report = results.report(self.spec, flags, surroundings, seals, strictness)
        run_folder.write_report(out, report)
        return report

    def _hardness(self, results: RunResults) -> tuple[np.ndarray, np.ndarray]:
        """Return by what fooled images are ranked: stage, then margin; or their distance alone."""
        if self.threat.minimal:
            return results.distances, np.zeros(results.n)
        return results.fell, results.margins

    def _short_steps(self) -> list[Flag]:
        """Return a flag for each attack whose steps cannot reach the edge of the ball, if all attacks are such."""
        found = [gradient_budgets.falls_short(entry.attack, float(self.threat.eps)) for entry in self.entries]
        return [flag for flag in found if flag is not None and all(found)]

    def _data_doubts(self, results: RunResults, instrumented: InstrumentedModel) -> list[Flag]:
        """Return the flags of the data, and of what the model says of it before any attack."""
        labels, said = self.samples.labels[results.scope].tolist(), results.predictions[results.scope].tolist()
        return [
            *self.samples.pick(results.scope).flags,
            *clean_doubts(said, labels, instrumented.num_classes or 2),
        ]


def _kind(entry: registry.SuiteEntry) -> tuple[bool, bool, bool, bool]:
    """Return whether a rung is an arm, is spare, is flown, and is a spare search by scores that begins anew."""
    refines = getattr(entry.attack, "refine", False)
    scores = entry.spare and entry.attack.info.access == "score" and not refines
    return entry.arm, entry.spare, isinstance(entry.attack, RowWise), scores
