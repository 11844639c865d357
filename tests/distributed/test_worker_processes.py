"""Workers that are processes: killed, interrupted, left behind by their driver; models that are sent to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from nets import Small, labelled

from robustkit import evaluate
from robustkit.runs.evaluation_record import Report

pytestmark = pytest.mark.slow

SUITE = "pgd(steps=20),autoattack:apgd-ce(steps=10),apgd(steps=40),square(queries=200)"
COMMAND = [sys.executable, "-m", "robustkit", "evaluate", "--limit", "24", "--batch-size", "8", "--no-html"]
COMMAND += ["--precision", "fp32", "--threat", "linf:0.12", "--suite", SUITE]


def start(out: Path, workers: int, command: list[str] = COMMAND) -> subprocess.Popen[str]:
    command = [*command, "--workers", str(workers), "--out", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def worker_ids(driver: int) -> list[int]:
    """The worker processes of a driver."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [line.split(None, 2) for line in listed]
    return [int(pid) for pid, parent, said in rows[1:] if parent == str(driver) and "spawn_main" in said]


def wait_until(true: object, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_same(one: Path, other: Path) -> None:
    told = [Report.from_json(json.loads((out / "report.json").read_text())) for out in (one, other)]
    first, second = told
    assert first.run_id == second.run_id
    assert [(v.robust, v.attack) for v in first.verdicts] == [(v.robust, v.attack) for v in second.verdicts]
    assert np.allclose([v.margin for v in first.verdicts], [v.margin for v in second.verdicts], atol=1e-4)


def test_killed_workers_and_a_killed_driver_lose_no_verdict(tmp_path: Path) -> None:
    alone = start(tmp_path / "alone", 1)
    process = start(tmp_path / "shared", 2)
    wait_until(lambda: len(worker_ids(process.pid)) == 2)
    time.sleep(3)
    os.kill(worker_ids(process.pid)[0], signal.SIGKILL)
    time.sleep(3)
    left = worker_ids(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(is_alive, left)), 30)
    process = start(tmp_path / "shared", 2)
    said, _ = process.communicate(timeout=170)
    assert process.returncode == 0, said
    alone.communicate()
    assert alone.returncode == 0
    assert_same(tmp_path / "alone", tmp_path / "shared")


def test_ctrl_c_ends_driver_and_workers(tmp_path: Path) -> None:
    process = start(tmp_path / "r", 2)
    wait_until(lambda: len(worker_ids(process.pid)) == 2)
    time.sleep(2)
    left = worker_ids(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not any(map(is_alive, left))


def test_a_model_from_python_is_sent_to_workers() -> None:
    net = Small()
    x, y = labelled(net, 12, (3, 6, 8))
    one, two = (evaluate(net, x, y, "linf:0.02", suite="pgd(steps=6)", workers=n) for n in (1, 2))
    assert [v.robust for v in one.verdicts] == [v.robust for v in two.verdicts]
    assert one.run_id == two.run_id


def test_a_list_of_models_survives_killed_workers_and_a_killed_driver(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo.txt"
    zoo.write_text("a=robustkit:digits-cnn\nb=robustkit:digits-cnn?defense=bit-depth:3\nc=nowhere:at_all\n")
    suite = "pgd(steps=20),autoattack:apgd-ce(steps=10),apgd(steps=20)"
    command = [*COMMAND, "--models", str(zoo), "--data", "digits:test", "--limit", "12", "--suite", suite]
    alone = start(tmp_path / "alone", 1, command)
    process = start(tmp_path / "shared", 2, command)
    wait_until(lambda: len(worker_ids(process.pid)) == 2)
    time.sleep(3)
    os.kill(worker_ids(process.pid)[0], signal.SIGKILL)
    time.sleep(4)
    left = worker_ids(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(is_alive, left)), 30)
    process = start(tmp_path / "shared", 3, command)
    said, _ = process.communicate(timeout=170)
    assert process.returncode == 2, said
    alone.communicate()
    boards = [json.loads((tmp_path / name / "leaderboard.json").read_text()) for name in ("alone", "shared")]
    for one, other in zip(*(admit["rows"] for admit in boards), strict=True):
        assert one["behind"] == other["behind"]
        assert_same(tmp_path / "alone" / one["folder"], tmp_path / "shared" / other["folder"])


def test_images_of_killed_workers_are_crafted_by_others(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "robustkit", "craft", "--limit", "48", "--batch-size", "4"]
    command += ["--attack", "mi-fgsm(steps=100)"]
    alone = start(tmp_path / "alone", 1, command)
    process = start(tmp_path / "shared", 2, command)
    wait_until(lambda: len(worker_ids(process.pid)) == 2)
    time.sleep(4)
    os.kill(worker_ids(process.pid)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=170)
    assert process.returncode == 0, said
    alone.communicate()
    one, other = (tmp_path / name for name in ("alone", "shared"))
    configs = [json.loads((run / "transfer.json").read_text())["environment"]["ways"] for run in (one, other)]
    first, second = (np.load(run / "adversarial.npz")["x"] for run in (one, other))
    # Two runs may choose another memory layout, which rounds otherwise.
    assert np.array_equal(first, second) if configs[0] == configs[1] else np.isclose(first, second).mean() > 0.99
