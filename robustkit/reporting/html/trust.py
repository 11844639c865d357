"""What speaks for a run's number and what against it: every check with its state, for the head of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robustkit.core.flags import LEVELS, OK, Flag, passed, unmeasured
from robustkit.reporting.terminal.evaluation import has_autoattack, percent
from robustkit.runs.evaluation_record import AUDIT_BROKE, Report

# What each check vouches for where it raises nothing, in the page's order. I1 to I6 are Pintor's indicators.
CLAIMS = {
    "attack-not-alive": "Planted adversarials are found",
    "zero-gradient": "There are gradients (I1)",
    "wrong-gradient": "They are those of the function",
    "unstable-loss": "The loss is much the same nearby (I2)",
    "silent-success": "No success is passed over (I3)",
    "incomplete-optimisation": "Attacks level off before they end (I4)",
    "not-transferred": "Successes hold on the model itself (I5)",
    "survives-any-eps": "All falls where all is allowed (I6)",
    "not-converged": "Twice the steps find no more",
    "score-beats-gradient": "Scores alone find no more",
    "masked-gradient": "Stand-ins for gradients find no more",
    AUDIT_BROKE: "Full AutoAttack finds no more",
    "randomised": "The answer is the same every time",
    "batch-dependent": "It does not depend on other images",
    "test-time-optimisation": "Nothing is optimised to get it",
}
# What is asked of attacks that keep to an eps; a search for minimum norms has no such stages, and no audit.
OF_AN_EPS = {"not-transferred", "score-beats-gradient", "masked-gradient", AUDIT_BROKE}
UNTOLD = ("this run has not written it down", "run it again in another folder")


def rows(report: Report) -> list[tuple[str, Flag]]:
    """Return claim and finding of every check that raised no flag; what was measured comes first."""
    raised = {flag.code for flag in report.flags if flag.raised}
    said = {flag.code: flag for flag in [*_of_the_run(report), *report.passed]}
    left_out = raised | (OF_AN_EPS if report.minimum else set())
    claims = {code: claim for code, claim in CLAIMS.items() if code not in left_out}
    found = [(claim, said.get(code, unmeasured(code, *UNTOLD))) for code, claim in claims.items()]
    return sorted(found, key=lambda row: row[1].level != OK)


def flags(report: Report) -> list[Flag]:
    """Return the flags that were raised, the worst first."""
    order = {level: -number for number, level in enumerate(LEVELS)}
    return sorted(report.flags, key=lambda flag: order[flag.level])


def _of_the_run(report: Report) -> Sequence[Flag]:
    """Return what the record itself says: what became of claims, and of an audit."""
    refused, audit = report.environment.get("claims_refused"), report.audit
    claims = passed(
        "not-transferred",
        refused,
        "points that had fooled the search failed on the model itself in float32, and do not count",
    )
    if report.draws:
        claims = replace(
            claims,
            value=round(report.draws.gap, 4),
            meaning=f"of accuracy, {percent(report.draws.gap)}, would be lost if one wrong draw on the way were a "
            "success; only fresh draws count",
        )
    elif refused is None:
        claims = unmeasured(
            "not-transferred", "every success is judged on the model, but claims were not counted", ""
        )
    if audit is None and (doubt := report.strictness) and has_autoattack(report.spec):
        at_most = "images at most would still fall to AutoAttack's attacks, with a probability of 95 %"
        return [claims, passed(AUDIT_BROKE, doubt.images, at_most)]
    if audit is None:
        return [claims, unmeasured(AUDIT_BROKE, "no survivor was given to AutoAttack", "add --audit 50")]
    return [claims, passed(AUDIT_BROKE, len(audit.broke), f"of {len(audit.audited)} survivors fell to AutoAttack")]
