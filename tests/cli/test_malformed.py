"""Bad input: each case gives one sentence on stderr, the right exit code and no traceback."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustkit.cli import run
from robustkit.models import load_model

NETS = str(Path(__file__).parents[1] / "nets.py")
MARKER = "code_ran.txt"


class Malice:
    """A pickle that would leave a file behind if it were executed."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {MARKER}",)


def npz(path: str, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return path


def digits(n: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.random((n, 1, 8, 8), dtype=np.float32), "y": np.arange(n) % 10}


def with_(**changes: np.ndarray) -> Callable[[], list[str]]:
    return lambda: ["--data", npz("d.npz", **{**digits(), **changes}), "--threat", "linf:0.1"]


def raw(name: str, content: bytes, *before: str, flag: str = "--data") -> Callable[[], list[str]]:
    def make() -> list[str]:
        Path(name).write_bytes(content)
        return [*before, flag, name, "--threat", "linf:0.1"]

    return make


def truncated() -> list[str]:
    npz("t.npz", **digits())
    content = Path("t.npz").read_bytes()
    Path("t.npz").write_bytes(content[: len(content) // 2])
    return ["--data", "t.npz", "--threat", "linf:0.1"]


def npz_of_pickles() -> list[str]:
    np.savez("o.npz", x=np.array([Malice()] * 3, dtype=object), y=np.arange(3))
    return ["--data", "o.npz", "--threat", "linf:0.1"]


def without(name: str) -> Callable[[], list[str]]:
    def make() -> list[str]:
        npz("w.npz", **{key: value for key, value in digits().items() if key != name})
        return ["--data", "w.npz", "--threat", "linf:0.1"]

    return make


def weights(change: Callable[[dict[str, torch.Tensor]], object], name: str = "w.safetensors") -> list[str]:
    state = {key: value.clone() for key, value in load_model("robustkit:digits-cnn").net.state_dict().items()}
    change(state)
    save_file(state, name)
    return [f"robustkit:digits-cnn@{name}", "--data", "digits:test"]


def nan_weights() -> list[str]:
    return weights(lambda state: state["conv1.weight"].view(-1)[3].fill_(torch.nan))


def missing_key() -> list[str]:
    return weights(lambda state: state.pop("conv2.bias"))


def wrong_shape() -> list[str]:
    return weights(lambda state: state.update({"conv2.weight": torch.zeros(2, 2)}))


def no_tensors() -> list[str]:
    return weights(lambda state: state.clear())


def malicious_weights() -> list[str]:
    torch.save({"state_dict": {"conv1.weight": Malice()}}, "evil.pt")
    return ["robustkit:digits-cnn@evil.pt", "--data", "digits:test"]


def malicious_pickle() -> list[str]:
    Path("evil.pth").write_bytes(pickle.dumps(Malice()))
    return ["robustkit:digits-cnn@evil.pth", "--data", "digits:test"]


def truncated_weights() -> list[str]:
    weights(lambda state: None)
    content = Path("w.safetensors").read_bytes()
    Path("w.safetensors").write_bytes(content[:-100])
    return ["robustkit:digits-cnn@w.safetensors", "--data", "digits:test"]


def fault(name: str) -> Callable[[], list[str]]:
    return lambda: [f"{NETS}:faulty?fault={name}", "--data", npz("d.npz", **digits()), "--threat", "linf:0.1"]


def file_as_out() -> list[str]:
    Path("taken").write_text("not a folder")
    return ["--limit", "4", "--out", "taken"]


def foreign_folder() -> list[str]:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("precious")
    return ["--limit", "4", "--out", "mine"]


def damaged_spec() -> list[str]:
    Path("run").mkdir()
    Path("run/spec.json").write_text("{")
    return ["--limit", "4", "--out", "run"]


def zip_without_arrays() -> list[str]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return raw("z.npz", buffer.getvalue())()


def args(*words: str) -> Callable[[], list[str]]:
    return lambda: list(words)


SMALL = ("--limit", "4")

# what is wrong: (arguments, words that the sentence must have, exit code)
CASES: dict[str, tuple[Callable[[], list[str]], tuple[str, ...], int]] = {
    "ray absent": (args(*SMALL, "--ray", "127.0.0.1:9"), ("Ray",), 2),
    "data absent": (args("--data", "nowhere.npz", "--threat", "linf:0.1"), ("nowhere.npz",), 2),
    "data empty file": (raw("e.npz", b""), ("e.npz", "empty"), 2),
    "data no zip": (raw("n.npz", b"hello" * 100), ("n.npz",), 2),
    "data truncated": (truncated, ("t.npz",), 2),
    "data zip of text": (zip_without_arrays, ("z.npz",), 2),
    "data pickles": (npz_of_pickles, ("o.npz", "object"), 2),
    "data no x": (without("x"), ("'x'",), 2),
    "data no y": (without("y"), ("'y'",), 2),
    "data no images": (with_(x=np.zeros((0, 1, 8, 8), np.float32), y=np.zeros(0, np.int64)), ("d.npz",), 2),
    "data 3 axes": (with_(x=np.zeros((8, 8, 8), np.float32)), ("(8, 8, 8)",), 2),
    "data more labels": (with_(y=np.zeros(9, np.int64)), ("9", "8"), 2),
    "data labels float": (with_(y=np.full(8, 0.5, np.float32)), ("position 0 is 0.5",), 2),
    "data labels negative": (with_(y=np.full(8, -1)), ("-1",), 2),
    "data labels 2-D": (with_(y=np.zeros((8, 10), np.int64)), ("(8, 10)",), 2),
    "data label too large": (with_(y=np.full(8, 11)), ("11", "10 classes"), 2),
    "data above 1": (with_(x=np.full((8, 1, 8, 8), 2.0, np.float32)), ("[0, 1]", "2"), 2),
    "data NaN": (with_(x=np.full((8, 1, 8, 8), np.nan, np.float32)), ("NaN",), 2),
    "data channels": (with_(x=np.zeros((8, 3, 8, 8), np.float32)), ("3",), 2),
    "data unknown": (args("--data", "cifar11"), ("cifar11", "Did you mean 'cifar10'"), 2),
    "data split": (args("--data", "digits:tset"), ("tset", "Did you mean 'test'"), 2),
    "data not here": (args("--data", "cifar10:test", "--data-root", "none"), ("none", "--download"), 2),
    "folder absent": (args("--data", "folder:none", "--threat", "linf:0.1"), ("none",), 2),
    "limit zero": (args("--limit", "0"), ("--limit must be at least 1, got 0.",), 2),
    "limit too large": (args("--data", "digits:test", "--limit", "5000"), ("5000", "359"), 2),
    "limit word": (args("--limit", "many"), ("--limit must be a whole number, got 'many'",), 2),
    "no data for model": (args("robustkit:cifar-resnet20"), ("--data",), 2),
    "no usual threat": (lambda: ["--data", npz("d.npz", **digits())], ("--threat",), 2),
    "threat norm": (args(*SMALL, "--threat", "l3:1"), ("l3:1", "linf:8/255"), 2),
    "threat no number": (args(*SMALL, "--threat", "linf:eight"), ("eight",), 2),
    "threat no colon": (args(*SMALL, "--threat", "linf"), ("NORM:EPS",), 2),
    "threat divided by 0": (args(*SMALL, "--threat", "linf:8/0"), ("8/0",), 2),
    "threat negative": (args(*SMALL, "--threat", "l2:-1"), ("negative",), 2),
    "threat huge linf": (args(*SMALL, "--threat", "linf:8"), ("linf:8/255",), 2),
    "threat huge l2": (args(*SMALL, "--threat", "l2:1000"), ("1000", "8"), 2),
    "threat nan": (args(*SMALL, "--threat", "linf:nan"), ("nan",), 2),
    "threat inf": (args(*SMALL, "--threat", "l2:inf"), ("inf",), 2),
    "suite unknown": (args(*SMALL, "--suite", "autoatack"), ("autoatack", "Did you mean 'autoattack'"), 2),
    "suite attack unknown": (args(*SMALL, "--suite", "pdg"), ("pdg", "Did you mean 'pgd'"), 2),
    "suite member unknown": (
        args(*SMALL, "--suite", "autoattack:apgd-c"),
        ("Did you mean 'autoattack:apgd-ce'",),
        2,
    ),
    "suite field unknown": (args(*SMALL, "--suite", "pgd(step=3)"), ("step", "steps"), 2),
    "suite field type": (args(*SMALL, "--suite", "pgd(steps=many)"), ("steps", "many"), 2),
    "suite steps zero": (args(*SMALL, "--suite", "pgd(steps=0)"), ("steps", "at least 1"), 2),
    "suite bracket": (args(*SMALL, "--suite", "pgd(steps=3"), ("pgd(steps=3",), 2),
    "suite empty": (args(*SMALL, "--suite", ""), ("suite",), 2),
    "suite empty part": (args(*SMALL, "--suite", "pgd,,fgsm"), ("commas",), 2),
    "suite loss unknown": (args(*SMALL, "--suite", "pgd(loss=cee)"), ("cee", "Did you mean 'ce'"), 2),
    "foolbox unknown": (args(*SMALL, "--suite", "foolbox:LinfPGDD"), ("Did you mean 'LinfPGD'",), 2),
    "foolbox field": (args(*SMALL, "--suite", "foolbox:LinfPGD(stepps=3)"), ("stepps", "steps"), 2),
    "foolbox other norm": (args(*SMALL, "--suite", "foolbox:L2PGD"), ("l2", "linf"), 2),
    "seed negative": (args(*SMALL, "--seed", "-1"), ("--seed must be at least 0, got -1.",), 2),
    "batch size zero": (args(*SMALL, "--batch-size", "0"), ("--batch-size must be at least 1, got 0.",), 2),
    "batch size word": (args(*SMALL, "--batch-size", "big"), ("big",), 2),
    "precision unknown": (args(*SMALL, "--precision", "fp8"), ("fp8",), 2),
    "device unknown": (args(*SMALL, "--device", "gpu"), ("gpu",), 2),
    "device not here": (args(*SMALL, "--device", "cuda:99"), ("cuda:99",), 2),
    "option unknown": (args("--treat", "linf:0.1"), ("--treat",), 2),
    "model unknown": (args("robustkit:digits-cn", "--data", "digits"), ("Did you mean 'digits-cnn'",), 2),
    "model no kind": (args("resnet50", "--data", "digits"), ("resnet50",), 2),
    "model module absent": (args("nowhere.nets:f", "--data", "digits"), ("nowhere",), 2),
    "model file absent": (args("./nowhere.py:f", "--data", "digits"), ("nowhere.py",), 2),
    "model factory absent": (args(f"{NETS}:smal", "--data", "digits"), ("smal",), 2),
    "model field unknown": (
        args("robustkit:digits-cnn?num_clases=3", "--data", "digits"),
        ("num_clases", "num_classes"),
        2,
    ),
    "model mean word": (args("robustkit:digits-cnn?mean=a,b", "--data", "digits"), ("mean",), 2),
    **{
        f"defense {text!r}": (args(f"robustkit:digits-cnn?defense={text}"), words, 2)
        for text, words in {
            "jpg": ("'jpg'", "Did you mean 'jpeg'"),
            "": ("no defense ''", "bit-depth, jpeg"),
            "jpeg:75+": ("no defense ''",),
            "jpeg:0": ("quality=0", "1 to 100"),
            "jpeg:101": ("quality=101", "1 to 100"),
            "jpeg:7.5": ("'7.5'", "whole number"),
            "jpeg:": ("quality=''", "whole number"),
            "jpeg:75,2": ("2 values", "jpeg:QUALITY"),
            "bit-depth:0": ("bits=0", "1 to 8"),
            "bit-depth:9": ("bits=9", "1 to 8"),
            "resize-pad:0.9": ("ratio=0.9", "1 to 2"),
            "resize-pad:nan": ("'nan'", "a number"),
            "smoothing:-0.25": ("sigma=-0.25", "at least 0"),
            "smoothing:inf": ("'inf'", "a number"),
            "smoothing:0.25,0": ("copies=0", "from 1 to 10000"),
            "smoothing:0.25;10": ("'0.25;10'", "a number"),
        }.items()
    },
    "defense of 2 channels": (
        lambda: [
            f"{NETS}:small?channels=2&defense=jpeg",
            *with_(x=np.zeros((8, 2, 8, 8), np.float32))(),
        ],
        ("1 (grey) or 3 (RGB) channels, got 2",),
        2,
    ),
    "model timm unknown": (args("timm:resnet5000", "--data", "digits"), ("resnet5000",), 2),
    "weights absent": (args("robustkit:digits-cnn@none.safetensors", "--data", "digits"), ("none",), 2),
    "weights suffix": (raw("w.bin", b"1234", "robustkit:digits-cnn@w.bin"), ("w.bin",), 2),
    "weights truncated": (truncated_weights, ("w.safetensors",), 2),
    "weights NaN": (nan_weights, ("conv1.weight", "NaN"), 2),
    "weights key": (missing_key, ("conv2.bias",), 2),
    "weights shape": (wrong_shape, ("conv2.weight",), 2),
    "weights none": (no_tensors, ("w.safetensors",), 2),
    "weights with code": (malicious_weights, ("evil.pt",), 2),
    "weights pickle": (malicious_pickle, ("evil.pth",), 2),
    "logits NaN for some": (fault("nan-some"), ("NaN", "of 8"), 3),
    "logits infinite": (fault("inf"), ("infinite", "8 of 8"), 3),
    "logits one class": (fault("one-class"), ("1",), 2),
    "logits 1-D": (fault("flat"), ("(1,)",), 2),
    "logits no tensor": (fault("text"), ("str",), 2),
    "model raises": (fault("raises"), ("this net has a bug",), 2),
    "out is a file": (file_as_out, ("taken",), 2),
    "out holds other files": (foreign_folder, ("thesis.tex",), 2),
    "out has a damaged spec": (damaged_spec, ("spec.json",), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, words, code = CASES[case]
    assert run(["evaluate", *make()]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert not Path(MARKER).exists()


def test_there_are_at_least_40_cases() -> None:
    assert len(CASES) >= 40


ONE, TWO = (f"{NETS}:small?channels=1&seed={seed}" for seed in (1, 2))
FEW = f"{NETS}:small?channels=1&classes=12"
COLOUR = f"{NETS}:small?channels=3"
DIGITS = ("--data", "digits:test", "--limit", "4")


def crafted() -> list[str]:
    assert run(["craft", "--limit", "4", "--attack", "fgsm", "--out", "c"]) == 0
    Path("c/transfer.json").write_text('{"format": 1}')
    return ["transfer", "c"]


CRAFT_CASES: dict[str, tuple[Callable[[], list[str]], tuple[str, ...]]] = {
    "classes": (args("craft", "--surrogate", ONE, "--surrogate", FEW, *DIGITS), ("10", "12", "same classes")),
    "channels": (args("craft", "--surrogate", ONE, "--surrogate", COLOUR, *DIGITS), ("does not take images",)),
    "weights absent": (
        args("craft", "--surrogate", ONE, "--surrogate", "robustkit:digits-cnn@none.safetensors", *DIGITS),
        ("none.safetensors",),
    ),
    "no gradient": (
        args("craft", "--surrogate", ONE, "--surrogate", f"{ONE}&defense=jpeg:75", *DIGITS),
        ("has no gradient", "as a target"),
    ),
    "weights in the query": (args("craft", "--surrogate", f"{ONE}@w.pt", *DIGITS), ("@w.pt in front",)),
    "twice": (args("craft", "--surrogate", ONE, "--surrogate", ONE, *DIGITS), ("given twice", "--weights")),
    "no data": (args("craft", "--surrogate", ONE), ("--data",)),
    "NaN": (args("craft", "--surrogate", f"{NETS}:faulty?fault=inf", *DIGITS), ("infinite",)),
    "raises": (args("craft", "--surrogate", f"{NETS}:faulty?fault=raises", *DIGITS), ("this net has a bug",)),
    "target classes": (args("craft", "--surrogate", ONE, "--target", FEW, *DIGITS), ("target", "12 classes")),
    "combine": (args("craft", "--limit", "4", "--combine", "logit"), ("Did you mean 'logits'",)),
    "weights words": (args("craft", "--limit", "4", "--weights", "many"), ("many",)),
    "weights count": (args("craft", "--limit", "4", "--weights", "1,2"), ("1 surrogate",)),
    "weights zero": (args("craft", "--limit", "4", "--weights", "0"), ("above 0",)),
    "targeted": (args("craft", "--limit", "4", "--targeted", "nxt"), ("Did you mean 'next'",)),
    "attack": (args("craft", "--limit", "4", "--attack", "mi-fgms"), ("Did you mean 'mi-fgsm'",)),
    "technique": (args("craft", "--limit", "4", "--attack", "mi-fgsm+nowhere"), ("nowhere",)),
    "recipe field": (args("craft", "--limit", "4", "--attack", "auto(steps=3)"), ("takes no fields",)),
    "coupled": (args("craft", "--limit", "4", "--attack", "foolbox:LinfPGD"), ("by the batch",)),
    "attack norm": (args("craft", "--limit", "4", "--attack", "mi-fgsm", "--threat", "l1:3"), ("l1",)),
    "batch size": (
        args("craft", "--limit", "4", "--batch-size", "0"),
        ("--batch-size must be at least 1, got 0.",),
    ),
    "forecast of one": (args("craft", "--limit", "4", "--forecast"), ("at least two",)),
    "budgets no target": (args("craft", "--limit", "4", "--budgets", "10"), ("--target",)),
    "budgets words": (args("craft", "--limit", "4", "--target", ONE, "--budgets", "10,x"), ("10,40,100",)),
    "huge eps": (args("craft", "--limit", "4", "--threat", "l2:1000"), ("1000", "8")),
    "transfer absent": (args("transfer", "nowhere"), ("nowhere",)),
    "transfer no run": (args("transfer", "."), ("transfer.json",)),
    "transfer damaged": (crafted, ("damaged",)),
    "matrix of one": (args("matrix", "--models", ONE, *DIGITS), ("at least two",)),
    "matrix of none": (args("matrix"), ("--models",)),
    "matrix twice": (
        args("matrix", "--models", f"{ONE},{ONE}", *DIGITS),
        ("twice; give each model once.",),
    ),
    "list": (args("craft", "--surrogate", f"{ONE},{FEW}", *DIGITS), ("is a list", f"--surrogate {FEW}")),
    "targets behind one flag": (args("craft", "--target", ONE, FEW, *DIGITS), ("--target A --target B",)),
    "technique alone": (args("craft", "--limit", "4", "--attack", "vmi"), ("mi-fgsm+vmi",)),
    "budgets of one step": (
        args("craft", "--limit", "4", "--attack", "fgsm", "--target", ONE, "--budgets", "10"),
        ("fgsm has no number of steps",),
    ),
    "backwards": (args("craft", "--limit", "4", "--attack", "mi-fgsm(step_size=-1)"), ("must be above 0",)),
}


@pytest.mark.parametrize("case", CRAFT_CASES)
def test_craft_errors_are_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = CRAFT_CASES[case]
    command = make()
    capfd.readouterr()
    assert run(command) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


VERIFY_CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "absent": (("verify", "nowhere"), "nowhere"),
    "no run": (("verify", "."), "report.json"),
    "no argument": (("verify",), "DIR"),
    "unknown list": (("list", "attakcs"), "Did you mean 'attacks'"),
    "unknown name": (("list", "cwaa"), "no list or name 'cwaa'. Did you mean 'cwa'"),
    "unknown verb": (("evalute",), "evalute"),
}


@pytest.mark.parametrize("case", VERIFY_CASES)
def test_errors_of_other_verbs_are_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, word = VERIFY_CASES[case]
    assert run(list(arguments)) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert word in err


def test_unwritable_folders_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # /proc refuses new folders even to root, who may write into read-only ones.
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "--limit", "4", "--out", "/proc/robustkit/run"]) == 2
    assert "cannot write the run folder /proc/robustkit/run" in capfd.readouterr().err


def test_debug_shows_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "--limit", "4", "--threat", "l3:1", "--debug"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: threat 'l3:1'")
