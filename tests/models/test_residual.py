"""Hooks on residual blocks against nets with the changes written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustkit import load_model
from robustkit.core.errors import UsageError
from robustkit.models.layers import residual
from robustkit.models.zoo.cifar_resnet import BasicBlock
from robustkit.models.zoo.preact_resnet import PreActBlock
from robustkit.models.zoo.wide_resnet import WideBlock

# Model strings and how many skips they have.
NETS = {
    "robustkit:cifar-resnet20": 9,
    "robustkit:preact-resnet18": 8,
    "robustkit:wrn-28-10": 12,
    "pyautoattack.examples.resnet:ResNet18": 8,
    "torchvision:resnet18": 8,
    "torchvision:resnet50": 16,
    "torchvision:vit_b_16": 24,
    "torchvision:convnext_tiny": 18,
    "torchvision:mobilenet_v2": 10,
    "torchvision:efficientnet_b0": 9,
    "torchvision:regnet_x_400mf": 22,
    "torchvision:swin_t": 24,
    "timm:resnet26": 8,
    "timm:resnetv2_50": 16,
    "timm:vit_tiny_patch16_224": 24,
    "timm:convnext_atto": 12,
    "timm:swin_tiny_patch4_window7_224": 24,
}
SMALL = ["robustkit:cifar-resnet20", "pyautoattack.examples.resnet:ResNet18"]


def build(string):
    query = "" if string.startswith(("robustkit", "pyauto")) else "?pretrained=false"
    return opened(load_model(string + query))


def tiny_vit():
    from timm.models.vision_transformer import VisionTransformer

    return opened(VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=10))


def opened(model):
    model.eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            # Gates at the ends of branches begin closed.
            if parameter.abs().max() < 1e-5:
                nn.init.normal_(parameter, std=0.5)
    return model


def seeded(block):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
    return block.double().eval()


def branch_and_skip(block, x):
    """Return what the block adds, and what is done to the sum."""
    if isinstance(block, BasicBlock):
        branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        skip = F.pad(x[:, :, :: block.stride, :: block.stride], (0, 0, 0, 0, block.pad, block.pad))
        return branch, skip, F.relu
    active = F.relu(block.bn1(x))
    shortcut = block.shortcut if isinstance(block, PreActBlock) else block.convShortcut
    branch = block.conv2(F.relu(block.bn2(block.conv1(active))))
    return branch, x if shortcut is None else shortcut(active), lambda total: total


def written_out(block, x, factor, gamma):
    """Return the block with its skip scaled, and the gradient of its branch damped, in so many words."""
    branch, skip, end = branch_and_skip(block, x)
    damped = gamma * branch + (1 - gamma) * branch.detach()
    return end(damped + factor[:, None, None, None] * skip)


BLOCKS = [
    BasicBlock(4, 4, 1),
    BasicBlock(4, 8, 2),
    PreActBlock(4, 4, 1),
    PreActBlock(4, 6, 2),
    WideBlock(4, 4, 1),
    WideBlock(4, 6, 2),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_hooks_equal_blocks_with_the_change_written_out(block, gamma):
    block = seeded(block)
    x = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = torch.tensor([[0.8], [1.0], [1.2]], dtype=torch.float64)
    point, expected_at = x.clone().requires_grad_(), x.clone().requires_grad_()
    with residual.eroded(block, factors), residual.damped(block, gamma):
        found = block(point)
    expected = written_out(block, expected_at, factors[:, 0], gamma)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, point, slope)[0], torch.autograd.grad(expected, expected_at, slope)[0]
    )


@pytest.mark.parametrize("string", NETS)
@pytest.mark.slow
def test_skips_are_found_in_every_family(string):
    check_net(build(string), NETS[string], 32 if string.startswith(("robustkit", "pyauto")) else 224)


@pytest.mark.parametrize("string", [*SMALL, "torchvision:mobilenet_v2"])
def test_skips_are_found(string):
    check_net(build(string), NETS[string], 32)


def test_skips_of_a_transformer_are_found():
    check_net(tiny_vit(), 4, 32)


def test_hooks_equal_a_transformer_with_the_change_written_out():
    block = tiny_vit().blocks[0].double()
    x = torch.rand(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = torch.tensor([[0.8, 1.1], [1.3, 0.7]], dtype=torch.float64)
    first, second = factors[:, 0, None, None], factors[:, 1, None, None]
    slopes = []
    for changed in (True, False):
        point = x.clone().requires_grad_()
        if changed:
            with residual.eroded(block, factors), residual.damped(block, 0.3):
                found = block(point)
        else:
            attended = block.attn(block.norm1(point))
            middle = first * point + 0.3 * attended + 0.7 * attended.detach()
            mixed = block.mlp(block.norm2(middle))
            expected = found = second * middle + 0.3 * mixed + 0.7 * mixed.detach()
        slopes.append(torch.autograd.grad(found.square().sum(), point)[0])
        if changed:
            value = found
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*slopes)


def check_net(model, count, size):
    assert residual.skips(model) == count
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain, slope = answer(model, x)
    ones = torch.ones(2, count)
    with residual.eroded(model, ones), residual.damped(model, 1.0):
        same, same_slope = answer(model, x)
    assert torch.equal(plain, same)
    assert torch.equal(slope, same_slope)
    with residual.damped(model, 0.5):
        same, other_slope = answer(model, x)
    assert torch.equal(plain, same)
    assert (slope - other_slope).norm() > 0.01 * slope.norm()
    # Each skip by itself matters, and to its own row alone.
    for number in (0, count // 2, count - 1):
        factors = ones.clone()
        factors[1, number] = 0.5
        with residual.eroded(model, factors), torch.no_grad():
            changed = model(x)
        torch.testing.assert_close(changed[0], plain[0], rtol=1e-4, atol=1e-5)
        assert not torch.equal(changed[1], plain[1])
    assert torch.equal(answer(model, x)[0], plain)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def answer(model, x):
    point = x.clone().requires_grad_()
    logits = model(point)
    return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), point)[0]


def test_without_branches_the_gradient_is_that_of_the_skips():
    """Damped to nothing, a chain of blocks without activations after the sum is the identity to the gradient."""

    class ResidualBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(5, 5)

        def forward(self, x):
            return x + self.body(x).tanh()

    net = nn.Sequential(*(ResidualBlock() for _ in range(4)))
    x, slope = torch.rand(3, 5, requires_grad=True), torch.rand(3, 5)
    with residual.damped(net, 0.0):
        found = net(x)
    torch.testing.assert_close(found, net(x))
    assert torch.equal(torch.autograd.grad(found, x, slope)[0], slope)


def test_wrapped_nets_are_unwrapped_and_unknown_ones_refused():
    class Wrapper:
        def __init__(self, model):
            self.model = model

    net = load_model("robustkit:cifar-resnet20")
    assert residual.skips(Wrapper(net)) == 9
    for model in (load_model("robustkit:digits-cnn"), lambda x: x, Wrapper(lambda x: x)):
        with pytest.raises(UsageError, match="no residual block is known"):
            residual.skips(model)


def test_hooks_are_removed_if_the_net_fails():
    net = load_model("robustkit:cifar-resnet20")
    with pytest.raises(RuntimeError), residual.damped(net, 0.5), residual.eroded(net, torch.ones(1, 9)):
        net.net(torch.rand(1, 4, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
