"""A Ray cluster of two nodes on this machine gives the verdicts of one process, also if a node goes away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from robustkit import craft, evaluate, load_data, load_model
from robustkit.engine.progress import Progress
from robustkit.runs.craft_record import Craft
from robustkit.runs.evaluation_record import Report

pytestmark = [
    pytest.mark.slow,
    # Ray's own, at its start and end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SUITE = "pgd(steps=10),apgd(steps=30),square(queries=200)"


class Removing(Progress):
    """Takes a node away once the attacks are on their way."""

    def __init__(self, take: object) -> None:
        self.take, self.looks, self.said = take, 0, list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)

    def advance(self, done: float, robust: int) -> None:
        if "2 workers at work" in "".join(self.said):
            self.looks += 1
            if self.looks == 6:
                self.take()


def run(**settings: Any) -> Report:
    samples = load_data("digits:test").head(24)
    return evaluate(
        load_model("robustkit:digits-cnn"), samples, None, "linf:0.12", suite=SUITE, precision="fp32", **settings
    )


def crafted(**settings: Any) -> Craft:
    samples = load_data("digits:test").head(24)
    # Streamed nets are run as they are; of others two runs may choose another memory layout.
    said = {"attack": "mi-fgsm(steps=5)+di", "batch_size": 4, "streaming": True, **settings}
    return craft(["robustkit:digits-cnn"], samples, None, "linf:0.12", **said)


def same(one: Report, other: Report) -> None:
    assert one.run_id == other.run_id
    assert [(v.robust, v.attack) for v in one.verdicts] == [(v.robust, v.attack) for v in other.verdicts]
    assert np.allclose([v.margin for v in one.verdicts], [v.margin for v in other.verdicts], atol=1e-4)


def test_two_nodes_and_then_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    # Ray's processes are nice to all others, which on a busy machine means that they do nothing.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    alone = run()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        both = run(ray=cluster.address)
        same(alone, both)
        assert both.environment["workers"] == 2
        one, many = crafted(), crafted(ray=cluster.address)
        assert np.array_equal(one.adversarial["x"], many.adversarial["x"])
        watch = Removing(lambda: cluster.remove_node(node, allow_graceful=False))
        same(alone, run(ray=cluster.address, progress=watch))
        assert any("has died" in line for line in watch.said)
    finally:
        cluster.shutdown()
