"""One evaluation: its settings, and how it runs, resumes, and adds a curve or an audit."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch

from robustkit import registry
from robustkit.checks.run import training_mode
from robustkit.core.determinism import deterministic_operations
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RunError, UsageError
from robustkit.core.flags import Flag
from robustkit.core.float32 import float32_operations
from robustkit.core.isolation import evaluation_mode, threads, training_count
from robustkit.core.threat import ThreatModel
from robustkit.core.writing import subfolder
from robustkit.data.samples import Samples
from robustkit.distributed.sharing import SharedPool, shared_pool
from robustkit.engine.allocation.arms import spread
from robustkit.engine.allocation.rounds import Rounds
from robustkit.engine.allocation.strictness import STRICTNESS
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.early_stopping import Limits, shuffled
from robustkit.engine.evaluation.eps_curve import CurveSearch
from robustkit.engine.evaluation.final_report import write_report
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.evaluation.sanity import check_not_random
from robustkit.engine.evaluation.scheduler import Scheduler
from robustkit.engine.evaluation.settings import RunSettings
from robustkit.engine.evaluation.suite_run import run_images
from robustkit.engine.model.instrumented_model import DTYPES, InstrumentedModel
from robustkit.engine.progress import Progress
from robustkit.models.classifier import Classifier
from robustkit.models.sources.built import GRADIENT
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report
from robustkit.runs.ledger import Ledger
from robustkit.runs.opening import finished_before, open_for_writing, require_writable
from robustkit.runs.recorded_outputs import recording
from robustkit.runs.report_parts import Audit, Cost
from robustkit.runs.spec import RunSpec
from robustkit.runs.unfinished_work import Store
from robustkit.runs.versions import record_part

BATCH_SIZE, MINIMUM_NORM_BATCH_SIZE = 256, 32
SLOTS_CPU, SLOTS_GPU = 128, 512
# The most rows of a pass that a GPU may choose where larger batches are faster.
MAX_SLOTS_GPU = 4096
AUDIT_SUITE = "autoattack"


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate and how: `run` runs it, `spec` identifies it before anything has run.

    Attributes:
        model: the classifier.
        samples: images and labels.
        threat: the threat model.
        suite: the attacks, a string or what `registry.parse_suite` takes.
        seed: of all random numbers, from 0 to 2**63 - 1.
        device: where to compute.
        precision: of the search, `auto` or a key of DTYPES; verdicts are in float32.
        batch_size: images that an attack gets at once; None for the default. It is part of the run's identity only
            where an attack's random numbers depend on it (AutoAttack's and foolbox's do, ours do not).
        curve: also compute robust accuracy at smaller eps.
        audit: run full AutoAttack on so many robust images.
        strictness: the largest share of the images that a suite with arms may leave in doubt, by its upper bound;
            part of the identity.
        limits: when to stop early.
        workers: processes that share the attacks.
        ray: address of a Ray cluster on which the workers run.
        deterministic: use deterministic kernels only.
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
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Check that the values fit each other; the options of a verb check the range of each by itself."""
        if self.precision not in ("auto", *DTYPES):
            raise UsageError(f"precision {self.precision!r}: write auto, {', '.join(DTYPES)}.")
        if self.precision == "tf32" and not ComputeDevice(self.device).has_tf32:
            raise UsageError(f"precision 'tf32' needs an NVIDIA GPU of 2020 or later, not {self.device}.")
        if not len(self.samples):
            raise UsageError(f"{self.samples.name} holds no images.")
        if self.threat.minimal:
            self._check_minimum_norm()
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

    def _check_minimum_norm(self) -> None:
        """Raise UsageError for an option that needs an eps."""
        options = {
            "curve": (self.curve, "gives robust accuracy at every eps already"),
            "audit": (self.audit, "has no eps that AutoAttack could keep to"),
            "strictness": (self.strictness is not None, "has no eps that AutoAttack could keep to"),
            "stop at width": (self.limits.width is not None, "gives distances, and no share to stop at"),
            f"precision {self.precision}": (self._precision != "fp32", "is searched in float32"),
        }
        for name, (given, why) in options.items():
            if given:
                raise UsageError(f"threat '{self.threat}' {why}; leave out {name}.")

    @cached_property
    def entries(self) -> list[registry.SuiteEntry]:
        """The suite's attacks, in order."""
        return registry.parse_suite(
            self.suite,
            self.threat.norm,
            minimal=self.threat.minimal,
            gradients=self.model.access == GRADIENT,
        )

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
            batch_size=self.chunk_size if coupled else None,
            strictness=self.strictness,
        )

    @property
    def chunk_size(self) -> int:
        """How many images an attack gets at once."""
        # Smaller where no image leaves a batch early: a killed run repeats a batch, and workers share batches.
        minimal = self.threat.minimal and ComputeDevice(self.device).is_cpu
        default = MINIMUM_NORM_BATCH_SIZE if minimal else BATCH_SIZE
        return min(self.batch_size or default, len(self.samples))

    @property
    def allowed_doubt(self) -> float:
        """The largest share of the images that the suite's arms may leave in doubt."""
        return STRICTNESS if self.strictness is None else self.strictness

    @cached_property
    def settings(self) -> RunSettings:
        """The settings that the run's workers share."""
        cpu = ComputeDevice(self.device).is_cpu
        slots = self.batch_size or (SLOTS_CPU if cpu else SLOTS_GPU)
        return RunSettings(
            threat=self.threat,
            suite=self.suite,
            entries=self.entries,
            seed=self.seed,
            batch_size=self.chunk_size,
            slots=slots,
            max_slots=slots if cpu or self.batch_size is not None else MAX_SLOTS_GPU,
            precision=self._precision,
            choose_precision=self.precision == "auto",
            # A strictness of 0 gives every image every attack in full.
            end_early=self.allowed_doubt > 0,
            deterministic=self.deterministic,
        )

    @property
    def _precision(self) -> str:
        return "fp32" if self.precision == "auto" else self.precision

    def run(
        self,
        out: Path | None = None,
        progress: Progress | None = None,
        pool: SharedPool | None = None,
        overwrite: bool = False,
    ) -> Report:
        """Run, or resume, or return the stored report of a finished run.

        Args:
            out: the run folder; None writes nothing.
            progress: receives events.
            pool: a pool of workers shared with other runs; None for a pool of this run's own.
            overwrite: delete the run in `out` first.

        Returns:
            The report; without `out` it holds the adversarial images.

        Raises:
            UsageError: if the folder cannot be used, or the model cannot be evaluated.
            RunError: if it fails on the way; the same call resumes.
        """
        progress = progress or Progress()
        opened = open_for_writing(out, self.spec, overwrite=overwrite, say=progress.say) if out else None
        kernels = deterministic_operations(self.deterministic, self.device)
        with opened or nullcontext(True) as writable, kernels, float32_operations("ieee"):
            store = Store(out / run_folder.UNFINISHED if out and writable else None, self.spec.run_id)
            try:
                report = self._suite_report(out, writable, progress, pool, store)
                if self.curve and report.curve is None:
                    require_writable(out, writable, "a curve")
                    report = self._with_curve(report, out, progress, store)
                if self.audit > len(report.audit.audited if report.audit else ()):
                    require_writable(out, writable, "an audit")
                    report = self._with_audit(report, out, progress, pool)
                if report.stopped is None:
                    store.clear()
                return report
            finally:
                progress.close()
                ComputeDevice(self.device).empty_cache()

    def _suite_report(
        self, out: Path | None, writable: bool, progress: Progress, pool: SharedPool | None, store: Store
    ) -> Report:
        """Return the report of the suite at the threat's eps, stored or new, without a curve or an audit."""
        if out and (out / run_folder.REPORT).exists():
            if run_folder.read_report(out).stopped is None or not writable:
                return self._stored(out, progress)
        with Ledger.open(out and out / run_folder.LEDGER, self.spec.run_id) as ledger:
            runner, mode_flags = self._run_attacks(ledger, progress, pool, store)
            strictness = self.rounds(runner).doubt(runner.results.scope)
            return write_report(ledger, runner, self.spec, strictness, mode_flags, out)

    def _stored(self, out: Path, progress: Progress) -> Report:
        report = run_folder.read_report(out)
        if broken := run_folder.broken_seals(out, report):
            raise RunError(f"{broken[0]} See: robustkit verify {out}")
        what = ("its curve is searched now",) if self.curve and report.curve is None else ()
        progress.say(finished_before(report.run_id, *what))
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

    def _with_audit(self, report: Report, out: Path | None, progress: Progress, pool: SharedPool | None) -> Report:
        robust_positions = np.array([verdict.index for verdict in report.verdicts if verdict.robust], np.int64)
        margins = np.array([verdict.margin for verdict in report.verdicts if verdict.robust])
        chosen = robust_positions[spread(margins, shuffled(len(robust_positions), self.seed), self.audit)]
        found = None
        if len(chosen):
            subset = self.samples.pick(chosen)
            folder = out and subfolder(out, run_folder.AUDIT)
            found = replace(self, samples=subset, suite=AUDIT_SUITE, curve=False, audit=0, limits=Limits()).run(
                folder, progress, pool
            )
        broke = [int(chosen[v.index]) for v in found.verdicts if not v.robust] if found else []
        cost = found.cost if found else Cost(0, 0, 0.0)
        report = report.with_audit(Audit.of(chosen.tolist(), broke, len(robust_positions), report.n, cost))
        if out:
            (out / run_folder.PAGE).unlink(missing_ok=True)
            run_folder.write_report(out, report)
            shutil.rmtree(out / run_folder.AUDIT, ignore_errors=True)
        return report

    def _run_attacks(
        self, ledger: Ledger, progress: Progress, pool: SharedPool | None, store: Store
    ) -> tuple[BlockRunner, list[Flag]]:
        """Return the runner once all attacks are done, and flags of the model's training mode."""
        results = RunResults.of(len(self.samples), self.spec.suite)
        ledger.require(len(self.samples), self.samples.images([0]).nbytes, len(self.spec.suite))
        record_part(ledger)
        for chunk in ledger.chunks():
            results.add(chunk)
        if results.chunks:
            progress.say(
                f"resuming {self.spec.run_id}: {len(results.chunks)} chunks done, "
                f"{results.settled} of {results.n} images settled"
            )
        alone = pool is None and self.ray is None and self.workers in (None, 1)
        with evaluation_mode(self.model) as was_training, ExitStack() as stack:
            if not alone and pool is None:
                # Workers start while the model is measured here.
                pool = stack.enter_context(shared_pool(self.workers, self.ray, progress.say))
            model = InstrumentedModel(self.model, self.device, self._precision)
            runner_class = Scheduler if pool else BlockRunner
            runner = runner_class(self.samples, self.settings, ledger, results, model, progress, store=store)
            runner.prepare()
            check_not_random(self.threat, random=model.random)
            if pool is not None and isinstance(runner, Scheduler):
                stack.enter_context(runner.using(pool))
            stack.enter_context(threads(model.threads))
            run_images(runner, self.limits, self.rounds(runner))
            return runner, training_mode(was_training, training_count(self.model))

    def rounds(self, runner: BlockRunner) -> Rounds:
        """Return what gives the suite's arms to images."""
        # In the main process the runner's sink is the ledger itself.
        ledger = cast("Ledger", runner.ledger)
        return Rounds(runner, ledger, self.allowed_doubt)
