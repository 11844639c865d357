"""Hostile strings and nearly correct strings for fuzzing."""

from __future__ import annotations

from hypothesis import strategies as st

HOSTILE = (
    *("", " ", "\t", "\0", "a\0b", "\n", "a\nb", "\x1b[31mred", "\udcff", "\u202e", "x" * 300, "9" * 5000),
    *("-1", "0", "-0", "1", "2", "nan", "inf", "-inf", "1e999", "-1e999", "1e-400", "1e999999999", "1/0", "0/0"),
    *("1/" + "9" * 5000, "0x10", "1_0", "\u0663", "\u00bd", "1,2", "1;2", "true", "none", "None", "null", "auto"),
    *("~", "~nobody-of-this-name/x", ".", "..", "missing/file", "file.txt", "-", "--", "--help", "'", '"', "\\"),
    *("[", "]", "(", ")", "((((((", "[[[[", "{", "}", "{0..99999999999}", ":", "::", "@", "#", "?", "&", "=", "+"),
    *(f"{2**63}", f"{2**64}", f"{-(2**63)}", "1e5", "99999999999", "%s", "{}", "$HOME", "*", "é", "\U0001f600"),
)
PIECES = (*HOSTILE, *",;:@#?&=+()[]{}/.-~0123456789eE", "nan", "inf", "-1", "0", "1e9", "x")

# What is right, by the name of an option or argument; small, so that it is done at once.
VALID = {
    "model": ("robustkit:digits-cnn", "robustkit:digits-cnn?defense=jpeg:75", "robustkit:digits-cnn?mean=0&std=1"),
    "arch": ("robustkit:digits-cnn",),
    "data": ("digits:test", "d.npz", "folder:pictures", "webdataset:missing/{00..03}.tar"),
    "threat": ("linf:0.1", "l2:1/2", "l1:3", "linf:curve"),
    "suite": ("fgsm", "pgd(steps=2),fgsm", "square(queries=3)", "pgd(steps=1,step_size=1/4,restarts=1,loss=ce)"),
    "attack": ("mi-fgsm(steps=2)", "fgsm+di", "mi-fgsm(steps=1)+vmi(copies=1)", "auto"),
    "device": ("cpu", "auto"),
    "precision": ("fp32", "auto"),
    "batch_size": ("auto", "2"),
    "time_limit": ("1s", "0.5m"),
    "weights": ("1",),
    "combine": ("consensus", "logits"),
    "targeted": ("next", "random"),
    "budgets": ("1,2",),
    "aggregator": ("crossmax:2", "vote"),
    "augment": ("none", "crop"),
    "parallel": ("data",),
    "what": ("attacks", "pgd"),
}


@st.composite
def nearly(draw: st.DrawFn, right: str) -> str:
    """A right string with up to three changes."""
    text = right
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(text)))
        to = draw(st.integers(position, min(len(text), position + 8)))
        text = text[:position] + draw(st.sampled_from(PIECES)) + text[to if draw(st.booleans()) else position :]
    return text


def strings(name: str) -> st.SearchStrategy[str]:
    """Strings for an option or argument of this name."""
    right = VALID.get(name, ("1",))
    return st.one_of(st.sampled_from(right).flatmap(nearly), st.sampled_from(HOSTILE), st.sampled_from(right))
