"""Processes started by a launcher, on one host or several: torchrun, or Slurm's srun."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from robustkit.core.errors import UsageError

TORCHRUN, SRUN = "torchrun", "srun"
# The environment variables that torchrun, and launchers compatible with it, set in each process.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launcher:
    """The processes of a launcher, and the rank of this one.

    Args:
        name: `torchrun` or `srun`.
        variables: the variables that torchrun sets, with their values.
    """

    name: str
    variables: Mapping[str, str]

    @property
    def rank(self) -> int:
        """Rank of this process among all."""
        return int(self.variables["RANK"])

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(self.variables["WORLD_SIZE"])

    @property
    def per_host(self) -> int:
        """Number of processes on each host."""
        return int(self.variables["LOCAL_WORLD_SIZE"])

    @property
    def nodes(self) -> int:
        """Number of hosts."""
        return self.size // self.per_host


def find_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """Return the launcher that the environment describes; None if there is none, or it started one process.

    Raises:
        UsageError: if variables are missing, or hosts have different numbers of processes.
    """
    if environment.get("WORLD_SIZE", "1") != "1":
        found = Launcher(TORCHRUN, environment)
        names: tuple[str, ...] = TORCHRUN_VARIABLES
    # The variables of a Slurm step: a batch script without srun runs in one process, whatever the job has.
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        found = Launcher(SRUN, environment)
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    else:
        return None
    missing = [name for name in names if name not in environment]
    if missing:
        raise UsageError(
            f"{found.name}'s environment lacks {', '.join(missing)}; start the processes with torchrun or srun."
        )
    if found.name == SRUN:
        found = Launcher(SRUN, _as_torchrun(environment))
    if found.size % found.per_host or found.size != found.per_host * found.nodes:
        raise UsageError(
            f"{found.name} started {found.size} processes, {found.per_host} of them on this host; start the same "
            "number on each host."
        )
    return replace(found, variables={name: found.variables[name] for name in TORCHRUN_VARIABLES})


def _as_torchrun(slurm: Mapping[str, str]) -> dict[str, str]:
    size, nodes = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm["SLURM_STEP_NUM_NODES"])
    # Steps of one job can run at the same time and need different ports.
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
    """Return the first host of a Slurm list such as `gpu[07-09,12],login`."""
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,]*)", hosts)
    return "".join(part or "" for part in found.groups()) if found else hosts
