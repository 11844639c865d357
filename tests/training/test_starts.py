"""Where members start: from a run of several or from several architectures; errors are one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ARCH, net, write_members, write_posterior
from safetensors.torch import load_file, save_file

from robustkit import load_model, train
from robustkit.core.errors import UsageError
from robustkit.data import from_arrays
from robustkit.data.samples import Samples
from robustkit.runs.training_record import Trained

NORM = {"mean": [0.4], "std": [0.2]}
NETS = [net(seed) for seed in range(3)]
WIDE = f"{__file__}:wide"


def wide() -> torch.nn.Module:
    """Another architecture, the factory for model strings."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(216, 4),
    )


def images(count: int = 16) -> Samples:
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return from_arrays((x * 255).round() / 255, torch.arange(count) % 4)


def run(out: Path, arch: str, method: str = "standard", **words: Any) -> Trained:
    words = {"epochs": 1, "batch_size": 8, "lr": 1e-9, **words}
    return train(method, images(), arch=arch, out=out, **words)


def test_each_member_starts_from_its_own_weights(tmp_path: Path) -> None:
    """At no rate, its weights are those of the member before."""
    for write in (write_members, write_posterior):
        string = write(tmp_path / write.__name__, NETS, **NORM)
        record = run(tmp_path / f"from {write.__name__}", string)
        assert record.members == 3
        assert record.mean == [0.4]
        assert record.arch == ARCH
        state = load_file(tmp_path / f"from {write.__name__}" / "model.safetensors")
        for number in range(3):
            before = load_model(f"{string}#{number}").net.linear.weight
            torch.testing.assert_close(state[f"{number}.linear.weight"], before, rtol=0, atol=1e-6)


def test_dverge_continues_from_a_baseline(tmp_path: Path) -> None:
    string = write_members(tmp_path / "base", NETS)
    record = run(tmp_path / "some", f"{string}#2+0", "dverge(baseline=0,steps=1)")
    assert record.members == 2
    state = load_file(tmp_path / "some" / "model.safetensors")
    torch.testing.assert_close(state["0.linear.weight"], NETS[2].linear.weight, rtol=0, atol=1e-6)
    assert run(tmp_path / "some", f"{string}#2+0", "dverge(baseline=0,steps=1)").hashes == record.hashes
    with pytest.raises(UsageError, match="which differs in arch"):
        run(tmp_path / "some", f"{string}#0+2", "dverge(baseline=0,steps=1)")


def test_members_may_have_different_architectures(tmp_path: Path) -> None:
    """The folder is a model, its members are models, and a run may start there."""
    arch = f"ensemble:[robustkit:digits-cnn;{WIDE}]"
    record = run(tmp_path / "a", arch, "dverge(baseline=0.5,steps=1)", epochs=2, lr=0.01)
    assert record.arch == f"ensemble:[robustkit:digits-cnn?pretrained=false&num_classes=4;{WIDE}]"
    whole = load_model(f"{tmp_path}/a/", trust_code=True)
    assert isinstance(load_model(f"{tmp_path}/a/#1", trust_code=True).net, torch.nn.Sequential)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        each = [load_model(f"{tmp_path}/a/#{number}", trust_code=True)(x).softmax(1) for number in range(2)]
        torch.testing.assert_close(whole(x), torch.stack(each).mean(0).log())
    again = run(tmp_path / "b", f"{tmp_path}/a/", trust_code=True)
    assert again.arch == record.arch
    assert run(tmp_path / "c", f"{tmp_path}/a/#1", trust_code=True).arch == WIDE
    facts = json.loads((tmp_path / "a" / "model.json").read_text())
    (tmp_path / "a" / "model.json").write_text(json.dumps(facts | {"arch": f"ensemble:[{WIDE};{WIDE};{WIDE}]"}))
    with pytest.raises(UsageError, match="is damaged"):
        load_model(f"{tmp_path}/a/")


def test_members_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    string = write_members(tmp_path / "base", NETS)
    one_net = f"one net to start all from, as --arch {tmp_path}/base/#0"
    with pytest.raises(UsageError, match=f"names 3 nets for --members 2; write --members 3, or {one_net}"):
        run(tmp_path / "x", string, members=2)
    with pytest.raises(UsageError, match=r"names 3 nets and csgld trains one; write one of them, as .*/#0"):
        run(tmp_path / "x", string, "csgld")
    with pytest.raises(UsageError, match="names nets of 4 and of 10 classes; give members of the same classes"):
        run(tmp_path / "x", f"ensemble:[{string}#0;robustkit:digits-cnn?num_classes=10]")
    with pytest.raises(UsageError, match="members are trained, not combined; leave combine out"):
        run(tmp_path / "x", f"{string}?combine=logits")
    with pytest.raises(UsageError, match="is several nets and cannot be one member"):
        run(tmp_path / "x", f"ensemble:[{string};{string}#0]")
    save_file(NETS[0].state_dict(), tmp_path / "w.safetensors")
    other = f"robustkit:digits-cnn@{tmp_path}/w.safetensors?mean=0.1"
    with pytest.raises(UsageError, match="mean, std or size differ"):
        run(tmp_path / "x", f"ensemble:[{string}#0;{other}]")
    with pytest.raises(UsageError, match="has no source: write 'robustkit:digits-cnn'"):
        run(tmp_path / "x", "digits-cnn")


def test_members_get_the_same_images_and_different_initial_weights(tmp_path: Path) -> None:
    """The first member is the net that a run of one gives, whatever the others do."""
    run(tmp_path / "one", "robustkit:digits-cnn", lr=0.1)
    run(tmp_path / "three", "robustkit:digits-cnn", lr=0.1, members=3)
    run(tmp_path / "other", "robustkit:digits-cnn", lr=0.1, seed=1)
    alone = load_file(tmp_path / "one" / "model.safetensors")
    several = load_file(tmp_path / "three" / "model.safetensors")
    assert all(torch.equal(tensor, several[f"0.{name}"]) for name, tensor in alone.items())
    weights = [several[f"{number}.linear.weight"] for number in range(3)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
