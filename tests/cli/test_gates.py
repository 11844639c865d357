"""Gates: which results make an evaluation exit with 1, and which message is printed."""

from __future__ import annotations

from typing import Any

import pytest

from robustkit.cli import run
from robustkit.cli.gates import Gate
from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.runs.report_parts import Rate

RATE = Rate(0.9, 0.78, 0.95, 40)
WARNING = Flag("zero-gradient", "warning", 7, "the gradient is zero", "run an attack without gradients")
ERROR = Flag("attack-not-alive", "error", 0, "planted adversarials are not found", "look at the attack")
INFO = Flag("few-classes", "info", 2, "there are few classes", "nothing to do")


@pytest.mark.parametrize(
    ("gate", "flags", "reasons"),
    [
        (Gate(), [WARNING], []),
        (Gate(0.9), [], []),
        (Gate(0.95), [], ["robust accuracy 90.0 % is below --fail-under 95.0 %"]),
        (
            Gate(0.95),
            [WARNING, INFO, ERROR],
            ["robust accuracy 90.0 % is below --fail-under 95.0 %; flags raised: zero-gradient, attack-not-alive"],
        ),
        (Gate(0.90001), [], ["robust accuracy 90.000 % is below --fail-under 90.001 %"]),
        (Gate(0.78, confident=True), [], []),
        (
            Gate(0.8, confident=True),
            [],
            ["the 95 % interval of robust accuracy begins at 78.0 %, which is below --fail-under 80.0 %"],
        ),
        (Gate(fail_on=("any",)), [INFO], []),
        (
            Gate(0.5, fail_on=("any",)),
            [WARNING, ERROR],
            [
                f"flag {code} is raised, and --fail-on-flag was given"
                for code in ("zero-gradient", "attack-not-alive")
            ],
        ),
        (Gate(fail_on=("no-gradient",)), [WARNING], []),
        (Gate(fail_on=("few-classes",)), [INFO], ["flag few-classes is raised, and --fail-on-flag was given"]),
    ],
)
def test_results_that_pass_and_fail_a_gate(
    gate: Gate, flags: list[Flag], reasons: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.reasons(RATE, flags) == reasons
    assert gate.check([("net", RATE, flags), ("other", RATE, [])]) in (0, 1)
    assert gate.check([("net", RATE, flags)]) == int(bool(reasons))
    record = gate.record([("net", RATE, flags)])
    gated = gate.fail_under is not None or gate.fail_on
    assert record == (
        {"gate": {"passed": not reasons, "reasons": [f"net: {one}" for one in reasons]}} if gated else {}
    )


def test_a_pass_with_warnings_has_a_remark(capsys: pytest.CaptureFixture[str]) -> None:
    assert Gate(0.8).check([("", RATE, [WARNING, ERROR])]) == 0
    printed = capsys.readouterr().err
    assert printed == (
        "robust accuracy 90.0 % passes --fail-under 80.0 %, but flags put it in doubt: zero-gradient, "
        "attack-not-alive; add --fail-on-flag to fail on them\n"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((None, True, ()), "--confident needs --fail-under"),
        ((None, False, ("zero-gradeint",)), "no flag 'zero-gradeint'. Did you mean 'zero-gradient'?"),
        ((None, False, ("no-gradient,",)), "no flag ''"),
    ],
)
def test_invalid_gates_are_refused(options: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        Gate.read(*options)
    assert str(error.value).startswith(sentence)


@pytest.fixture
def captured_flags(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The flags that the verb gets, instead of running it."""
    found: dict[str, Any] = {}

    def work(flags: Any) -> int:
        found.update(vars(flags))
        return 0

    monkeypatch.setattr("robustkit.cli.verbs.evaluate.evaluate", work)
    return found


@pytest.mark.parametrize(
    ("words", "codes", "model"),
    [
        ("--fail-on-flag robustkit:digits-cnn", ["any"], "robustkit:digits-cnn"),
        ("robustkit:digits-cnn --fail-on-flag", ["any"], "robustkit:digits-cnn"),
        ("robustkit:digits-cnn --fail-on-flag zero-gradient", ["zero-gradient"], "robustkit:digits-cnn"),
        ("--fail-on-flag zero-gradient robustkit:digits-cnn", ["zero-gradient"], "robustkit:digits-cnn"),
        ("--fail-on-flag zero_gradient robustkit:digits-cnn", ["zero_gradient"], "robustkit:digits-cnn"),
        ("--fail-on-flag=no-gradient --fail-on-flag a,b", ["no-gradient", "a,b"], None),
        ("--fail-on-flag --limit 3", ["any"], None),
        ("--confident --fail-on-flag runs/net/", ["any"], "runs/net/"),
        ("--fail-on-flag net", ["any"], "net"),
        ("--fail-under 0.8", [], None),
    ],
)
def test_fail_on_flag_needs_no_value(
    words: str,
    codes: list[str],
    model: str | None,
    captured_flags: dict[str, Any],
    tmp_path: Any,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net").mkdir()  # a run folder whose name could be a code's
    assert run(["evaluate", *words.split()]) == 0
    assert list(captured_flags["fail_on_flag"]) == codes
    assert captured_flags["model"] == model
    assert captured_flags["confident"] == ("--confident" in words)
