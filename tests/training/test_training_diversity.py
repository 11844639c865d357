"""Diversity of members during a run: it is in metrics.jsonl, at little cost, and changes no weight."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustkit import load_model, train
from robustkit.core.threat import ThreatModel
from robustkit.runs.run_folder import read_trained
from robustkit.training import quick_diversity
from robustkit.training.images import ImageSet

BETWEEN = {"best_member", "any_right", "all_right", "transfer", "white_box", "cosine"}


def test_every_measurement_is_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"limit": 64, "epochs": 3, "batch_size": 32, "device": "cpu", "precision": "fp32"}
    record = train("standard", members=2, out=tmp_path / "a", **words)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(record.history)
    for facts in lines:
        assert BETWEEN <= facts.keys()
        assert facts["all_right"] <= facts["best_member"] <= facts["any_right"] <= 1
        assert 0 <= facts["transfer"] <= 1
        assert 0 <= facts["white_box"] <= 1
        assert -1 <= facts["cosine"] <= 1
    monkeypatch.setattr("robustkit.training.finish.quick_diversity", lambda *_: {})
    other = train("standard", members=2, out=tmp_path / "b", **words)
    assert other.hashes == record.hashes
    assert other.cost["flops"] == record.cost["flops"]
    alone = train("standard", members=1, out=tmp_path / "c", **words)
    assert not BETWEEN & read_trained(tmp_path / "c").history[-1].keys() | BETWEEN & alone.history[-1].keys()


def test_equal_members_are_fooled_together_and_modes_are_kept() -> None:
    net = load_model("robustkit:digits-cnn").net
    assert isinstance(net, nn.Module)
    twins = [net.train(), copy.deepcopy(net).eval()]
    images = torch.rand(12, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = net(images.permute(0, 3, 1, 2)).argmax(1)
    threat = ThreatModel.parse("linf:0.5")
    found = quick_diversity.quick_diversity(twins, ImageSet(images, labels), 1000, threat)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["transfer"] == found["white_box"] == 1
    assert [one.training for one in twins] == [True, False]
    assert all(weight.grad is None for one in twins for weight in one.parameters())
    nowhere = quick_diversity.quick_diversity(twins, ImageSet(images, labels), 1000, ThreatModel.parse("linf:0"))
    assert nowhere["transfer"] == nowhere["white_box"] == 0


def test_accuracies_of_two_members_with_known_scores() -> None:
    scores = [torch.eye(3), torch.eye(3)[[0, 2, 1]]]
    found = quick_diversity.oracle_accuracies(scores, torch.tensor([0, 2, 2]))
    assert found == pytest.approx({"best_member": 2 / 3, "any_right": 1, "all_right": 1 / 3})
