"""The checks of a run for the head of its page: those that raised a flag, passed, or were not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robustkit.core.flags import LEVELS, OK, Flag, passed, unmeasured
from robustkit.reporting.terminal.evaluation import has_autoattack, percent
from robustkit.runs.evaluation_record import AUDIT_BROKE, Report

# The claim that each check supports when it raises nothing, in the page's order. I1 to I6: Pintor et al. 2022.
CLAIMS = {
    "attack-not-alive": "The attack finds planted adversarial images",
    "zero-gradient": "The model has gradients (I1)",
    "wrong-gradient": "Gradients agree with finite differences",
    "unstable-loss": "The loss changes little nearby (I2)",
    "silent-success": "No success during a search is missed (I3)",
    "incomplete-optimisation": "Attacks converge before they end (I4)",
    "not-transferred": "Successes hold on the model itself (I5)",
    "survives-any-eps": "Unbounded attacks fool every image (I6)",
    "not-converged": "Twice the steps find little more",
    "score-beats-gradient": "Score-based attacks find little more",
    "masked-gradient": "Surrogate gradients find little more",
    AUDIT_BROKE: "AutoAttack finds little more",
    "randomised": "Outputs are deterministic",
    "batch-dependent": "Outputs do not depend on other images",
    "test-time-optimisation": "Nothing is optimised at test time",
}
# Checks that need an eps; a search for minimum norms has no such stages and no audit.
NEEDS_EPS = {"not-transferred", "score-beats-gradient", "masked-gradient", AUDIT_BROKE}
NOT_RECORDED = ("this run did not record it", "run it again in another folder")


def rows(report: Report) -> list[tuple[str, Flag]]:
    """Return claim and result of every check that raised no flag; those that were measured come first."""
    raised = {flag.code for flag in report.flags if flag.raised}
    results = {flag.code: flag for flag in [*_run_results(report), *report.passed]}
    left_out = raised | (NEEDS_EPS if report.minimum else set())
    claims = {code: claim for code, claim in CLAIMS.items() if code not in left_out}
    found = [(claim, results.get(code, unmeasured(code, *NOT_RECORDED))) for code, claim in claims.items()]
    return sorted(found, key=lambda row: row[1].level != OK)


def flags(report: Report) -> list[Flag]:
    """Return the flags that were raised, the worst first."""
    order = {level: -number for number, level in enumerate(LEVELS)}
    return sorted(report.flags, key=lambda flag: order[flag.level])


def _run_results(report: Report) -> Sequence[Flag]:
    """Return the results that the record itself holds: of claimed successes and of an audit."""
    refused, audit = report.environment.get("claims_refused"), report.audit
    claims = passed(
        "not-transferred",
        refused,
        "points fooled the model during the search but not when evaluated again in float32, and do not count",
    )
    if report.draws:
        claims = replace(
            claims,
            value=round(report.draws.gap, 4),
            meaning=f"of accuracy, {percent(report.draws.gap)}, would be lost if one wrong draw during the search "
            "counted as a success; only fresh draws count",
        )
    elif refused is None:
        claims = unmeasured(
            "not-transferred", "every success is verified on the model, but refused claims were not counted", ""
        )
    if audit is None and (bound := report.strictness) and has_autoattack(report.spec):
        at_most = "is the most images that AutoAttack's attacks would also fool, with a probability of 95 %"
        return [claims, passed(AUDIT_BROKE, bound.images, at_most)]
    if audit is None:
        return [claims, unmeasured(AUDIT_BROKE, "AutoAttack was not run on any robust image", "add --audit 50")]
    fooled = f"of {len(audit.audited)} robust images were fooled by AutoAttack"
    return [claims, passed(AUDIT_BROKE, len(audit.broke), fooled)]
