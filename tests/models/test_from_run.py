"""Run folders as model strings: one net, members, posterior samples, whole and in part."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from runs import ARCH, net, write_members, write_posterior, write_single
from torch import nn

from robustkit import load_model
from robustkit.core.errors import UsageError
from robustkit.engine.model.batchnorm_folding import folded
from robustkit.posterior import Posterior

X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NETS = [net(seed) for seed in range(5)]
NORM = {"mean": [0.4], "std": [0.2]}
RESNET = "robustkit:cifar-resnet20?num_classes=4"


def mean_of(models: Sequence[torch.nn.Module], x: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(x).double().softmax(1) for model in models]).mean(0).log()


def test_a_run_of_one_net_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    string = write_single(tmp_path / "one", NETS[1], **NORM)
    model = load_model(string)
    torch.testing.assert_close(model(X), NETS[1]((X - 0.4) / 0.2))
    assert model.num_classes == 4
    assert model.string == string
    assert not model.training
    monkeypatch.chdir(tmp_path)
    for other in ("one", "one/", "./one/", "one/#0"):
        assert load_model(other).fingerprint == model.fingerprint
    assert load_model(load_model("one").string).fingerprint == model.fingerprint
    assert load_model("one?mean=0").fingerprint != model.fingerprint
    assert load_model("one?defense=bit-depth:3").defenses
    with pytest.raises(UsageError, match="no field of folder models 'num_classes'"):
        load_model("one?num_classes=3")


def test_a_run_has_the_fingerprint_of_its_net(tmp_path: Path) -> None:
    string = write_single(tmp_path / "one", NETS[1])
    assert (
        load_model(string).fingerprint
        == load_model(f"robustkit:digits-cnn@{tmp_path}/one/model.safetensors").fingerprint
    )


def test_members_load_together_and_by_number(tmp_path: Path) -> None:
    string = write_members(tmp_path / "several", NETS[:3])
    torch.testing.assert_close(load_model(string)(X).double(), mean_of(NETS[:3], X), rtol=1e-4, atol=1e-5)
    for number in range(3):
        assert torch.equal(load_model(f"{string}#{number}")(X), NETS[number](X))
    subset = load_model(f"{string}#2+0")
    torch.testing.assert_close(subset(X).double(), mean_of([NETS[2], NETS[0]], X), rtol=1e-4, atol=1e-5)
    names = ("", "#0", "#1", "#2+0", "#0-1")
    assert len({load_model(string + name).fingerprint for name in names}) == len(names)


@pytest.mark.parametrize("arch", [ARCH, RESNET])
def test_samples_load_together_and_by_number(tmp_path: Path, arch: str) -> None:
    nets = [net(seed, arch) for seed in range(5)]
    x = X if arch == ARCH else torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    string = write_posterior(tmp_path / "posterior", nets, arch=arch)
    store = Posterior.open(tmp_path / "posterior")
    singles = [load_model(f"{string}#{number}") for number in range(5)]
    for number, single in enumerate(singles):
        twin = net(9, arch)
        twin.load_state_dict(store.state(number))
        assert torch.equal(single(x), twin(x))
        torch.testing.assert_close(single(x), nets[number](x), rtol=1e-2, atol=1e-2)
    whole = load_model(string)
    with torch.no_grad():
        torch.testing.assert_close(whole(x).double(), mean_of(singles, x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            load_model(f"{string}#1-3")(x).double(), mean_of(singles[1:4], x), rtol=1e-4, atol=1e-5
        )


def test_the_gradient_through_samples(tmp_path: Path) -> None:
    """Weights are put in again on the way back: the gradient is that of nets which are all there."""
    string = write_posterior(tmp_path / "posterior", NETS)
    singles = [load_model(f"{string}#{number}") for number in range(5)]
    found, expected = (x.requires_grad_() for x in (X.clone(), X.clone()))
    whole = load_model(string)
    slopes = torch.rand(3, 4)
    (whole(found) * slopes).sum().backward()
    (mean_of(singles, expected) * slopes).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in whole.parameters())


def test_mean_probabilities_are_finite_for_any_logits(tmp_path: Path) -> None:
    nets = [net(seed) for seed in range(2)]
    for one in nets:
        one.linear.weight.data.mul_(1e5)
    for write in (write_members, write_posterior):
        model = load_model(write(tmp_path / write.__name__, nets))
        x = X.clone().requires_grad_()
        logits = model(x)
        logits.max(1).values.sum().backward()
        assert logits.isfinite().all()
        assert x.grad.isfinite().all()


def test_the_fingerprint_covers_all_samples(tmp_path: Path) -> None:
    string = write_posterior(tmp_path / "a", NETS)
    model = load_model(string)
    first = model.fingerprint
    model(X)
    assert model.fingerprint == first == load_model(write_posterior(tmp_path / "b", NETS)).fingerprint
    assert load_model(write_posterior(tmp_path / "c", NETS[::-1])).fingerprint != first
    assert load_model(f"{string}#0-3").fingerprint != first
    assert load_model(f"{string}#3").weights_sha256 != load_model(f"{string}#2").weights_sha256


def test_a_copy_has_its_own_net_and_shares_the_posterior(tmp_path: Path) -> None:
    model = load_model(write_posterior(tmp_path / "a", NETS))
    twin = copy.deepcopy(model)
    expected = model(X)
    assert twin.net.posterior is model.net.posterior
    twin.net.at(3)
    assert torch.equal(model(X), expected)


def test_batch_norms_of_an_ensemble_are_folded_but_not_those_of_posterior_samples(tmp_path: Path) -> None:
    """A trace would hold the last sample's weights for all."""
    nets = [net(seed, RESNET) for seed in range(2)]
    x = torch.rand(2, 3, 32, 32)
    ensemble = load_model(write_members(tmp_path / "members", nets, arch=RESNET))
    twin = folded(ensemble, x)
    assert twin is not None
    assert not any(isinstance(part, nn.BatchNorm2d) for part in twin.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in ensemble.modules())
    assert torch.allclose(twin(x), ensemble(x), atol=1e-4)
    assert folded(load_model(write_posterior(tmp_path / "posterior", nets, arch=RESNET)), x) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "has format 2; this version of robustkit reads 1"),
        ({"arch": None}, "arch is null but must be a text"),
        ({"mean": "0.5"}, 'mean is "0.5" but must be a list'),
        ({"mean": ["a"]}, r'mean\[0\] is "a" but must be a number'),
        ({"class_names": "cat"}, 'class_names is "cat" but must be a list'),
        ({"members": 0}, "members is 0 but must be from 1"),
        ({"hashes": None}, "is damaged"),
        ({"hashes": {"posterior.safetensors": "0"}}, "there is no posterior"),
        ({"arch": "runs/x/"}, "names 'runs/x/' as the architecture"),
        ({"hashes": {"model.safetensors": "0"}}, "is not the file that the training wrote"),
    ],
)
def test_a_changed_run_folder_is_refused(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    string = write_single(tmp_path / "one", NETS[0], **change)
    with pytest.raises(UsageError, match=sentence):
        load_model(string)


def test_numbers_of_missing_members_are_refused(tmp_path: Path) -> None:
    strings = [write_posterior(tmp_path / "a", NETS[:2]), write_members(tmp_path / "b", NETS[:2])]
    for string, what in zip(strings, ("samples", "members"), strict=True):
        with pytest.raises(UsageError, match=f"names number 2 but 2 {what}: write numbers from 0 to 1"):
            load_model(f"{string}#2")
        with pytest.raises(UsageError, match="names number 1 twice"):
            load_model(f"{string}#0-1+1")
        for text in ("#x", "#", "#-1", "#1.5", "#1-0", "#0-999999999"):
            with pytest.raises(UsageError, match="write numbers after '#'"):
                load_model(f"{string}{text}")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    string = write_posterior(tmp_path / "a", NETS[:2])
    body = bytearray((tmp_path / "a" / "posterior.safetensors").read_bytes())
    body[-1] ^= 1
    (tmp_path / "a" / "posterior.safetensors").write_bytes(body)
    with pytest.raises(UsageError, match="not the file that the training wrote"):
        load_model(string)
    (tmp_path / "a" / "model.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        load_model(string)
    write_single(tmp_path / "b", NETS[0])
    facts = json.loads((tmp_path / "b" / "model.json").read_text()) | {"arch": RESNET}
    (tmp_path / "b" / "model.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="lacks"):
        load_model(f"{tmp_path}/b/")
