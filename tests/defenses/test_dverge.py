"""DVERGE: oracles of one and two pixels, the properties of its batches, and what went wrong in other code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustkit import load_model
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.models.layers.features import depth, distil, features
from robustkit.registry import make_method
from robustkit.training.ensemble_utils import BATCH_NORM_POLICIES, batch_norm_policy, ensemble_log_probabilities
from robustkit.training.method import Batch, Plan

PLAN = Plan(samples=64, classes=4, batch_size=16, epochs=4, lr=0.05, members=3)


class Linear(nn.Module):
    """A weighted sum of pixels as the only feature."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weights[:, None]


def net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(60, 4),
        ).train()


def nets(count: int = 3) -> list[nn.Sequential]:
    return [net(seed) for seed in range(count)]


def batch(step: int = 40, count: int = 16) -> Batch:
    draw = torch.Generator().manual_seed(1)
    x, t = torch.rand(2, count, 3, 7, 9, generator=draw)
    y, u = torch.arange(count) % 4, torch.arange(count) % 3
    return Batch(x, y, RowRng(0, "method", torch.arange(count), step=step), step, t, u)


def image(*pixels: float) -> Tensor:
    return torch.tensor(pixels, dtype=torch.float64).view(1, 1, 1, -1)


RISING = [0.507, 0.514, 0.521, 0.528, 0.535, 0.542, 0.549, 0.556, 0.563, 0.570]


@pytest.mark.parametrize(
    ("target", "inertia", "path"),
    [
        (0.9, 1.0, RISING),
        (0.9, 0.0, RISING),
        (0.52, 1.0, [0.507, 0.514, 0.521, 0.528, 0.535, 0.535, 0.528, 0.521, 0.514, 0.507]),
        (0.52, 0.0, [0.507, 0.514, 0.521, 0.514, 0.521, 0.514, 0.521, 0.514, 0.521, 0.514]),
    ],
)
def test_one_pixel_walks_as_computed_by_hand(target: float, inertia: float, path: list[float]) -> None:
    """A.11, and A-P4: what cannot be reached ends on the face of the ball."""
    model = Linear(1.0).double()
    for steps, value in enumerate(path, 1):
        # Normalised, every gradient is 1 or -1, so that with inertia the sixth of them leaves exactly 0.
        x = distil(model, image(0.5), image(target), 1, eps=0.07, step_size=0.1, steps=steps, inertia=inertia)
        assert float(x) == pytest.approx(value, abs=1e-6), steps


def test_two_pixels_walk_as_computed_by_hand() -> None:
    model = Linear(2.0, -1.0).double()
    for steps, values in ((1, (0.507, 0.493)), (10, (0.57, 0.43))):
        x = distil(model, image(0.5, 0.5), image(0.9, 0.1), 1, eps=0.07, step_size=0.1, steps=steps, inertia=1)
        assert x.flatten().tolist() == pytest.approx(values, abs=1e-6)
    assert float(model(x).detach()) == pytest.approx(0.71, abs=1e-6)


def test_layers_are_inputs_of_activations_and_the_logits() -> None:
    """Those of the paper in a ResNet-20, its blocks' sums among them; and every value is before the activation."""
    model = load_model("robustkit:cifar-resnet20?pretrained=false").net
    assert isinstance(model, nn.Module)
    x = torch.rand(2, 3, 32, 32)
    assert depth(model.train(), x[:1]) == 20
    assert model.training
    model.eval()
    shapes = [tuple(features(model, x, layer).shape[1:]) for layer in range(1, 21)]
    assert shapes == [(16, 32, 32)] * 7 + [(32, 16, 16)] * 6 + [(64, 8, 8)] * 6 + [(10,)]
    assert all(features(model, x, layer).min() < 0 for layer in range(1, 20))
    assert torch.equal(features(model, x, 1), features(model, x, "bn1"))
    assert torch.equal(features(model, x, 2), features(model, x, "layer1.0.bn1"))
    assert torch.equal(features(model, x, 3).relu(), features(model, x, "layer1.0"))
    assert torch.equal(features(model, x, 20), model(x))
    assert not any(part._forward_hooks for part in model.modules())
    with pytest.raises(UsageError, match="no layer 'layer9'"):
        features(model, x, "layer9")


def test_a_pass_ends_at_its_layer() -> None:
    ran: list[int] = []
    model = nets(1)[0]
    for number, part in enumerate(model):
        part.register_forward_hook(lambda *_, number=number: ran.append(number))
    features(model, batch().x, 2)
    assert max(ran) == 3


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("policy", BATCH_NORM_POLICIES)
def test_distilled_images_stay_in_ball_and_box(start: bool, policy: str) -> None:
    """A-P1."""
    one = batch()
    method = make_method("dverge", random_start=start, statistics=policy)
    for x in method.distilled(nets(), one, PLAN):
        assert (x >= (one.x - 0.07).clamp(min=0)).all()
        assert (x <= (one.x + 0.07).clamp(max=1)).all()
        assert not x.requires_grad
        assert not torch.equal(x, one.x)


@pytest.mark.parametrize("same", [{"eps": 0.0}, {"step_size": 0.0}, "target"])
def test_nothing_to_do_changes_nothing(same: Any) -> None:
    """A-P2, bit for bit."""
    one = batch()
    options: dict[str, Any] = {"eps": 0.07, "step_size": 0.1, "steps": 3}
    if same == "target":
        one = replace(one, partners=one.x)
    else:
        options |= same
    assert one.partners is not None
    assert torch.equal(distil(nets(1)[0], one.x, one.partners, 2, **options), one.x)


def test_features_come_nearer() -> None:
    """A-P3."""
    one, model = batch(), nets(1)[0].eval()
    assert one.partners is not None
    for layer in (1, 2, 3):
        x = distil(model, one.x, one.partners, layer, eps=0.07, step_size=0.1, steps=10, inertia=1)
        wanted = features(model, one.partners, layer)
        before, after = (
            (features(model, images, layer) - wanted).square().flatten(1).sum(1) for images in (one.x, x)
        )
        assert (after < before).float().mean() >= 0.95


def gradients(members: Sequence[nn.Module]) -> list[list[Tensor | None]]:
    return [[weight.grad for weight in member.parameters()] for member in members]


def test_a_member_moves_by_its_own_loss_alone() -> None:
    """A-P5 and A-P6: the order of the members changes nothing, and a loss has no gradient in the others."""
    method = make_method("dverge", layer="2", baseline=0.0, statistics="frozen")
    there, back = nets(), nets()[::-1]
    method.backward(there, batch(), PLAN)
    method.backward(back, batch(), PLAN)
    for one, two in zip(gradients(there), gradients(back)[::-1], strict=True):
        for a, b in zip(one, two, strict=True):
            assert a is not None
            assert b is not None
            assert torch.allclose(a, b, atol=1e-7)
    losses = nets()
    images = method.distilled(losses, batch(), PLAN)
    nn.functional.cross_entropy(losses[0](images[1]), batch().y).backward()
    assert all(weight.grad is None for other in losses[1:] for weight in other.parameters())


def test_the_loss_is_the_published_sum() -> None:
    """Algorithm 1, written out: no clean term, source labels, means over the batch."""
    method = make_method("dverge", layer="2", baseline=0.0)
    members, others = nets(), nets()
    found = method.backward(members, batch(), PLAN)
    images = method.distilled(others, batch(), PLAN)
    total = 0.0
    for i, member in enumerate(others):
        loss = sum(nn.functional.cross_entropy(member(images[j]), batch().y) for j in range(3) if j != i)
        assert isinstance(loss, Tensor)
        loss.backward()
        total += float(loss.detach())
    assert float(found) == pytest.approx(total / 3, rel=1e-6)
    for one, two in zip(gradients(members), gradients(others), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))  # type: ignore[arg-type]


def test_one_member_is_refused() -> None:
    """A-P7."""
    with pytest.raises(UsageError, match="--members must be at least 2, got 1"):
        make_method("dverge").check_plan(replace(PLAN, members=1))


def test_labels_of_targets_count_only_where_pairs_are_left_out() -> None:
    """A-P8."""
    one = batch()
    other = replace(one, partner_labels=one.y)
    plain = make_method("dverge", layer="2", baseline=0.0)
    assert float(plain.backward(nets(), one, PLAN)) == float(plain.backward(nets(), other, PLAN)) > 0
    strict = make_method("dverge", layer="2", baseline=0.0, distinct=True)
    assert 0 < float(strict.backward(nets(), one, PLAN)) != float(plain.backward(nets(), one, PLAN))
    assert float(strict.backward(nets(), other, PLAN)) == 0


def test_the_scale_of_features_does_not_matter() -> None:
    """A-P9: a power of two, so that rounding is the same."""
    one = batch()
    model: Any = nets(1)[0].eval()
    options: dict[str, Any] = {"eps": 0.07, "step_size": 0.1, "steps": 5, "inertia": 1.0}
    assert one.partners is not None
    before = distil(model, one.x, one.partners, 3, **options)
    with torch.no_grad():
        model[6].weight *= 4
        model[6].bias *= 4
    assert torch.equal(before, distil(model, one.x, one.partners, 3, **options))


def test_images_are_distilled_on_their_own_where_norms_are_frozen() -> None:
    """A-P10; in train mode the rest of the batch has a say."""
    one, model = batch(count=4), nets(1)[0]
    assert one.partners is not None

    def both() -> tuple[Tensor, Tensor]:
        assert one.partners is not None
        options: dict[str, Any] = {"eps": 0.07, "step_size": 0.1, "steps": 1}
        whole = distil(model, one.x, one.partners, 2, **options)
        parts = [distil(model, one.x[i : i + 1], one.partners[i : i + 1], 2, **options) for i in range(4)]
        return whole, torch.cat(parts)

    with batch_norm_policy([model], "frozen"):
        whole, alone = both()
    assert ((whole - alone).abs() < 1e-6).float().mean() > 0.99
    with batch_norm_policy([model], "separate"):
        whole, alone = both()
    assert ((whole - alone).abs() > 1e-3).float().mean() > 0.01


@pytest.mark.parametrize("policy", BATCH_NORM_POLICIES)
def test_batch_norms_follow_the_policy(policy: str) -> None:
    """A-P11 and trap 4: running statistics move only where that was asked for; no weight has a gradient."""
    members = nets()
    before = [{name: value.clone() for name, value in member.named_buffers()} for member in members]
    method = make_method("dverge", layer="3")
    with batch_norm_policy(members, policy):
        frozen = not members[0][1].training
        method.distilled(members, batch(), PLAN)
    moved = [
        not torch.equal(old[name], value)
        for member, old in zip(members, before, strict=True)
        for name, value in member.named_buffers()
    ]
    assert all(moved) if policy == "train" else not any(moved)
    assert frozen == (policy == "frozen")
    assert all(member[1].training and member[1].track_running_stats for member in members)
    assert all(weight.grad is None for member in members for weight in member.parameters())


def test_layers_are_drawn_by_epoch_batch_or_member() -> None:
    """A-P17: constant within an epoch, uniform over many, and a function of seed and step, so it resumes."""
    members, one = nets(), batch()

    def drawn(draw: str, step: int, seed: int = 0) -> list[Any]:
        method = make_method("dverge", draw=draw)
        return method.layers(members, replace(one, step=step), replace(PLAN, seed=seed))

    epochs = [[drawn("epoch", epoch * 4 + place) for place in range(4)] for epoch in range(300)]
    assert all(layers == [layers[0][:1] * 3] * 4 for layers in epochs)
    counts = Counter(layers[0][0] for layers in epochs)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 70
    assert len({tuple(drawn("batch", place)) for place in range(20)}) == 3
    assert any(len(set(drawn("member", place))) > 1 for place in range(20))
    assert drawn("epoch", 40) == drawn("epoch", 40)
    assert [drawn("epoch", 4 * number) for number in range(9)] != [
        drawn("epoch", 4 * number, seed=1) for number in range(9)
    ]


def test_a_layer_that_is_not_there_is_refused() -> None:
    for layer in ("9", "0", "head"):
        with pytest.raises(UsageError, match="layer"):
            make_method("dverge", layer=layer, baseline=0.0).backward(nets(), batch(), PLAN)
    with pytest.raises(UsageError, match="no draw 'step'"):
        make_method("dverge", draw="step")


def test_the_baseline_comes_first_and_each_part_has_its_rates() -> None:
    plan = replace(PLAN, epochs=8)
    method = make_method("dverge", layer="2")
    rates = [method.rate(step, plan) / plan.lr for step in range(0, plan.steps, 4)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 1, 1, 0.1, 0.01])
    plain = replace(batch(), step=15, partners=None)
    assert method.backward(nets(), plain, plan).isfinite()
    with pytest.raises(UsageError, match="needs pairs"):
        method.backward(nets(), replace(plain, step=16), plan)


def test_mean_probabilities_do_not_saturate() -> None:
    """A.11, A-P14, traps 2 and 3: the oracle, invariances, and a gradient where 1e-40 would clamp it away."""
    z = torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]]]).clamp(min=1).log().requires_grad_()
    out = ensemble_log_probabilities(z)
    assert out[0].tolist() == pytest.approx([-0.470004, -0.980829], abs=1e-6)
    (slope,) = torch.autograd.grad(out[0, 0], z)
    assert slope[:, 0].flatten().tolist() == pytest.approx([0.2, -0.2, 0.15, -0.15], abs=1e-6)
    draws = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ensemble_log_probabilities(draws).exp().sum(1), torch.ones(5))
    shifted = draws.clone()
    shifted[1] += 7
    assert torch.allclose(ensemble_log_probabilities(draws), ensemble_log_probabilities(shifted), atol=1e-5)
    assert torch.allclose(ensemble_log_probabilities(draws), ensemble_log_probabilities(draws.flip(0)), atol=1e-6)
    assert torch.allclose(
        ensemble_log_probabilities(draws[:1].expand(4, -1, -1)), draws[0].log_softmax(1), atol=1e-6
    )
    far = torch.tensor([[[0.0, 200.0]], [[0.0, 150.0]]], requires_grad=True)
    (slope,) = torch.autograd.grad(ensemble_log_probabilities(far)[0, 0], far)
    assert slope.abs().sum() > 1
