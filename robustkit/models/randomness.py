"""Where a net's random numbers come from: a policy that can be set, so that gradients can use fixed draws.

A net that draws random numbers has the policy as its attribute `noise` and takes a generator from it in each pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.rng import MULTIPLIERS, WORD, RowRng, philox
from robustkit.core.shapes import Images

KINDS = ("fresh", "frozen", "content", "calm")
SEEDED = ("frozen", "content")


@dataclass(frozen=True)
class Noise:
    """Random numbers of a pass: a kind, and the seed of those that have one.

    `fresh`: new ones in every pass, out of torch's generator, so that `torch.manual_seed` repeats them.
    `frozen`: always the same, and the same for every image, so that how a batch is cut does not matter.
    `content`: a function of the image's own bytes, so that each image always meets the same ones.
    `calm`: the middle of the range, always.
    """

    kind: str = "fresh"
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Noise:
        """Return the policy of a kind, or of `frozen` or `content` with a seed, as in `frozen:7`.

        Raises:
            UsageError: for another word or seed.
        """
        kind, sign, seed = text.partition(":")
        if kind not in KINDS:
            raise did_you_mean("noise", kind, KINDS)
        if sign and (kind not in SEEDED or not (seed.isdecimal() and len(seed) < 19)):
            raise UsageError(
                f"noise={text[:30]} is not possible: a seed is a whole number below 10^18, as in frozen:7 or "
                "content:7."
            )
        return cls(kind, int(seed or 0))

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}" if self.seed else self.kind

    def rng(self, images: Images, generator: torch.Generator | None = None) -> RowRng:
        """Return a generator for each image; fresh ones come out of `generator`, torch's own if there is none."""
        if self.kind == "content":
            return RowRng(self.seed, "content", content(images))
        rows = torch.arange(len(images), device=images.device)
        if self.kind == "calm":
            return Middle(0, "calm", rows)
        if self.kind == "frozen":
            return RowRng(self.seed, "frozen", torch.zeros_like(rows))
        return RowRng(int(torch.randint(2**62, (), generator=generator)), "fresh", rows)


class Middle(RowRng):
    """A generator whose uniform draws are all a half."""

    def _words(self, count: int) -> Tensor:
        return torch.full((len(self.ids), count), 2**31, device=self.ids.device)


def content(images: Images) -> Tensor:
    """Return a number below 2**32 for each image (B), a function of its float32 bytes alone."""
    # Adding 0 takes the sign off zeros, which are equal and look different in bytes.
    words = (images.detach().float() + 0.0).flatten(1).contiguous().view(torch.int32).to(torch.int64) & WORD
    places = torch.arange(words.shape[1], device=words.device)
    zero = torch.zeros_like(places)
    odd = philox([places, zero, zero, zero], list(MULTIPLIERS))[0] | 1
    # Sums and products of int64 wrap around, in the same way on every device.
    total = ((words ^ (words >> 15)) * odd).sum(1)
    high, low = (total >> 32) & WORD, total & WORD
    rest = torch.zeros_like(total)
    return philox([high, low, rest, rest], list(MULTIPLIERS))[0]


def drawing(net: object) -> list[nn.Module]:
    """Return the parts of a net that draw by a policy."""
    if not isinstance(net, nn.Module):
        return []
    return [part for part in net.modules() if isinstance(getattr(part, "noise", None), Noise)]


def set_noise(net: object, noise: Noise) -> bool:
    """Set the policy of every part that draws; return whether there is one."""
    parts = drawing(net)
    for part in parts:
        part.noise = noise  # type: ignore[assignment]
    return bool(parts)


@contextmanager
def drawn(net: object, noise: Noise) -> Iterator[None]:
    """Let a net draw by a policy for a while."""
    before = [(part, part.noise) for part in drawing(net)]
    set_noise(net, noise)
    try:
        yield
    finally:
        for part, own in before:
            part.noise = own
