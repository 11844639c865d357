"""What every pool of workers keeps to: threads (for tests), processes, and actors of a Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from teams import Died, ThreadPool

from robustkit import RunError, UsageError
from robustkit.core.errors import ModelError
from robustkit.distributed.pool import Handle, State, WorkerDied, WorkerPool, open_pool

WARNINGS = ("ResourceWarning", "DeprecationWarning", "FutureWarning", "pytest.PytestUnraisableExceptionWarning")
RAY_MARKS = [pytest.mark.slow, *(pytest.mark.filterwarnings(f"ignore::{name}") for name in WARNINGS)]


@dataclass(frozen=True)
class Add:
    """Adds a number to the worker's sum and returns it."""

    number: int

    def __call__(self, state: State) -> int:
        state["sum"] = state.get("sum", 0) + self.number
        return int(state["sum"])


@dataclass(frozen=True)
class Sleep:
    seconds: float

    def __call__(self, state: State) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Raise:
    error: BaseException

    def __call__(self, state: State) -> None:
        raise self.error


class Unknown(Exception):
    """Cannot be unpickled: it has another argument than its message."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")


def raise_unknown(state: State) -> None:
    raise Unknown(7)


@dataclass(frozen=True)
class Change:
    """Writes to arrays that came with the task, and to those of a handle."""

    own: np.ndarray
    shared: Handle[np.ndarray]

    def __call__(self, state: State) -> tuple[np.ndarray, torch.Tensor]:
        self.own[0] += 1
        shared = self.shared.get()
        shared[0] += 1
        return self.own, torch.from_numpy(shared)


@dataclass(frozen=True)
class Get:
    shared: Handle[Any]

    def __call__(self, state: State) -> object:
        return self.shared.get()


def process_id(state: State) -> int:
    return os.getpid()


def thread_count(state: State) -> int:
    return torch.get_num_threads()


def open_one(kind: str) -> WorkerPool:
    if kind == "threads":
        return ThreadPool(2)
    if kind == "ray":
        pytest.importorskip("ray")
        os.environ |= {"RAY_worker_niceness": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return open_pool(2, "local" if kind == "ray" else None)


@pytest.fixture(scope="module", params=["threads", "processes", pytest.param("ray", marks=RAY_MARKS)])
def pool(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    with closing(open_one(request.param)) as pool:
        yield pool


def test_a_worker_runs_its_tasks_in_order_and_keeps_its_state(pool: WorkerPool) -> None:
    futures = {worker: [pool.submit(worker, Add(number)) for number in (1, 2, 3)] for worker in (0, 1)}
    assert [[pool.result(future) for future in part] for part in futures.values()] == [[1, 3, 6]] * 2


def test_wait_returns_at_the_first_that_is_done(pool: WorkerPool) -> None:
    quick, slow, queued = pool.submit(0, Sleep(0)), pool.submit(1, Sleep(1.5)), pool.submit(1, Sleep(0))
    pool.wait([slow], 0.01)
    assert pool.wait([quick, slow, queued]) <= {quick, slow}
    pool.result(quick)
    pool.result(queued)
    assert pool.wait([quick, slow, queued]) == {quick, slow, queued}


def test_errors_of_tasks_reach_the_driver_and_the_worker_goes_on(pool: WorkerPool) -> None:
    for error in (UsageError("use another word."), ModelError("the model failed.")):
        with pytest.raises(type(error), match=str(error)):
            pool.result(pool.submit(0, Raise(error)))
    for task, message in ((Raise(ValueError("a bug")), "ValueError: a bug"), (raise_unknown, "Unknown: code 7")):
        with pytest.raises(RunError, match=f"a worker failed with {message}"):
            pool.result(pool.submit(0, task))
    assert pool.result(pool.submit(0, Sleep(0))) is None


def test_tasks_may_change_their_arrays_and_values_are_copies(pool: WorkerPool) -> None:
    own, shared = np.zeros(100_000), np.ones(100_000)
    handle = pool.share(shared, "the images")
    for worker in (0, 1):
        changed, other = pool.result(pool.submit(worker, Change(own, handle)))
        assert (changed[0], float(other[0]), own[0], shared[0]) == (1, 2, 0, 1)


def test_a_value_that_cannot_be_pickled_is_refused_in_a_sentence(pool: WorkerPool) -> None:
    with pytest.raises(
        UsageError, match=r"the lock cannot be sent to workers \(TypeError: .* leave --workers out"
    ):
        pool.share(threading.Lock(), "the lock")
    with pytest.raises(UsageError, match="a task cannot be sent to workers"):
        pool.submit(0, Get(threading.Lock()))  # type: ignore[arg-type]


def test_a_dead_worker_fails_all_its_tasks_and_no_other_worker_s(pool: WorkerPool) -> None:
    if isinstance(pool, ThreadPool):
        futures = [pool.submit(0, Raise(Died())), pool.submit(0, Add(1))]
    else:
        number = pool.result(pool.submit(0, process_id))
        futures = [pool.submit(0, Sleep(60)), pool.submit(0, Add(1))]
    other = pool.submit(1, Sleep(0.5))
    if not isinstance(pool, ThreadPool):
        os.kill(number, signal.SIGKILL)
    for future in [*futures, pool.submit(0, Add(1))]:
        with pytest.raises(WorkerDied) as death:
            pool.result(future)
        assert death.value.worker == 0
        assert death.value.how
    pool.result(other)
    pool.restart(0)
    assert pool.result(pool.submit(0, Add(5))) == 5
    assert pool.result(pool.submit(0, thread_count)) == pool.threads


def test_close_ends_a_worker_that_is_running_a_task(pool: WorkerPool) -> None:
    pids = (
        [] if isinstance(pool, ThreadPool) else [pool.result(pool.submit(number, process_id)) for number in (0, 1)]
    )
    futures = [pool.submit(0, Sleep(1 if isinstance(pool, ThreadPool) else 100)) for _ in range(3)]
    begun = time.monotonic()
    pool.close()
    assert time.monotonic() - begun < 5
    assert not any(map(is_running, pids))
    with pytest.raises(WorkerDied):
        pool.result(futures[-1])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


DRIVER = """
    import sys, time
    from robustkit.distributed.pool import open_pool
    from test_pools import Sleep, process_id

    if __name__ == "__main__":
        pool = open_pool(2, {ray!r})
        print(*[pool.result(pool.submit(worker, process_id)) for worker in (0, 1)], flush=True)
        pool.submit(0, Sleep(100))
        time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ray", "seconds"), [(None, 3), pytest.param("auto", 10, marks=RAY_MARKS)])
def test_workers_end_when_their_driver_is_killed(
    ray: str | None, seconds: float, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER).format(ray=ray))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    if ray:
        pytest.importorskip("ray")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    driver = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 2
        driver.kill()
        driver.wait()
        end = time.monotonic() + seconds
        while any(map(is_running, pids)):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.communicate()
        if ray:
            cluster.shutdown()
