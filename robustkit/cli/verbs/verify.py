"""`robustkit verify`: which records were checked, which are bad, which are borderline."""

from __future__ import annotations

from robustkit.api.options.runs import VerifyFlags
from robustkit.cli.output import result_console
from robustkit.core.devices import pick_device
from robustkit.engine.evaluation.verify_run import verify_run
from robustkit.reporting.quantiles import length
from robustkit.reporting.terminal.evaluation import percent


def verify(flags: VerifyFlags) -> int:
    """Run the verb; return 1 if a record is bad, else 0."""
    result = verify_run(
        flags.folder,
        model=flags.model,
        samples=flags.data,
        device=pick_device(flags.device),
        data_root=flags.data_root,
        trust_code=flags.trust_code,
    )
    report = result.report
    console = result_console()

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for sentence in result.bad:
        line(f"bad         {sentence}")
    for sentence in result.borderline:
        line(f"borderline  {sentence}")
    if result.stopped:
        line(
            "stopped     no model or data that this record names was loaded; to check its images anyway, set both "
            "--model and --data"
        )
    word = f"{len(result.bad)} bad" if result.bad else "all good"
    line(
        f"run {report.run_id}: {result.checked} adversarials checked, {word}, {len(result.borderline)} borderline"
    )
    if not result.bad:
        number = f"robust accuracy {percent(report.robust_accuracy.value)}"
        if report.minimum:
            number = f"median distance {length(report.minimum.median.value)}"
        line(
            f"{number} of {report.n} images under {report.spec.threat} is an upper bound that these records prove"
        )
    return 1 if result.bad else 0
