"""Workers that are actors of a Ray cluster. It places and starts them; they talk to the driver like all others."""

from __future__ import annotations

import socket
from typing import Any

import torch

from robustkit.core.errors import UsageError
from robustkit.distributed.process_pool import Door, Hiring, Local
from robustkit.distributed.service import serve

LOCAL = "local"
# Seconds for a cluster's head to answer; Ray itself would go on asking for many minutes.
PATIENCE = 10.0


# More processes than any machine has cores for.
MOST = 1024


def hire(workers: int | None, ray: str | None) -> Hiring:
    """Return where so many workers come from: this machine, or the cluster at the address `ray`.

    Raises:
        UsageError: there are more of them than a machine starts processes, or none, or no cluster is there.
    """
    if workers is not None and not 1 <= workers <= MOST:
        raise UsageError(f"workers {workers}: write how many processes shall share the work, from 1 to {MOST}.")
    return Local(workers or 1) if ray is None else Cluster(ray, workers)


class Cluster:
    """A `Hiring` of `count` workers with a GPU each where the cluster has any, else with `threads` CPUs each."""

    def __init__(self, address: str, count: int | None = None) -> None:
        """Join the cluster at an address, or start one on this machine for `local`.

        Without a count there are as many as it has GPUs, or CPUs.

        Raises:
            UsageError: if Ray is not installed, or nothing answers there.
        """
        try:
            import ray
        except ImportError:
            raise UsageError("there is no Ray here: pip install ray, or leave --ray out.") from None
        self.ray = ray
        self.mine = not ray.is_initialized()
        if self.mine:
            try:
                _knock(address)
                ray.init(None if address == LOCAL else address, include_dashboard=False, logging_level="warning")
            except (OSError, RuntimeError, ValueError) as error:
                raise UsageError(
                    f"no Ray cluster at {address!r} ({str(error).strip().splitlines()[0]}); "
                    "start one with ray start --head, or write --ray local."
                ) from error
        total = ray.cluster_resources()
        self.gpus = int(total.get("GPU", 0))
        smallest = min(int(node["Resources"].get("CPU", 0)) or 1 for node in ray.nodes() if node["Alive"])
        self.count = count or self.gpus or int(total.get("CPU", 1))
        self.threads = max(1, min(int(total.get("CPU", 1)) // self.count, smallest))
        self.door = Door(ray.util.get_node_ip_address())
        self.running: dict[int, tuple[Any, Any]] = {}

    def start(self, number: int) -> None:
        """Start the worker of that number where there is room; it waits until there is."""
        needs: dict[str, Any] = {"num_gpus": 1} if self.gpus else {"num_cpus": self.threads}
        actor = self.ray.remote(_Actor).options(**needs, max_restarts=0).remote()
        self.running[number] = actor, actor.serve.remote(self.door.address, self.door.key, number)

    def device(self, own: torch.device, number: int) -> str:
        """Return where it computes: Ray shows it one GPU."""
        return "cuda" if self.gpus else "cpu"

    def ended(self) -> list[tuple[int, str]]:
        """Return which workers have ended since the last call, and how."""
        if not self.running:
            return []
        calls = {call: number for number, (_, call) in self.running.items()}
        done, _ = self.ray.wait(list(calls), num_returns=len(calls), timeout=0)
        found = []
        for call in done:
            del self.running[calls[call]]
            try:
                self.ray.get(call)
                how = "it went away"
            except self.ray.exceptions.RayError as error:
                how = type(error).__name__
            found.append((calls[call], how))
        return found

    def close(self) -> None:
        """End all, and the cluster if it was started here."""
        self.door.close()
        for actor, _ in self.running.values():
            self.ray.kill(actor)
        if self.mine:
            self.ray.shutdown()


def _knock(address: str) -> None:
    """Raise an OSError if nobody listens at an address that names a host and a port."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), PATIENCE).close()


class _Actor:
    """A process of a Ray cluster that is a worker."""

    def serve(self, address: tuple[str, int], key: bytes, number: int) -> None:
        """Be one until the driver ends it."""
        serve(address, key, number)
