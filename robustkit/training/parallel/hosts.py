"""Processes that a launcher has started, on one host or several: torchrun, or Slurm's srun."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from robustkit.core.errors import UsageError

TORCHRUN, SRUN = "torchrun", "srun"
# What torchrun tells each process; another launcher may tell the same.
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    """The processes of a launcher, and which of them this one is.

    Attributes:
        by: `torchrun` or `srun`.
        told: the variables that torchrun sets, with their values.
    """

    by: str
    told: Mapping[str, str]

    @property
    def rank(self) -> int:
        """This process's number among all."""
        return int(self.told["RANK"])

    @property
    def size(self) -> int:
        """How many processes there are."""
        return int(self.told["WORLD_SIZE"])

    @property
    def local(self) -> int:
        """How many are on each host."""
        return int(self.told["LOCAL_WORLD_SIZE"])

    @property
    def nodes(self) -> int:
        """How many hosts."""
        return self.size // self.local


def launched(environment: Mapping[str, str]) -> Launched | None:
    """Return what the environment says of a launcher; None if it started one process, or there is none.

    Raises:
        UsageError: if it says half of it, or hosts have different numbers of processes.
    """
    if environment.get("WORLD_SIZE", "1") != "1":
        found = Launched(TORCHRUN, environment)
        names: tuple[str, ...] = TOLD
    # Of a step: in a batch script without srun there is one process, whatever the job may have.
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        found = Launched(SRUN, environment)
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    else:
        return None
    missing = [name for name in names if name not in environment]
    if missing:
        raise UsageError(
            f"{found.by}'s environment lacks {', '.join(missing)}; start the processes with torchrun or srun."
        )
    if found.by == SRUN:
        found = Launched(SRUN, _as_torchrun(environment))
    if found.size % found.local or found.size != found.local * found.nodes:
        raise UsageError(
            f"{found.by} started {found.size} processes, {found.local} of them on this host; give each host "
            "as many."
        )
    return replace(found, told={name: found.told[name] for name in TOLD})


def _as_torchrun(slurm: Mapping[str, str]) -> dict[str, str]:
    size, nodes = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm["SLURM_STEP_NUM_NODES"])
    # Steps of one job may run at once.
    port = 15000 + (10 * int(slurm["SLURM_JOB_ID"]) + int(slurm.get("SLURM_STEP_ID", 0))) % 20000
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(-(-size // nodes)),
        "MASTER_ADDR": slurm.get("MASTER_ADDR", first_host(slurm["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": slurm.get("MASTER_PORT", str(port)),
    }


def first_host(hosts: str) -> str:
    """Return the first of Slurm's list of hosts, as in `gpu[07-09,12],login`."""
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,]*)", hosts)
    return "".join(part or "" for part in found.groups()) if found else hosts
