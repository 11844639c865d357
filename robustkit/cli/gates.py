"""When `robustkit evaluate` exits with 1: the robust accuracy is too low, or flags are raised."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.checks.flag_codes import CODES
from robustkit.cli.command import Command
from robustkit.core.errors import UsageError, did_you_mean, one_line

if TYPE_CHECKING:
    from robustkit.core.flags import Flag
    from robustkit.runs.report_parts import Rate

ON_FLAG = "--fail-on-flag"
ANY = "any"


class GatedCommand(Command):
    """A command whose `--fail-on-flag` may have no value, whatever word follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give each `--fail-on-flag` without `=` a value: the code that follows, or `any`."""
        words, given = [], list(args)
        while given:
            word = given.pop(0)
            if word == ON_FLAG:
                word += f"={given.pop(0) if given and _is_code(given[0]) else ANY}"
            words.append(word)
        return super().parse_args(ctx, words)


def _is_code(word: str) -> bool:
    """Return whether a word is a list of codes and not a model, which has other characters or is a folder."""
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9,_-]*", word)) and not Path(word).exists()


@dataclass(frozen=True)
class Gate:
    """Conditions on the result of an evaluation.

    Attributes:
        fail_under: the lowest robust accuracy that passes, from 0 to 1; None for no limit.
        confident: compare the lower end of the 95 % interval instead of the value.
        fail_on: codes of flags that fail, or `any` for every flag of level warning or error.
    """

    fail_under: float | None = None
    confident: bool = False
    fail_on: tuple[str, ...] = ()

    @classmethod
    def read(cls, fail_under: float | None, confident: bool, fail_on: Sequence[str]) -> Gate:
        """Return the gate for the options of a command.

        Raises:
            UsageError: a code is unknown, or `confident` is set without `fail_under`.
        """
        if confident and fail_under is None:
            raise UsageError("--confident needs --fail-under; use e.g. --fail-under 0.45 --confident.")
        codes = [code.strip() for text in fail_on for code in text.split(",")]
        for code in codes:
            if code not in (ANY, *CODES):
                raise did_you_mean("flag", code, CODES, (ANY,))
        return cls(fail_under, confident, tuple(codes))

    @property
    def is_set(self) -> bool:
        """Whether there is any condition."""
        return self.fail_under is not None or bool(self.fail_on)

    def reasons(self, rate: Rate, flags: Sequence[Flag]) -> list[str]:
        """Return why a robust accuracy does not pass, one sentence per reason."""
        raised, found = _raised(flags), []
        if self.fail_under is not None and self._compared(rate) < self.fail_under:
            what = "the 95 % interval of robust accuracy begins at" if self.confident else "robust accuracy"
            raised_text = f"; flags raised: {', '.join(raised)}" if raised else ""
            share, least = _percentages(self._compared(rate), self.fail_under)
            middle = ", which is below" if self.confident else " is below"
            found.append(f"{what} {share}{middle} --fail-under {least}{raised_text}")
        codes = {flag.code for flag in flags if flag.raised}
        failing = raised if ANY in self.fail_on else [code for code in self.fail_on if code in codes]
        found += [f"flag {code} is raised, and {ON_FLAG} was given" for code in dict.fromkeys(failing)]
        return found

    def remark(self, rate: Rate, flags: Sequence[Flag]) -> str:
        """Return a remark on a robust accuracy that passes although flags warn; empty if none does."""
        raised = _raised(flags)
        if self.fail_under is None or not raised:
            return ""
        share, least = 100 * rate.value, 100 * self.fail_under
        return (
            f"robust accuracy {share:.1f} % passes --fail-under {least:.1f} %, but flags put it in doubt: "
            f"{', '.join(raised)}; add {ON_FLAG} to fail on them"
        )

    def check(self, found: Sequence[tuple[str, Rate, Sequence[Flag]]]) -> int:
        """Print to stderr which results do not pass, or pass with warnings; return 1 if any does not pass."""
        code = 0
        for name, rate, flags in found:
            reasons = self.reasons(rate, flags)
            for text in reasons or filter(None, [self.remark(rate, flags)]):
                print(one_line(f"{name}: {text}" if name else text), file=sys.stderr)
            code = code or int(bool(reasons))
        return code

    def record(self, found: Sequence[tuple[str, Rate, Sequence[Flag]]]) -> dict[str, Any]:
        """Return the outcome that `--json` prints under `gate`; empty if there is no condition."""
        if not self.is_set:
            return {}
        reasons = [
            f"{name}: {text}" if name else text
            for name, rate, flags in found
            for text in self.reasons(rate, flags)
        ]
        return {"gate": {"passed": not reasons, "reasons": reasons}}

    def _compared(self, rate: Rate) -> float:
        return rate.low if self.confident else rate.value


def _raised(flags: Sequence[Flag]) -> list[str]:
    return [flag.code for flag in flags if flag.warns]


def _percentages(share: float, least: float) -> tuple[str, str]:
    """Return two different shares in percent, with as many digits as needed to distinguish them."""
    for digits in range(1, 6):
        texts = f"{100 * share:.{digits}f} %", f"{100 * least:.{digits}f} %"
        if texts[0] != texts[1]:
            break
    return texts
