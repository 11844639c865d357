"""The posterior store: samples round-trip, from a file that is mapped and written atomically."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from robustkit.core.errors import RunError, UsageError
from robustkit.posterior import FILE, Posterior, UnfinishedPosterior


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.LazyLinear(4))
        made(torch.rand(6, 2, 5, 5))
    return made.eval()


def written(run: Path, count: int = 4) -> tuple[list[dict[str, torch.Tensor]], Posterior]:
    draft = UnfinishedPosterior(run)
    states = [net(seed).state_dict() for seed in range(count)]
    assert [draft.add(state) for state in states] == list(range(count))
    return states, draft.pack()


def test_samples_round_trip(tmp_path: Path) -> None:
    states, posterior = written(tmp_path)
    assert len(posterior) == 4
    assert not (tmp_path / "samples").exists()
    mean = posterior.mean()
    for number, state in enumerate(states):
        found = posterior.state(number)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            if tensor.dim() < 2:
                assert torch.equal(found[name], tensor)
            else:
                most = (tensor - mean[name]).abs().amax()
                assert (found[name] - tensor).abs().amax() <= 2**-11 * most
    for name in ("0.weight", "0.bias", "1.running_var", "3.weight"):
        expected = torch.stack([state[name].double() for state in states]).mean(0).float()
        torch.testing.assert_close(mean[name], expected)
    assert posterior.mean()["1.num_batches_tracked"].dtype == torch.int64


def test_put_is_state(tmp_path: Path) -> None:
    _, posterior = written(tmp_path)
    x = torch.rand(3, 2, 5, 5)
    resident, loaded = net(9), net(8)
    for number in (2, 0, 2):
        posterior.put(resident, number)
        loaded.load_state_dict(posterior.state(number))
        assert torch.equal(resident(x), loaded(x))
    double = net(9).double()
    posterior.put(double, 1)
    assert torch.equal(double[0].weight.float(), posterior.state(1)["0.weight"])


def test_a_reopened_posterior_is_the_same(tmp_path: Path) -> None:
    _, posterior = written(tmp_path)
    again = Posterior.open(tmp_path)
    assert again.sha256 == posterior.sha256
    for number in range(4):
        one, other = posterior.state(number), again.state(number)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_values_do_not_underflow_or_overflow(tmp_path: Path, size: float) -> None:
    draft = UnfinishedPosterior(tmp_path)
    values = [size * torch.tensor([[1.0, -3e-4, 1e-8], [k, 0.5, 0.0]]) for k in range(3)]
    for value in values:
        draft.add({"w": value})
    posterior = draft.pack()
    for number, value in enumerate(values):
        found = posterior.state(number)["w"]
        assert found.isfinite().all()
        torch.testing.assert_close(found, value, rtol=2**-11, atol=0)


def test_equal_samples_are_kept_exactly(tmp_path: Path) -> None:
    state = net().state_dict()
    for _ in range(3):
        UnfinishedPosterior(tmp_path).add(state)
    found = UnfinishedPosterior(tmp_path).pack().state(1)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_variances_are_not_negative_after_packing(tmp_path: Path) -> None:
    """A channel that is dead in one sample: its variance must not become negative by rounding."""
    for value in (1e-9, 0.3, 0.29):
        UnfinishedPosterior(tmp_path).add({"running_var": torch.tensor([value, 100.0])})
    assert (
        UnfinishedPosterior(tmp_path).pack().state(0)["running_var"].tolist()
        == torch.tensor([1e-9, 100.0]).tolist()
    )


def test_a_resumed_run_writes_over(tmp_path: Path) -> None:
    for seed in range(4):
        UnfinishedPosterior(tmp_path).add(net(seed).state_dict())
    draft = UnfinishedPosterior(tmp_path)
    draft.keep(2)
    assert len(draft) == 2
    assert draft.add(net(7).state_dict()) == 2
    assert draft.add(net(8).state_dict(), 1) == 1
    posterior = draft.pack()
    for number, seed in enumerate((0, 8, 7)):
        assert torch.equal(posterior.state(number)["0.bias"], net(seed).state_dict()["0.bias"])


@pytest.mark.parametrize("where", ["before", "after"])
def test_packing_may_be_killed(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = written(tmp_path / "whole")
    for seed in range(4):
        UnfinishedPosterior(tmp_path / "cut").add(net(seed).state_dict())

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "replace", killed) if where == "before" else ("shutil.rmtree", killed)))
        with pytest.raises(KeyboardInterrupt):
            UnfinishedPosterior(tmp_path / "cut").pack()
    assert (tmp_path / "cut" / FILE).exists() == (where == "after")
    assert UnfinishedPosterior(tmp_path / "cut").pack().sha256 == whole.sha256
    assert [file.name for file in (tmp_path / "cut").iterdir() if file.suffix != ".part"] == [FILE]


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    states, _ = written(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / FILE)
    assert tensors["delta/3.weight"].dtype == torch.float16
    assert tensors["delta/3.weight"].shape == (4, *states[0]["3.weight"].shape)
    assert tensors["exact/1.num_batches_tracked"].shape == (4,)


def test_invalid_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no posterior sample"):
        UnfinishedPosterior(tmp_path).pack()
    with pytest.raises(RunError, match="NaN or infinite values in 'w'"):
        UnfinishedPosterior(tmp_path).add({"w": torch.tensor([[1.0, torch.nan]])})
    UnfinishedPosterior(tmp_path).add({"w": torch.ones(2, 3)})
    UnfinishedPosterior(tmp_path).add({"w": torch.ones(3, 2)})
    with pytest.raises(RunError, match="other tensors"):
        UnfinishedPosterior(tmp_path).pack()


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no posterior"):
        Posterior.open(tmp_path)
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(UsageError, match="format"):
        Posterior.open(tmp_path)
    (tmp_path / FILE).write_bytes(b"\x00" * 40)
    with pytest.raises(UsageError, match="damaged"):
        Posterior.open(tmp_path)
    _, posterior = written(tmp_path / "run")
    with pytest.raises(UsageError, match="no sample 4: write a number from 0 to 3"):
        posterior.state(4)


@pytest.mark.parametrize(
    ("left_out", "count"), [("mean/", 4), ("delta/", 4), ("scale/", 4), ("none", 0), ("none", 3), ("none", 5)]
)
def test_a_file_that_lacks_something_is_damaged(tmp_path: Path, left_out: str, count: int) -> None:
    written(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / FILE)
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
    safetensors.torch.save_file(left, tmp_path / FILE, {"format": "1", "samples": str(count)})
    with pytest.raises(UsageError, match="is damaged"):
        Posterior.open(tmp_path)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux to tell memory of files from others"
)
def test_reading_maps_the_file(tmp_path: Path) -> None:
    """40 samples of 2 MB: beside the means, nothing of them is in memory of its own."""

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    draft = UnfinishedPosterior(tmp_path)
    for seed in range(40):
        draft.add({"weight": torch.full((1000, 500), float(seed)), "bias": torch.zeros(1000)}, seed)
    draft.pack()
    net, before = nn.Linear(500, 1000), own()
    posterior = Posterior.open(tmp_path)
    for number in range(40):
        posterior.put(net, number)
    assert own() - before < 10_000
    assert float(net.weight.detach()[0, 0]) == pytest.approx(39, rel=1e-3)
