"""Two processes started by torchrun or srun: the curves and files of one process, and resuming after kill -9."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from robustkit import load_data, train
from robustkit.posterior import Posterior

# Runs a list of trainings; at a step, if one is said, the first process is gone and the second alone.
CODE = """
import json, os, signal, sys
from robustkit import load_data, train
from robustkit.training import loop
from robustkit.training.progress import TrainProgress

class Killer(TrainProgress):
    def step(self, done):
        if done == stop:
            os.kill(os.getpid(), signal.SIGKILL)

loop.SAVE_EVERY = 0.0
stop, runs = json.loads(sys.argv[1])
for words in runs:
    train(**words, test=load_data("digits:test").head(40), progress=Killer())
"""
DROPPING = f"{Path(__file__).parent / 'test_train.py'}:DropoutNet"
SHORT: dict[str, Any] = {"limit": 48, "epochs": 2, "batch_size": 16, "lr": 0.02, "augment": "crop"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def torchrun(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells one of two hosts with a process each."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def srun(rank: int, port: int) -> dict[str, str]:
    """What srun tells one of two tasks on a host."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }


def on_two(runs: Sequence[dict[str, Any]], stop: int = -1, tell: Any = torchrun) -> list[int]:
    """Run trainings on two processes; return their exit codes."""
    port, started = free_port(), []
    for rank in (0, 1):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **tell(rank, port)}
        command = [sys.executable, "-c", CODE, json.dumps([stop, runs])]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    errors = [one.communicate(timeout=900)[1].decode() for one in started]
    if stop < 0:
        assert [one.returncode for one in started] == [0, 0], "\n".join(errors)
    return [one.returncode for one in started]


def curves(folder: Path) -> list[float]:
    return [epoch["loss"] for epoch in json.loads((folder / "model.json").read_text())["history"]]


def without_clock(folder: Path) -> dict[str, Any]:
    """Return model.json but for what a clock said."""
    body = json.loads((folder / "model.json").read_text())
    body["cost"].pop("seconds")
    for facts in body["history"]:
        facts.pop("seconds")
        facts.pop("images_per_second")
    return body


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    if (folder / "model.safetensors").is_file():
        return [load_file(folder / "model.safetensors")]
    posterior = Posterior.open(folder)
    return [dict(posterior.state(number)) for number in range(len(posterior))]


def distance(one: Path, other: Path) -> float:
    """Return how far weights and statistics of two runs are apart, at most."""
    return max(
        float((a[name].double() - b[name].double()).abs().max())
        for a, b in zip(states(one), states(other), strict=True)
        for name in a
    )


@pytest.mark.slow
def test_dverge_on_two_processes_has_the_curve_of_one(tmp_path: Path) -> None:
    """On digits: within 1e-4 with the data shared, and the same bytes with members apart, checkpoint and all."""
    words: dict[str, Any] = {
        "method": "dverge",
        "members": 2,
        "limit": 480,
        "epochs": 6,
        "batch_size": 48,
        "lr": 0.1,
    }
    test = load_data("digits:test").head(40)
    train(**words, test=test, out=tmp_path / "one")
    shared = [{**words, "out": str(tmp_path / kind), "parallel": kind} for kind in ("data", "members")]
    on_two(shared)
    one, data, members = (curves(tmp_path / name) for name in ("one", "data", "members"))
    print(f"loss {one}, apart {[a - b for a, b in zip(one, data, strict=True)]} with data shared")
    assert max(abs(a - b) for a, b in zip(one, data, strict=True)) < 1e-4
    assert members == pytest.approx(one, rel=1e-6)
    assert distance(tmp_path / "one", tmp_path / "data") < 1e-4
    same(tmp_path / "one", tmp_path / "members")


def same(one: Path, other: Path) -> None:
    """Hold that two runs left the same: weights to the byte, the checkpoint, and the record."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    bodies = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other)]
    for name in ("step", "forwards", "backwards", "nets", "optimizers", "averages", "memory"):
        torch.testing.assert_close(bodies[0][name], bodies[1][name], rtol=0, atol=0, msg=name)
    records = [without_clock(folder) for folder in (one, other)]
    for record in records:
        for facts in record["history"]:
            facts["loss"] = pytest.approx(facts["loss"], rel=1e-6)
    assert records[0] == records[1]


@pytest.mark.slow
def test_member_parallel_training_resumes_after_kill_9(tmp_path: Path) -> None:
    """Three members on two processes, with what is remembered and an average; on as many again, or on one."""
    words: dict[str, Any] = {**SHORT, "method": "fasten(baseline=0)", "members": 3, "ema": 0.9, "arch": DROPPING}
    test = load_data("digits:test").head(40)
    train(**words, test=test, out=tmp_path / "one")
    apart = {**words, "out": str(tmp_path / "apart"), "parallel": "members"}
    assert on_two([apart], stop=5)[0] == -9
    assert torch.load(tmp_path / "apart" / "checkpoint.pt", weights_only=True)["step"] == 4
    shutil.copytree(tmp_path / "apart", tmp_path / "alone")
    on_two([apart], tell=srun)
    train(**words, test=test, out=tmp_path / "alone")
    same(tmp_path / "one", tmp_path / "apart")
    same(tmp_path / "one", tmp_path / "alone")
    # A finished run is not run again, and tells all processes its record.
    on_two([apart])


EVERY = [
    ("standard(momentum=0)", 2, 1e-6),
    ("dverge(baseline=0,distinct=true,steps=3)", 2, 1e-5),
    ("dverge+at(baseline=0,steps=2,adversarial_steps=2,statistics=separate)", 2, 1e-5),
    ("fasten(baseline=0)", 2, 1e-5),
    # Adam divides by the size of a gradient, be it a rounding error.
    ("adp", 2, 1e-2),
    ("gal", 2, 1e-2),
    ("trs(steps=2)", 2, 1e-2),
    ("pgd-at(steps=2)", 2, 1e-5),
    ("trades(steps=2)", 1, 1e-5),
    ("csgld(cycles=1,samples_per_cycle=2,noise_epochs=1,temperature=1)", 1, 1e-5),
    ("swag(draws=2,start=0.5)", 1, 1e-5),
    ("mba(draws=2,collect_epochs=1)", 1, 1e-4),
]


@pytest.mark.slow
def test_every_method_trains_the_same_net_with_data_parallelism(tmp_path: Path) -> None:
    """Batch norm, dropout, crops and noise included."""
    runs = [
        {**SHORT, "method": method, "members": members, "arch": DROPPING, "out": str(tmp_path / f"two{number}")}
        for number, (method, members, _) in enumerate(EVERY)
    ]
    on_two(runs)
    for number, (words, (method, _, most)) in enumerate(zip(runs, EVERY, strict=True)):
        one, two = tmp_path / f"one{number}", tmp_path / f"two{number}"
        train(**{**words, "out": one}, test=load_data("digits:test").head(40))
        apart, far = max(abs(a - b) for a, b in zip(curves(one), curves(two), strict=True)), distance(one, two)
        print(f"{method}: losses {apart:.1e} and weights {far:.1e} apart")
        assert apart < 1e-5, method
        assert far < most, method
