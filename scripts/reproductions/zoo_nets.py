"""Architectures of the strictness zoo that `robustkit list models` does not have; `train_zoo.py` trains them."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn


def small_cnn(
    num_classes: int = 10, in_channels: int = 1, width: int = 16, norm: bool = False, pool: str = "max"
) -> nn.Sequential:
    """Return three convolutions with ReLU, two poolings and a linear layer, for images from 8 x 8 pixels on."""
    layers: list[nn.Module] = []
    inside = in_channels
    pooling = {"max": nn.MaxPool2d, "mean": nn.AvgPool2d}[pool]
    for number, outside in enumerate((width, 2 * width, 4 * width)):
        layers.append(nn.Conv2d(inside, outside, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(outside)] if norm else []
        layers += [nn.ReLU(), pooling(2)] if number < 2 else [nn.ReLU()]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inside, num_classes))


def mlp(num_classes: int = 10, inputs: int = 784, width: int = 256) -> nn.Sequential:
    """Return two hidden layers with ReLU; `inputs` is channels times height times width."""
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gelu_cnn(num_classes: int = 10, in_channels: int = 1, width: int = 32) -> nn.Sequential:
    """Return a ConvNeXt-like net: patches of 2, then depthwise convolutions with layer norm and GELU."""

    def block(channels: int) -> nn.Module:
        return _Residual(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            _ChannelNorm(channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    down = partial(nn.Conv2d, kernel_size=2, stride=2)
    layers = [down(in_channels, width), block(width), block(width), _ChannelNorm(width)]
    layers += [down(width, 2 * width), block(2 * width), block(2 * width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(2 * width), nn.Linear(2 * width, num_classes)]
    return nn.Sequential(*layers, *head)


class _Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def small_vit(num_classes: int = 10, in_channels: int = 1, side: int = 28, patch: int = 7) -> nn.Module:
    """Return a vision transformer of timm's with four blocks of width 64, for images of `side` pixels."""
    from timm.models.vision_transformer import VisionTransformer

    net: nn.Module = VisionTransformer(
        img_size=side,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
    )
    return net
