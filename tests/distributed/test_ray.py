"""Workers on a Ray cluster of two nodes on this machine: verdicts, removed nodes, addresses, tokens, stdout."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustkit import craft, evaluate, load_data, load_model
from robustkit.engine.progress import Progress
from robustkit.runs.craft_record import Craft
from robustkit.runs.evaluation_record import Report

WARNINGS = ("ResourceWarning", "DeprecationWarning", "FutureWarning", "pytest.PytestUnraisableExceptionWarning")
pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(f"ignore::{name}") for name in WARNINGS)]

SUITE = "pgd(steps=10),apgd(steps=30),square(queries=200)"
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    # Ray gives its workers a high niceness, with which they get no time on a busy machine.
    monkeypatch.setenv("RAY_worker_niceness", "0")


class Removing(Progress):
    """Removes a node once the attacks are running."""

    def __init__(self, remove: Callable[[], object]) -> None:
        self.remove, self.calls, self.messages = remove, 0, list[str]()

    def say(self, text: str) -> None:
        self.messages.append(text)

    def advance(self, done: float, robust: int) -> None:
        if "2 workers at work" in "".join(self.messages):
            self.calls += 1
            if self.calls == 6:
                self.remove()


def evaluated(**settings: Any) -> Report:
    samples = load_data("digits:test").head(24)
    return evaluate(
        load_model("robustkit:digits-cnn"), samples, None, "linf:0.12", suite=SUITE, precision="fp32", **settings
    )


def crafted(**settings: Any) -> Craft:
    samples = load_data("digits:test").head(24)
    # Streamed nets are run as they are; of others two runs may choose another memory layout.
    options = {"attack": "mi-fgsm(steps=5)+di", "batch_size": 4, "streaming": True, **settings}
    return craft(["robustkit:digits-cnn"], samples, None, "linf:0.12", **options)


def assert_same(one: Report, other: Report) -> None:
    assert one.run_id == other.run_id
    assert [(v.robust, v.attack) for v in one.verdicts] == [(v.robust, v.attack) for v in other.verdicts]
    assert np.allclose([v.margin for v in one.verdicts], [v.margin for v in other.verdicts], atol=1e-4)


def test_two_nodes_give_the_report_of_one_process_also_if_one_is_removed() -> None:
    from ray.cluster_utils import Cluster

    alone = evaluated()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        both = evaluated(ray=cluster.address)
        assert_same(alone, both)
        assert both.environment["workers"] == 2
        one, many = crafted(), crafted(ray=cluster.address)
        assert np.array_equal(one.adversarial["x"], many.adversarial["x"])
        watch = Removing(lambda: cluster.remove_node(node, allow_graceful=False))
        assert_same(alone, evaluated(ray=cluster.address, progress=watch))
        assert any("has died" in line for line in watch.messages)
    finally:
        cluster.shutdown()


def actors() -> Iterator[int]:
    """Yield the processes that are actors of this package (Linux)."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::_Actor" in command.read_bytes():
                yield int(command.parent.name)
        except OSError:
            continue


def test_stdout_is_one_json_document_also_if_a_worker_dies(tmp_path: Path) -> None:
    before = set(actors())
    command = [
        sys.executable,
        "-m",
        "robustkit",
        "evaluate",
        "--limit",
        "48",
        "--suite",
        "pgd(steps=200)",
        "--json",
    ]
    command += ["--ray", "local", "--workers", "2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(started := set(actors()) - before) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(min(started), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert "has died" in stderr
    assert "raylet" not in stderr
    assert len(json.loads(stdout)["verdicts"]) == 48


SCRIPT = """
from robustkit.core.errors import UsageError
from robustkit.distributed.pool import open_pool

try:
    pool = open_pool(1, {address!r})
    print(pool.result(pool.submit(0, dict)))
    pool.close()
except UsageError as error:
    print(error)
"""


def printed(address: str, token: str) -> str:
    """Return what a program prints that gives a cluster one task."""
    environment = {**os.environ, "RAY_AUTH_TOKEN": token}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(address=address)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


HEAD = """
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 2, "ray_client_server_port": {port}}})
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""


def test_a_cluster_with_a_token_is_reached_by_both_kinds_of_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    port = free_port()
    # Ray reads its environment once in a process.
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD.format(port=port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert head.stdout is not None
        lines = iter(head.stdout.readline, "")
        address = next(line.strip() for line in lines if line[0].isdigit())
        addresses = address, f"ray://127.0.0.1:{port}"
        assert [printed(address, TOKEN) for address in addresses] == ["{}", "{}"]
        for address in addresses:
            message = printed(address, TOKEN[::-1])
            assert message.startswith(f"no Ray cluster at '{address}' (")
            assert "if it requires a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in message
        missing = printed(f"127.0.0.1:{free_port()}", TOKEN)
        assert missing.endswith("start one with ray start --head, or write --ray local.")
    finally:
        head.communicate("\n", timeout=60)
