"""Published defenses, rebuilt small: the default suite breaks them as far as attacks made for them, or warns."""

from __future__ import annotations

from functools import cache

import known_masks
import pytest
import torch
from masked_defenses import Digits, trained
from torch import Tensor, nn

from robustkit import evaluate, load_data

THREAT, IMAGES = "linf:0.08", 24
KNOWN = ",".join(
    f"{text}@{view}"
    for view in ("averaged-own", "own")
    for text in ("apgd(loss=margin,steps=100,restarts=2)", "apgd-t(loss=margin,steps=50,targets=9)")
)


@cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    data = load_data(f"digits:{split}")
    return data.images(range(len(data))), torch.from_numpy(data.labels)


@cache
def made(name: str) -> known_masks.Masked:
    if name in known_masks.LEARNED:
        return known_masks.LEARNED[name](*digits("train"))
    return known_masks.around(name, trained(Digits(), *digits("train")))


def test_arc_finds_the_distance_at_which_half_of_the_draws_are_wrong() -> None:
    """Three linear nets of one pixel each: the image stands until two of them are within reach."""
    nets: list[nn.Module] = []
    for row, bias in enumerate((0.1, 0.2, 0.3)):
        net = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
        with torch.no_grad():
            net[1].weight.zero_()
            net[1].bias.copy_(torch.tensor([bias, 0.0]))
            net[1].weight[1, row] = 1.0
        nets.append(net)
    x, y = torch.zeros(2, 1, 2, 3), torch.zeros(2, dtype=torch.int64)
    robust = [known_masks.arc(nets, [0.4, 0.35, 0.25], x, y, eps).all().item() for eps in (0.15, 0.19, 0.21, 0.35)]
    assert robust == [True, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*known_masks.AROUND, *known_masks.LEARNED])
def test_every_known_mask_is_broken_or_flagged(name: str) -> None:
    masked, (x, y) = made(name), digits("test")
    x, y = x[:IMAGES], y[:IMAGES]
    found = evaluate(masked.defense, x, y, THREAT, suite="auto")
    robust = torch.tensor([verdict.robust for verdict in found.verdicts])
    truth = robust
    if masked.substitutes:
        known = evaluate(known_masks.Exporting(masked).eval(), x, y, THREAT, suite=KNOWN)
        truth = robust & torch.tensor([verdict.robust for verdict in known.verdicts])
    if masked.own_attack is not None:
        truth &= masked.own_attack(x, y, 0.08)
    flagged = any(flag.warns for flag in found.flags)
    assert flagged or int(robust.sum()) <= int(truth.sum()) + 1
