"""Options of every verb, read from the command line itself, so that a new one is tried by being there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from outcome import fuzzed, outcome
from words import HOSTILE, strings

from robustkit.cli.app import app

pytestmark = pytest.mark.slow

DATA = ("--data", "d.npz", "--limit", "2", "--threat", "linf:0.1")
MODEL = "robustkit:digits-cnn"
# Of each verb a command that is right and short.
RIGHT: dict[str, tuple[str, ...]] = {
    "evaluate": (MODEL, *DATA, "--suite", "fgsm", "--no-html"),
    "plan": (MODEL, *DATA, "--suite", "fgsm", "--seconds", "0.01"),
    "craft": ("--attack", "fgsm", *DATA),
    "transfer": ("missing",),
    "matrix": ("--models", f"{MODEL},{MODEL}?defense=jpeg", "--attack", "fgsm", *DATA),
    "diversity": ("missing", *DATA),
    "verify": ("missing",),
    "report": ("missing",),
    "compare": ("missing", "missing"),
    "export": ("missing",),
    "doctor": (MODEL, *DATA),
    "corrupt": (MODEL, "--data", "d.npz", "--limit", "2", "--corruptions", "contrast"),
    "list": ("attacks",),
    "train standard": ("--data", "d.npz", "--test", "d.npz", "--epochs", "1", "--warmup", "0"),
    "train csgld": ("--data", "d.npz", "--test", "d.npz", "--epochs", "1"),
}
# They start processes, ask the network or are flags of the test itself.
APART = {"help", "download", "debug", "ray", "workers", "devices", "trust_code"}


def parameters(verb: str) -> list[Any]:
    command: Any = typer.main.get_command(app)
    for name in verb.split():
        command = command.get_command(typer.Context(command), name)
    return [one for one in command.params if one.name not in APART]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    np.savez(folder / "d.npz", x=rng.random((8, 1, 8, 8), dtype=np.float32), y=np.arange(8) % 10)
    (folder / "file.txt").write_text("text")
    return folder


@st.composite
def commands(draw: st.DrawFn, verb: str) -> list[str]:
    words = [*verb.split(), *RIGHT[verb]]
    for one in draw(st.lists(st.sampled_from(parameters(verb)), min_size=1, max_size=2)):
        option = one.opts[0]
        if getattr(one, "is_flag", False):
            words += [option]
            continue
        kind = strings(one.name) if one.type.name in ("text", "str") else st.sampled_from(HOSTILE)
        value = draw(kind)
        if not option.startswith("-"):
            words[len(verb.split())] = value
        elif draw(st.booleans()):
            words += [f"{option}={value}"]
        else:
            words += [option, value]
    return words


@pytest.mark.parametrize("verb", RIGHT)
def test_options(verb: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    @fuzzed
    @given(commands(verb))
    def try_out(command: list[str]) -> None:
        outcome(command, place)

    try_out()
