"""Stems, probes and self-ensembles: B-P18, B-P19, hooks at layers of any net, the protocol of a deployed one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustkit import load_model, train
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.data import load_data
from robustkit.defenses.multiresolution.probes import default_layers, flat, layer_outputs
from robustkit.defenses.multiresolution.self_ensemble import (
    BACKBONE,
    SelfEnsemble,
    default_aggregator,
    self_ensemble,
)
from robustkit.defenses.multiresolution.stack import MultiResolution
from robustkit.defenses.multiresolution.stem import widen
from robustkit.models.ensembles.aggregation import AGGREGATORS, crossmax, parse_aggregator
from robustkit.models.randomness import Noise, drawing, drawn, set_noise
from robustkit.registry import make_method
from robustkit.training.loop import take_step
from robustkit.training.method import Batch, Plan

PLAN = Plan(samples=48, classes=4, batch_size=16, epochs=4, lr=0.01)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(45, 4),
        )


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ensemble(seed: int = 0, **fields: Any) -> SelfEnsemble:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make_method("multires", **fields).wrap(net(seed), images(1), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert isinstance(made, SelfEnsemble)
    return made.eval()


def batch(step: int = 0) -> Batch:
    rows = torch.arange(16)
    return Batch(images(), rows % 4, RowRng(0, "method", rows, step=step), step)


def timm_net(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    made: nn.Module = timm.create_model(name, num_classes=4)
    return made


@pytest.mark.parametrize("stem", ["fresh", "inflated"])
@pytest.mark.parametrize("arch", ["own", "zoo", "torchvision", "timm"])
def test_a_stem_changes_one_tensor(stem: str, arch: str) -> None:
    """B-P19: 3R channels, and all else bit for bit; inflated, a stack of one image is that image."""
    if arch == "torchvision":
        model: Any = pytest.importorskip("torchvision").models.resnet18(num_classes=4)
    elif arch == "timm":
        model = timm_net("resnet10t")
    else:
        model = net() if arch == "own" else load_model("robustkit:cifar-resnet20?pretrained=false").net
    model.eval()
    x = torch.rand(2, 3, 8 if arch == "own" else 32, 8 if arch == "own" else 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(x)
    widen(model, x[:1], 4, stem)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    own_bias = arch == "own" and stem == "fresh"
    assert len(changed) == 1 + own_bias
    assert model.state_dict()[changed[0]].shape[1] == 12
    again = model(x.repeat(1, 4, 1, 1))
    assert torch.allclose(again, plain, atol=1e-4) == (stem == "inflated")
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_transformer_takes_stacks_too() -> None:
    model = timm_net("test_vit")
    layers = default_layers(model, torch.zeros(1, 3, 160, 160))
    assert any(name.startswith("blocks.") for name in layers)
    method = make_method("multires", pooled=True, layers="+".join(layers[-2:]))
    whole = method.wrap(model, torch.zeros(1, 3, 160, 160), None, None).eval()
    assert whole.stacked(torch.rand(2, 3, 160, 160)).shape == (2, 3, 4)


@pytest.mark.parametrize("wrong", [nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), nn.Conv2d(3, 3, 3, groups=3)])
def test_a_net_without_such_a_layer_is_refused(wrong: nn.Module) -> None:
    with pytest.raises(UsageError, match="convolution"):
        widen(wrong, images(1), 4)
    with pytest.raises(UsageError, match="no stem 'old'"):
        widen(net(), images(1), 4, "old")


def test_layers_are_seen_as_they_are() -> None:
    model, x = net().eval(), images()
    features, logits = layer_outputs(model, x, ("4", "1"))
    assert torch.equal(features[0], model[:5](x))
    assert torch.equal(features[1], model[:2](x))
    assert torch.equal(logits, model(x))
    assert flat(features[0], pooled=False).shape == (16, 45)
    assert torch.equal(flat(features[0], pooled=True), features[0].mean((2, 3)))
    assert not any(part._forward_hooks for part in model.modules())


def test_default_layers_are_late_blocks() -> None:
    resnet: Any = load_model("robustkit:cifar-resnet20?pretrained=false").net
    found = default_layers(resnet, torch.zeros(1, 3, 32, 32))
    assert found == ("layer1.2", *(f"layer{stage}.{block}" for stage in (2, 3) for block in range(3)))
    digits: Any = load_model("robustkit:digits-cnn").net
    assert default_layers(digits, torch.zeros(1, 1, 8, 8)) == ("conv1", "conv2", "conv3")
    with pytest.raises(UsageError, match="no layer 'layer9'"):
        ensemble(layers="layer9")


def test_logits_are_those_of_the_parts() -> None:
    """`stacked` gives each predictor's logits; `combine` names what makes one answer of them."""
    whole, x = ensemble(layers="1+4"), images()
    set_noise(whole, Noise("frozen", 3))
    stack = whole.stacked(x)
    assert stack.shape == (16, 3, 4)
    stacks = whole.stack(x, Noise("frozen", 3).rng(x))
    mean, std = (torch.tensor(values * 2).view(1, -1, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1]))
    assert torch.allclose(stack[:, 2], whole.backbone((stacks - mean) / std), atol=1e-5)
    assert whole.combine == "crossmax:2"
    assert torch.equal(whole(x), crossmax(stack, 2))
    for name in AGGREGATORS:
        whole.combine = name
        assert torch.equal(whole(x), parse_aggregator(name)(stack))
    assert [default_aggregator(count)[-1] for count in (2, 3, 4, 5, 8, 54)] == ["2", "2", "2", "3", "3", "3"]


def test_stacks_are_enlarged_for_the_backbone() -> None:
    whole = make_method("multires", enlarge=16, layers="conv1").wrap(
        load_model("robustkit:digits-cnn").net, torch.zeros(1, 1, 8, 8), None, None
    )
    x = torch.rand(2, 1, 8, 8)
    assert whole.normalised_stack(x, Noise("frozen").rng(x)).shape == (2, 2, 16, 16)
    assert whole.probes[0][0].num_features == 32 * 16 * 16


def test_views_are_smooth_and_still() -> None:
    """No draw and no aggregator in the way: the same gradient each time, of all predictors' mean logits."""
    whole, x = ensemble(layers="1+4"), images()
    for noise, view in zip(("calm", "frozen"), whole.views().values(), strict=True):
        answer = view(x)
        assert torch.equal(answer, view(x))
        with drawn(whole, Noise(noise)):
            assert torch.allclose(answer, whole.stacked(x).mean(1))
    assert set(whole.views()) == {"mean-logit-calm", "mean-logit-frozen"}
    assert whole.noise == Noise()


def test_a_policy_can_be_set_and_is_given_back() -> None:
    whole, x = ensemble(layers="4"), images()
    with torch.no_grad():
        assert not torch.equal(whole(x), whole(x))
        with drawn(whole, Noise("frozen")):
            assert torch.equal(whole(x), whole(x))
    assert whole.noise == Noise()
    assert drawing(nn.Sequential(whole)) == [whole]
    assert not set_noise(net(), Noise())


@pytest.mark.parametrize("fields", [{}, {"attack": "fgsm"}, {"attack": "pgd", "steps": 2}])
def test_probes_leave_the_backbone_as_it_is(fields: dict[str, Any]) -> None:
    """B-P18: weights and running statistics, bit for bit; and before, the probes are left alone."""
    method = make_method("multires", probing=0.5, **fields)
    whole = ensemble(layers="1+4").train()
    optimizer = method.optimizer(whole.parameters(), PLAN)
    for step in range(PLAN.steps):
        before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        optimizer.zero_grad()
        assert method.backward([whole], batch(step), PLAN).isfinite()
        take_step(method, [optimizer], step, PLAN)
        changed = {name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, before[name])}
        part, other = ("backbone.", "probes.") if step < PLAN.steps / 2 else ("probes.", "backbone.")
        assert any(name.startswith(part) for name in changed)
        assert not any(name.startswith(other) for name in changed)
        assert f"{part}1.running_mean" in changed or "probes.0.0.running_mean" in changed
    assert whole.training


def test_each_probe_learns_as_if_alone() -> None:
    """The gradient of a probe is that of its own cross-entropy, however many there are."""
    method, one = make_method("multires", probing=0.5), batch(PLAN.steps - 1)
    whole = ensemble(layers="1+4").train()
    loss = method.backward([whole], one, PLAN)
    whole.backbone.eval()
    stacks = whole.normalised_stack(one.x, replace(one.rng, stream="method/stack0"))
    features, _ = layer_outputs(whole.backbone, stacks, whole.layers)
    losses = [
        nn.functional.cross_entropy(probe(flat(each, False).detach()), one.y)
        for probe, each in zip(whole.probes, features, strict=True)
    ]
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)
    slope = torch.autograd.grad(losses[1], whole.probes[1][1].weight)[0]
    assert torch.allclose(whole.probes[1][1].weight.grad, slope, atol=1e-6)


def test_adversarial_images_are_in_the_ball_and_worse() -> None:
    """FGSM goes the whole way in one step; each member has images of its own, the same at each call."""
    one = batch()
    whole = ensemble(layers="4").train()
    for name, corners in (("fgsm", 0.99), ("pgd", 0.1)):
        method = make_method("multires", attack=name, threat="linf:0.05", steps=3)
        x = method._attacked(whole, whole, one, 0)
        assert ((x - one.x).abs() <= 0.05 + 1e-6).all()
        assert (x >= 0).all()
        assert (x <= 1).all()
        inside = (one.x > 0.05) & (one.x < 0.95)
        assert float(((x - one.x).abs()[inside] > 0.0499).float().mean()) > corners
        assert not torch.equal(x, method._attacked(whole, whole, one, 1))
        assert torch.equal(x, method._attacked(whole, whole, one, 0))

        def loss(x: Tensor) -> float:
            draws = RowRng(0, "other", torch.arange(16))
            with torch.no_grad(), whole.eval().training_part(BACKBONE, draws):
                return float(nn.functional.cross_entropy(whole(x), one.y))

        assert loss(x) > loss(one.x)
        whole.train()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("multires") / "run"
    method = make_method("multires", layers="conv2+conv3", attack="fgsm")
    digits = load_data("digits:train").head(128)
    train(method, digits, arch="robustkit:digits-cnn", out=folder, epochs=2, members=2, batch_size=64, test=digits)
    return folder


def test_a_run_is_a_model(run: Path) -> None:
    """The policy stands in the string and in the fingerprint; a member is a self-ensemble, all of them several."""
    whole, one = load_model(f"{run}/"), load_model(f"{run}/#1")
    assert [type(part) for part in whole.net.nets] == [SelfEnsemble] * 2
    assert self_ensemble(one).combine == "crossmax:2"
    x = torch.rand(4, 1, 8, 8)
    frozen = load_model(f"{run}/#1?noise=frozen:3")
    with torch.no_grad():
        assert torch.equal(frozen(x), frozen(x))
        assert not torch.equal(one(x), one(x))
        assert torch.equal(load_model(frozen.string)(x), frozen(x))
    assert one.string.endswith("#1?noise=fresh")
    assert len({model.fingerprint for model in (whole, one, frozen, load_model(f"{run}/#1?noise=content"))}) == 4
    with pytest.raises(UsageError, match="no noise 'quiet'"):
        load_model(f"{run}/?noise=quiet")


def test_only_nets_that_draw_have_a_policy(tmp_path: Path) -> None:
    digits = load_data("digits:train").head(64)
    train("standard", digits, arch="robustkit:digits-cnn", out=tmp_path, epochs=1, batch_size=64, test=digits)
    with pytest.raises(UsageError, match="draws no random numbers"):
        load_model(f"{tmp_path}/?noise=frozen")
    assert "noise" not in load_model(f"{tmp_path}/").string


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preset": "book"}, "no preset"),
        ({"attack": "cw"}, "no attack"),
        ({"resolutions": "32,16"}, "joined by plus signs"),
        ({"contrast": "1-2"}, "LOW:HIGH"),
        ({"contrast": "0.5:1:2"}, "LOW:HIGH"),
        ({"colour": "0:inf"}, "must rise"),
        ({"colour": "nan"}, "must rise"),
        ({"colour": "1:0.5"}, "must rise"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_method("multires", **fields)


def test_impossible_runs_are_refused() -> None:
    with pytest.raises(UsageError, match="--epochs must be at least 2, got 1"):
        make_method("multires").check_plan(replace(PLAN, epochs=1))
    with pytest.raises(UsageError, match="not from a self-ensemble"):
        make_method("multires").wrap(ensemble(layers="4"), images(1), None, None)
    with pytest.raises(UsageError, match="no logits"):
        make_method("multires").wrap(nn.Sequential(nn.Conv2d(3, 4, 3)), images(1), None, None)
    with pytest.raises(UsageError, match="not a self-ensemble"):
        self_ensemble(net())
    fields = make_method("multires", preset="paper", noise=0.1, jitter=2, resolutions="8+2", colour="1")
    assert fields.stack(32) == MultiResolution((8, 2), 0.1, 0.1, 2, (0.7, 1.5), (1, 1))
