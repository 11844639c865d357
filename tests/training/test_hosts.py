"""Settings of a launcher's environment, and error messages for wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from robustkit import UsageError, train
from robustkit.training.parallel import processes
from robustkit.training.parallel.hosts import find_launcher, first_host

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
}


def test_a_launcher_is_found() -> None:
    for environment, shape in ((TORCHRUN, ("torchrun", 5, 8, 4, 2)), (SRUN, ("srun", 4, 6, 2, 3))):
        found = find_launcher({**environment, "HOME": "/"})
        assert found is not None
        assert (found.name, found.rank, found.size, found.per_host, found.nodes) == shape
        assert set(found.variables) == set(TORCHRUN)
    assert found.variables["MASTER_ADDR"] == "gpu07"
    assert found.variables["MASTER_PORT"] == str(15000 + 47112 % 20000)
    # torchrun within a step of one process for each host.
    both = find_launcher({**SRUN, **TORCHRUN})
    assert both is not None
    assert both.name == "torchrun"


def test_one_process_has_no_launcher() -> None:
    """A batch script sees what its job may have, and is one process all the same."""
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    for environment in ({}, {**TORCHRUN, "WORLD_SIZE": "1"}, batch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}):
        assert find_launcher(environment) is None


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("localhost", "localhost"), ("a1,a2", "a1"), ("gpu[07-09,12],b", "gpu07"), ("r[3]x.net,b[1-2]", "r3x.net")],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("environment", "devices", "sentence"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1, "torchrun's environment lacks LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ({**TORCHRUN, "WORLD_SIZE": "7"}, 1, "started 7 processes, 4 of them on this host"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "7"}, 1, "srun started 7 processes, 3 of them on this host"),
        (TORCHRUN, 2, "--devices 2: torchrun started 4 processes on this host"),
        ({}, 0, "devices must be from 1 to 1024, got 0"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(
    environment: dict[str, str], devices: int, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=sentence):
        train("standard", limit=48, devices=devices, device="cpu", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_process_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert processes.count_processes(cuda, 2) == 2
    with pytest.raises(UsageError, match=r"--devices 3: this process sees 2 cuda devices"):
        processes.count_processes(cuda, 3)
    with pytest.raises(UsageError, match=r"--device cuda:1 is one for 2 processes; write --device cuda"):
        processes.count_processes(torch.device("cuda:1"), 2)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UsageError, match=r"torchrun started 4 processes on this host: this process sees 2 cuda devices"
    ):
        processes.count_processes(cuda, 1)
    assert processes.count_processes(torch.device("cpu"), 4) == 8


def test_process_group_is_destroyed_before_exit() -> None:
    """A group that the interpreter's end takes down aborts a process now and then."""
    parted = []

    class Two:
        world_size = 2

        def barrier(self) -> None:
            parted.append(torch.distributed.is_initialized())

    two: Any = Two()
    store = HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    assert processes._run(two, lambda _: "done", torch.get_num_threads()) == "done"
    assert parted == [True]
    assert not torch.distributed.is_initialized()
