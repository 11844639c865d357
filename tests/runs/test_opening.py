"""Which run a folder holds: one without a result is replaced, others by --overwrite only; other files are kept."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from reports import make_report

from robustkit.cli import run
from robustkit.core.errors import UsageError
from robustkit.runs import opening
from robustkit.runs.ledger import Chunk, Ledger, Verdict
from robustkit.runs.opening import clear, open_for_writing
from robustkit.runs.spec import RunSpec, dumps

OLD, NEW = make_report().spec, make_report(seed=1, model="robustkit:cifar-resnet20", fingerprint="ef" * 32).spec
VERDICT = Verdict(0, 1, 1, 0.5, False, "0" * 64)


def run_with_stages(path: Path, *stages: int, spec: RunSpec = OLD) -> Path:
    """Make a folder of a run whose ledger has a chunk of each of these stages."""
    path.mkdir()
    (path / "spec.json").write_text(dumps(spec))
    with Ledger.open(path / "ledger.sqlite", spec.run_id) as ledger:
        for stage in stages:
            ledger.write(Chunk(stage, 0, 1, 0, 0.1, [VERDICT]))
    return path


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.name != ".lock")


@pytest.mark.parametrize("stages", [(), (0,)])
def test_a_run_without_a_verdict_is_replaced_with_a_message(tmp_path: Path, stages: tuple[int, ...]) -> None:
    messages: list[str] = []
    path = run_with_stages(tmp_path / "r", *stages)
    with open_for_writing(path, NEW, say=messages.append) as writable:
        assert writable
    assert json.loads((path / "spec.json").read_text())["seed"] == NEW.seed
    assert names(path) == ["spec.json"]
    assert messages == [f"run {OLD.run_id} in {path} has no result and is replaced by run {NEW.run_id}"]


def test_a_folder_with_a_spec_only_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(dumps(OLD))
    with open_for_writing(tmp_path, NEW):
        assert RunSpec(**json.loads((tmp_path / "spec.json").read_text())).run_id == NEW.run_id


@pytest.mark.parametrize("name", ["report.json", "model.json", "checkpoint.pt", "checkpoint.previous.pt"])
def test_a_folder_with_a_result_or_checkpoint_is_not_replaced(name: str, tmp_path: Path) -> None:
    path = run_with_stages(tmp_path / "r")
    (path / name).touch()
    refusal = pytest.raises(UsageError, match=r"differs in .*remove that run with --overwrite")
    with refusal, open_for_writing(path, NEW):
        pass
    assert (path / name).exists()


def test_verdicts_of_an_attack_are_replaced_with_overwrite_only(tmp_path: Path) -> None:
    path = run_with_stages(tmp_path / "r", 0, 1)
    (path / "notes.txt").write_text("mine")
    before = (path / "ledger.sqlite").read_bytes()
    with pytest.raises(UsageError, match=f"holds run {OLD.run_id}, which differs in"), open_for_writing(path, NEW):
        pass
    assert (path / "ledger.sqlite").read_bytes() == before
    with open_for_writing(path, NEW, overwrite=True):
        assert names(path) == ["notes.txt", "spec.json"]


def test_verdicts_in_a_write_ahead_log_count(tmp_path: Path) -> None:
    path = run_with_stages(tmp_path / "r")
    with Ledger.open(path / "ledger.sqlite", OLD.run_id) as ledger:
        ledger.write(Chunk(1, 0, 1, 0, 0.1, [VERDICT]))
        assert (path / "ledger.sqlite-wal").stat().st_size
        assert not Ledger.is_unattacked(path / "ledger.sqlite")


def test_overwrite_restarts_the_same_run(tmp_path: Path) -> None:
    path = run_with_stages(tmp_path / "r", 0, 1)
    with open_for_writing(path, OLD, overwrite=True):
        assert names(path) == ["spec.json"]


def test_overwrite_replaces_a_damaged_ledger(tmp_path: Path) -> None:
    path = run_with_stages(tmp_path / "r", 0, 1)
    (path / "ledger.sqlite").write_bytes(b"no database" * 99)
    with pytest.raises(UsageError, match="start again with --overwrite"), open_for_writing(path, NEW):
        pass
    with open_for_writing(path, NEW, overwrite=True):
        assert names(path) == ["spec.json"]


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"verb": "evaluate"}', '{"openapi": "3.0"}'])
def test_overwrite_removes_nothing_from_a_folder_without_a_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(content)
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(UsageError, match="but no run that could be overwritten"):
        clear(tmp_path)
    assert names(tmp_path) == ["report.json", "spec.json"]


def test_overwrite_accepts_a_new_or_empty_folder(tmp_path: Path) -> None:
    with open_for_writing(tmp_path / "new" / "deep", NEW, overwrite=True) as writable:
        assert writable


def test_overwrite_removes_what_robustkit_wrote_and_no_link_is_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0000.safetensors").touch()
    path = run_with_stages(tmp_path / "r", 1)
    for name in ("samples", "kept/samples", "tensorboard", "evaluate-0123abcd", "mine"):
        (path / name).mkdir(parents=True)
    for name in (
        *("samples/0000.safetensors", "samples/notes.txt", "kept/samples/0001.safetensors", "mine/spec.json"),
        *("tensorboard/events.out.tfevents.1.host", "evaluate-0123abcd/report.json", "report.html", "card.png"),
    ):
        (path / name).touch()
    (path / "model.safetensors").symlink_to(outside / "0000.safetensors")
    run_with_stages(path / "craft-0123abcd", 1)
    (path / "craft-4567abcd").symlink_to(outside)
    clear(path)
    files = [file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()]
    assert {str(file.relative_to(path)) for file in files} == {
        *("craft-4567abcd", "card.png", "evaluate-0123abcd/report.json", "mine/spec.json", "samples/notes.txt")
    }
    assert names(outside) == ["0000.safetensors"]


def test_a_running_run_is_not_overwritten(tmp_path: Path) -> None:
    path = run_with_stages(tmp_path / "r", 1)
    with (
        open_for_writing(path, OLD),
        pytest.raises(UsageError, match="another process is working"),
        open_for_writing(path, NEW, overwrite=True),
    ):
        pass
    assert Ledger.is_unattacked(path / "ledger.sqlite") is False


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_finished_run_in_a_read_only_folder_is_read(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    path = run_with_stages(tmp_path / "r", 1)
    monkeypatch.setattr(opening, "_lock", refuse)
    with pytest.raises(UsageError, match="cannot write the run folder"), open_for_writing(path, OLD):
        pass
    (path / "report.json").touch()
    with open_for_writing(path, OLD) as writable:
        assert not writable
    for spec, overwrite in ((NEW, False), (OLD, True)):
        with (
            pytest.raises(UsageError, match="cannot write the run folder"),
            open_for_writing(path, spec, overwrite=overwrite),
        ):
            pass


def test_the_same_command_runs_after_the_model_is_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear({}, 10))\n"
    command = ["evaluate", "./net.py:build", "--data", "digits:test", "--limit", "6", "--suite", "fgsm"]
    command += ["--out", "r"]
    Path("net.py").write_text(net.format(63))
    assert run(command) != 0
    assert Path("r/spec.json").exists()
    Path("net.py").write_text(net.format(64))
    assert run(command) == 0
    # Finished: another suite is refused, but with --overwrite.
    other = [*command, "--seed", "5"]
    assert run(other) == 2
    assert "--overwrite" in capsys.readouterr().err
    Path("r/notes.txt").write_text("mine")
    assert run([*other, "--overwrite"]) == 0
    assert Path("r/notes.txt").read_text() == "mine"
    assert json.loads(Path("r/report.json").read_text())["spec"]["seed"] == 5


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_reads_a_finished_folder(tmp_path: Path) -> None:
    path = run_with_stages(tmp_path / "r", 1)
    (path / "report.json").touch()
    with open_for_writing(path, OLD):
        pass
    for folder in (path, *path.parents[:-2]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with open_for_writing(path, OLD) as writable:
            assert not writable
    finally:
        os.seteuid(0)
