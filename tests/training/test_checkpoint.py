"""A damaged checkpoint is not resumed; the one before it is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustkit import RunError, UsageError, load_data, train
from robustkit.posterior import UnfinishedPosterior
from robustkit.posterior.digest import digest
from robustkit.reporting.versions import made_in_parts
from robustkit.runs import versions as made
from robustkit.runs.ledger import Ledger
from robustkit.runs.versions import continued, record_part
from robustkit.training import checkpoint
from robustkit.training.method import Method, Plan
from robustkit.training.progress import TrainProgress

SHORT: dict[str, Any] = {
    "limit": 24,
    "epochs": 4,
    "batch_size": 12,
    "lr": 0.1,
    "test": load_data("digits:test").head(9),
}
PLAN = Plan(samples=24, classes=10, batch_size=12, epochs=4, lr=0.1, members=1, seed=0)


class RecordedMessages(TrainProgress):
    """Records messages, and may stop after some steps."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.messages = stop, list[str]()

    def say(self, text: str) -> None:
        self.messages.append(text)

    def step(self, done: int) -> None:
        if done == self.stop:
            raise KeyboardInterrupt


def with_flipped_bits(path: Path) -> None:
    """Flip four bits in the middle of the largest tensor."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 4):
        content[place] ^= 1
    path.write_bytes(bytes(content))


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    whole = train("standard", out=tmp_path / "whole", **SHORT)
    with pytest.raises(KeyboardInterrupt):
        train("standard", out=tmp_path / "cut", progress=RecordedMessages(7), **SHORT)
    with_flipped_bits(tmp_path / "cut" / "checkpoint.pt")
    heard = RecordedMessages()
    resumed = train("standard", out=tmp_path / "cut", progress=heard, **SHORT)
    assert "checkpoint.pt is damaged: its content does not match its sha256; resuming" in heard.messages[0]
    assert f"resuming {whole.run_id}: 4 of 8 steps done" in heard.messages
    assert resumed.hashes == whole.hashes
    assert not (tmp_path / "cut" / "checkpoint.previous.pt").exists()


def test_two_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("standard", out=tmp_path, progress=RecordedMessages(7), **SHORT)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        with_flipped_bits(tmp_path / name)
    with pytest.raises(UsageError, match=r"checkpoint.pt is damaged: .*--overwrite"):
        train("standard", out=tmp_path, **SHORT)


def with_valid_digest(**changes: Any) -> bytes:
    """Return the bytes of a checkpoint with changed values and a matching digest."""
    facts = [{"epoch": 1}, {"epoch": 2}]
    body: dict[str, Any] = {"step": 5, "kept": 0, "loss": torch.tensor(1.5), "seconds": 2.0, "forwards": 9}
    body |= {"history": json.dumps(facts), "backwards": 9, "nets": [], "optimizers": [], "averages": []}
    body |= {"memory": None, "parts": "[]", **changes}
    body["sha256"] = digest(body)
    file = io.BytesIO()
    torch.save(body, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": -5}, "step is -5, and must be from 0 to 8"),
        ({"step": 9}, "step is 9, and must be"),
        ({"step": 5.0}, "step is 5.0"),
        ({"step": True}, "step is True"),
        ({"kept": -1}, "kept is -1, and must be 0"),
        ({"kept": 3}, "kept is 3, and must be 0"),
        ({"history": "[]"}, "epochs is 0, and must be 2 at step 5"),
        ({"history": "{"}, "cannot be read"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"forwards": -1}, "forwards is -1"),
        ({"backwards": float("inf")}, "backwards is inf"),
        ({"loss": torch.tensor(float("nan"))}, "loss is nan, and must be finite"),
    ],
)
def test_values_out_of_range_are_refused_even_with_a_matching_digest(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(with_valid_digest())
    assert checkpoint.find_checkpoint(tmp_path, Method(), PLAN) is not None
    (tmp_path / "checkpoint.pt").write_bytes(with_valid_digest(**changes))
    with pytest.raises(UsageError, match=words):
        checkpoint.find_checkpoint(tmp_path, Method(), PLAN)


def test_a_changed_value_without_a_matching_digest_is_refused(tmp_path: Path) -> None:
    body = torch.load(io.BytesIO(with_valid_digest()), weights_only=True)
    torch.save({**body, "step": 4}, tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="does not match its sha256"):
        checkpoint.find_checkpoint(tmp_path, Method(), PLAN)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "b": state["b"] + 1},
        lambda state: {"b": state["b"], "a": state["a"]},
        lambda state: {**state, "a": state["a"].reshape(3, 2)},
        lambda state: {**state, "a": state["a"].double()},
        lambda state: {**state, "c": [1, 2]},
        lambda state: {**state, "c": [1.0, "2"]},
    ],
)
def test_the_digest_covers_every_value(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.bfloat16), "c": [1, "2"]}
    assert digest(state) == digest(dict(state))
    assert digest(change(state)) != digest(state)


def test_a_changed_sample_is_refused_before_packing(tmp_path: Path) -> None:
    draft = UnfinishedPosterior(tmp_path)
    for value in (1.0, 2.0):
        draft.add({"w": torch.full((50, 40), value), "n": torch.tensor(3)})
    with_flipped_bits(tmp_path / "samples" / "0001.safetensors")
    with pytest.raises(RunError, match=r"0001.safetensors has changed since it was written"):
        draft.pack()
    assert not (tmp_path / "posterior.safetensors").exists()


def test_versions_of_resumed_parts_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = continued([], "step 0")
    assert continued(here, "step 7") == here
    with Ledger.open(tmp_path / "l", "id") as ledger:
        assert record_part(ledger) == record_part(ledger)
    monkeypatch.setattr(made, "versions", lambda: {"robustkit": "9", "torch": "8"})
    both = continued(here, "step 7")
    assert both == [*here, {"from": "step 7", "robustkit": "9", "torch": "8"}]
    assert made_in_parts({"parts": here}) == made_in_parts({}) == ""
    assert made_in_parts({"parts": both}).endswith(
        f"torch {here[0]['torch']}, from step 7 on robustkit 9 with torch 8"
    )
    with Ledger.open(tmp_path / "l", "id") as ledger:
        assert [part["torch"] for part in record_part(ledger)] == [here[0]["torch"], "8"]
