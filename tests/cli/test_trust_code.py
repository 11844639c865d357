"""Every verb that loads a model: code that a received file names runs with `--trust-code` only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import write_members

from robustkit import UsageError, craft, diversity, load_data, load_model, train, verify
from robustkit.cli import run
from robustkit.training.nets import net_of

CODE = """
from pathlib import Path
from robustkit.models.zoo.digits_cnn import DigitsCNN

Path(__file__).with_name("ran").touch()


def build():
    return DigitsCNN()
"""
DATA = ["--data", "digits:test", "--limit", "6", "--threat", "linf:0.1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `net.py`, which leaves a file when it is run, and `received`, two members of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    nets = [net_of(load_model("robustkit:digits-cnn?pretrained=false", seed=seed)) for seed in range(2)]
    write_members(tmp_path / "received", nets, arch=f"{tmp_path}/net.py:build", classes=10)
    (tmp_path / "zoo.txt").write_text(f"{tmp_path}/net.py:build\nensemble:[received/;robustkit:digits-cnn]\n")
    return tmp_path


COMMANDS = {
    "evaluate": ["evaluate", "received/", *DATA],
    "one member": ["evaluate", "received/#1", *DATA],
    "ensemble": ["evaluate", "ensemble:[robustkit:digits-cnn;received/]", *DATA],
    "list": ["evaluate", "--models", "zoo.txt", *DATA],
    "plan": ["plan", "received/", *DATA],
    "doctor": ["doctor", "received/", *DATA],
    "diversity": ["diversity", "received/", *DATA],
    "craft on": ["craft", "--surrogate", "received/", *DATA],
    "craft for": ["craft", "--target", "received/", *DATA],
    "matrix": ["matrix", "--models", "robustkit:digits-cnn,received/", *DATA],
    "train": ["train", "standard", "--arch", "received/#0", "--data", "digits:train", "--limit", "20"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_verb_runs_code_of_a_file(command: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 2
    err = capsys.readouterr().err
    assert "names Python code" in err
    assert "--trust-code" in err
    assert "Traceback" not in err
    assert not (place / "ran").exists()


def test_no_function_runs_code_of_a_file(place: Path) -> None:
    data = load_data("digits:test").head(4)
    calls = [
        lambda: load_model("received/"),
        lambda: craft("received/", data, None, "linf:0.1"),
        lambda: craft("robustkit:digits-cnn", data, None, "linf:0.1", targets="received/"),
        lambda: diversity("received/", data, None, "linf:0.1"),
        lambda: train("standard", arch="received/#0", limit=20),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="--trust-code"):
            call()
    assert not (place / "ran").exists()
    assert load_model("received/", trust_code=True)
    assert (place / "ran").exists()


def test_code_named_on_the_command_line_runs_and_recorded_code_does_not(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "./net.py:build", *DATA, "--suite", "fgsm", "--out", "r"]) == 0
    assert "robustkit verify r --trust-code" in capsys.readouterr().out
    (place / "ran").unlink()
    assert run(["verify", "r"]) == 2
    assert f"r/report.json names Python code, '{place}/net.py:build'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--trust-code"):
        verify("r")
    assert not (place / "ran").exists()
    assert run(["verify", "r", "--trust-code"]) == 0
    assert run(["verify", "r", "--model", "./net.py:build"]) == 0
    assert not verify("r", trust_code=True).bad
    (place / "ran").unlink()
    # The seals come first: with one broken not even trusted code is run.
    with (place / "r" / "ledger.sqlite").open("ab") as file:
        file.write(b"\0")
    capsys.readouterr()
    assert run(["verify", "r", "--trust-code"]) == 1
    out = capsys.readouterr().out
    assert "ledger.sqlite has changed since the run" in out
    assert "no model or data that this record names was loaded" in out
    assert not (place / "ran").exists()


def test_a_record_whose_id_is_not_that_of_its_spec_is_not_loaded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "robustkit:digits-cnn", *DATA, "--suite", "fgsm", "--out", "r"]) == 0
    body = json.loads((place / "r" / "report.json").read_text())
    body["spec"]["model"]["string"] = "os:system?command=touch ran"
    body["spec"]["data"]["string"] = "webdataset:/{0..99999999999}.tar"
    body["files"] |= {"../../../etc/passwd": "0" * 64}
    (place / "r" / "report.json").write_text(json.dumps(body))
    assert run(["verify", "r"]) == 1
    out = capsys.readouterr().out
    assert "'../../../etc/passwd', which is no file of a run and is not read" in out
    assert "stopped" in out
    assert not (place / "ran").exists()


def test_trusted_lists_and_trainings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--models", "zoo.txt", *DATA, "--suite", "fgsm", "--out", "z", "--trust-code"]) == 0
    trained = ["train", "standard", "--arch", "received/#0", "--data", "digits:train", "--limit", "20"]
    assert run([*trained, "--epochs", "1", "--out", "t", "--trust-code"]) == 0
    assert "robustkit evaluate t/ --data digits:test --trust-code" in capsys.readouterr().out
    assert run(["evaluate", "t/", *DATA]) == 2


def test_crafted_images_are_evaluated_without_their_surrogate(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    surrogate = ["--surrogate", "./net.py:build", "--attack", "fgsm"]
    assert run(["craft", *surrogate, *DATA, "--out", "c"]) == 0
    (place / "ran").unlink()
    assert run(["transfer", "c", "--target", "robustkit:digits-cnn"]) == 0
    for verb in (["report", "c"], ["compare", "c", "c"]):
        assert run(verb) == 0
    assert not (place / "ran").exists()
    capsys.readouterr()
    assert run(["transfer", "c", "--target", "received/"]) == 2
    assert "--trust-code" in capsys.readouterr().err


def test_weights_named_in_a_list_are_paths(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    os.mkfifo(place / "w.safetensors")
    (place / "zoo.txt").write_text("robustkit:digits-cnn@w.safetensors\nrobustkit:digits-cnn@/etc/passwd\n")
    assert run(["evaluate", "--models", "zoo.txt", *DATA]) == 2
    err = capsys.readouterr().err
    assert "w.safetensors' is no regular file" in err
    assert "weights file '/etc/passwd' is neither a safetensors file nor one that torch.save wrote" in err
