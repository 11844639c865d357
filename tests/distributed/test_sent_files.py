"""A worker on a machine that lacks a model's files gets them from the driver, and loads the same model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import runs
import torch
from nets import small
from safetensors.torch import save_file
from teams import ThreadPool

from robustkit import RunError, load_model
from robustkit.core import errors
from robustkit.distributed.sent_files import send_files
from robustkit.distributed.sent_models import SentModel
from robustkit.registry import code_files, parse_suite

NET = "nets:small"
CODE = """
from torch import nn
from sent_helper.sizes import CLASSES

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8, CLASSES))
"""
ATTACK = """
from dataclasses import dataclass
from robustkit.registry import attack

@attack("mine", paper="", norms=("linf",), access="gradient")
@dataclass(frozen=True)
class Mine:
    def __call__(self, model, x, goal, threat, *, rng):
        return x
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Files of a driver on another machine, which are gone once the folder is renamed."""
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(code_files, "_loaded", {})
    folder = tmp_path / "driver"
    (folder / "sent_helper").mkdir(parents=True)
    (folder / "sent_helper" / "sizes.py").write_text("CLASSES = 10\n")
    (folder / "net.py").write_text(CODE)
    (folder / "mine.py").write_text(ATTACK)
    for seed in (0, 1):
        save_file(small(seed=seed).state_dict(), folder / f"{seed}.safetensors")
    net = load_model(f"{folder}/net.py:build").net
    save_file(net.state_dict(), folder / "net.safetensors")
    runs.write_single(folder / "run", runs.net(3))
    runs.write_posterior(folder / "posterior", [runs.net(seed) for seed in (4, 5)])
    yield folder
    errors.relocated.clear()


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    with closing(ThreadPool(1)) as pool:
        pool.shares_files = False
        yield pool


@pytest.mark.parametrize(
    ("string", "count"),
    [
        (f"{NET}@{{}}/0.safetensors", 1),
        (f"ensemble:[{NET}@{{}}/0.safetensors;{NET}@{{}}/1.safetensors]?combine=logits", 2),
        ("{}/run/", 2),
        ("{}/posterior/#1", 2),
        ("{}/net.py:build@{}/net.safetensors", 3),
    ],
)
def test_a_machine_without_the_files_loads_the_same_model(
    string: str, count: int, folder: Path, pool: ThreadPool, tmp_path: Path
) -> None:
    model = load_model(string.replace("{}", str(folder)))
    sent = SentModel.of(pool, model)
    assert sum(len(file.parts) for file in sent.files) == count
    assert sent.load(torch.device("cpu")).string == model.string
    assert not (tmp_path / "cache").exists()
    folder.rename(tmp_path / "gone")
    for _ in range(2):
        found = sent.load(torch.device("cpu"))
        assert str(folder) not in found.string
        assert found.fingerprint == model.fingerprint


def test_a_plug_in_file_is_found_by_its_relative_path(
    folder: Path, pool: ThreadPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    parse_suite("./mine.py:Mine", "linf")
    files = send_files(pool, NET)
    folder.rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    code_files._loaded.clear()
    for file in files:
        file.place()
    (entry,) = parse_suite("./mine.py:Mine", "linf")
    assert entry.attack.info.name == "mine"


def test_workers_that_see_the_driver_s_files_are_sent_none(folder: Path, pool: ThreadPool) -> None:
    pool.shares_files = True
    assert send_files(pool, f"{folder}/run/") == ()


def test_a_file_that_cannot_be_read_is_an_error_in_a_sentence(folder: Path, pool: ThreadPool) -> None:
    string = f"{folder}/net.py:build"
    (folder / "net.py").unlink()
    with pytest.raises(RunError, match=r"cannot send .*net\.py to workers: No such file .*; put it back"):
        send_files(pool, string)
