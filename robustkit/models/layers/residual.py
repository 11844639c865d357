"""Residual blocks of nets, and forward hooks that change their skips or the gradients of their branches.

A block is recognised by the name of its class or by its parts. Its branch is found while it runs: it begins at the
part that gets the block's own input, or the input of its shortcut. Nothing is copied, and the hooks are removed
when the context ends, also by an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError

# One addition each, of the input or a shortcut of it, at the end or before a last activation.
CLASSES = {
    *("BasicBlock", "Bottleneck", "PreActBlock", "PreActBottleneck", "PreActBasic", "WideBlock", "WideBasic"),
    *("ResidualBlock", "ResBlock", "ResidualUnit", "ResBottleneckBlock", "CNBlock", "ConvNeXtBlock"),
    *("InvertedResidual", "MBConv"),
}
SHORTCUTS = ("downsample", "shortcut", "convShortcut", "conv_shortcut", "skip", "proj")
# Attributes that show whether a block has a skip connection.
SWITCHES = ("use_res_connect", "has_skip", "has_residual")
# Transformers' blocks: two additions, with a norm at the beginning of each branch and nothing after the second.
PAIRS = (("norm1", "norm2"), ("ln_1", "ln_2"))
# Blocks with such norms at the branches' ends.
POST_NORM_MARKS = ("V2", "Post")


@dataclass(frozen=True)
class Block:
    """A residual block; `norms` are the parts at which a transformer's two branches begin."""

    module: nn.Module
    norms: tuple[nn.Module, ...] = ()

    @property
    def additions(self) -> int:
        """How many skips it has."""
        return max(1, len(self.norms))


def blocks(model: Any) -> list[Block]:
    """Return the residual blocks of a net, or of a wrapper's `model` or `net`.

    Raises:
        UsageError: if it has none that are known.
    """
    inner = model
    while inner is not None and not isinstance(inner, nn.Module):
        inner = getattr(inner, "model", getattr(inner, "net", None))
    blocks = [block for module in (inner.modules() if inner else ()) if (block := _block(module))]
    if not blocks:
        name = getattr(inner, "string", type(model).__name__)
        raise UsageError(
            f"no residual block is known in {name!r}, and ghost and sgm change nothing else: use them with "
            "ResNets, ConvNeXts or vision transformers."
        )
    return blocks


def skips(model: Any) -> int:
    """Return how many skips a net has."""
    return sum(block.additions for block in blocks(model))


@contextmanager
def eroded(model: Any, factors: Tensor) -> Iterator[None]:
    """Multiply the skips in a net by factors (B, skips) for each row."""
    with _hooks() as keep:
        columns = iter(factors.unbind(1))
        for block in blocks(model):
            _erode(block, [next(columns) for _ in range(block.additions)], keep)
        yield


@contextmanager
def damped(model: Any, gamma: float) -> Iterator[None]:
    """Multiply by gamma the gradients that flow back through the branches of a net; its logits stay the same."""
    with _hooks() as keep:
        for block in blocks(model):
            _damp(block, gamma, keep)
        yield


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    keep: list[Any] = []
    try:
        yield keep
    finally:
        for handle in keep:
            handle.remove()


def _block(module: nn.Module) -> Block | None:
    name, parts = type(module).__name__, dict(module.named_children())
    if not all(getattr(module, switch, True) for switch in SWITCHES):
        return None
    for pair in PAIRS:
        if {*pair, "mlp"} <= parts.keys() and not any(word in name for word in POST_NORM_MARKS):
            return Block(module, tuple(parts[norm] for norm in pair))
    convolutions = sum(isinstance(part, nn.Conv2d) for part in parts.values())
    shaped = convolutions >= 2 and any(hasattr(module, word) for word in SHORTCUTS)
    return Block(module) if parts and (name in CLASSES or shaped) else None


def _parts(block: Block) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the parts that may begin a branch, and the shortcuts."""
    parts = dict(block.module.named_children())
    return (
        [part for word, part in parts.items() if word not in SHORTCUTS],
        [part for word, part in parts.items() if word in SHORTCUTS],
    )


def _erode(block: Block, factors: list[Tensor], keep: list[Any]) -> None:
    """Give the block its input times the factor, and the parts of its branch the input itself."""
    seen: dict[str, Tensor] = {}

    def scale(factor: Tensor, value: Tensor) -> Tensor:
        if len(value) != len(factor):
            raise RuntimeError(f"a net sees {len(value)} images of {len(factor)} whose skips are to be eroded.")
        return value * factor.to(value).view(-1, *[1] * (value.dim() - 1))

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        scaled: Any = scale(factors[0], args[0])
        scaled.unscaled = args[0]
        return (scaled, *args[1:])

    def restore(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (_unscaled(args[0]), *args[1:]) if args else None

    def shorten(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return scale(factors[0], output)

    def middle(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["middle"] = args[0]

    def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # The output of some blocks has another shape than the sum.
        return output + scale(factors[1] - 1, seen["middle"]).reshape(output.shape)

    others, shortcuts = _parts(block)
    keep.append(block.module.register_forward_pre_hook(enter))
    keep += [part.register_forward_pre_hook(restore) for part in (*others, *shortcuts)]
    keep += [part.register_forward_hook(shorten) for part in shortcuts]
    if block.norms:
        keep.append(block.norms[1].register_forward_pre_hook(middle))
        keep.append(block.module.register_forward_hook(leave))


def _unscaled(value: Any) -> Any:
    """Return a block's input before it was scaled; other values unchanged."""
    return getattr(value, "unscaled", value)


def _damp(block: Block, gamma: float, keep: list[Any]) -> None:
    """Damp the gradient at the beginning of a branch, which is equivalent to its end."""
    seen: Any = {}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.update(fork=_unscaled(args[0]), damping=[True])

    def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x: Any = _unscaled(args[0]) if args else None
        if x is None or x is not seen.get("fork") or not (x.requires_grad and torch.is_grad_enabled()):
            return None
        alias, damping = x.view_as(x), seen["damping"]
        alias.register_hook(lambda gradient: gamma * gradient if damping[0] else gradient)
        return (alias, *args[1:])

    def fork(module: nn.Module, args: tuple[Any, ...]) -> None:
        # The shortcut's input is an activation of the block's input: the branch begins there, not where it was
        # assumed.
        if args and _unscaled(args[0]) is not seen.get("fork"):
            seen["damping"][0] = False
            seen.update(fork=args[0], damping=[True])

    def norm(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        enter(module, args)
        return begin(module, args)

    if block.norms:
        keep += [part.register_forward_pre_hook(norm) for part in block.norms]
        return
    others, shortcuts = _parts(block)
    keep.append(block.module.register_forward_pre_hook(enter))
    keep += [part.register_forward_pre_hook(begin) for part in others]
    keep += [part.register_forward_pre_hook(fork) for part in shortcuts]
