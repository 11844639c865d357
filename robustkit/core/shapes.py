"""Shape aliases: plain tensors for type checkers, jaxtyping at run time if it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    Images = torch.Tensor
    Labels = torch.Tensor
    Logits = torch.Tensor
    PerRow = torch.Tensor
    Mask = torch.Tensor
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:
        Images = Labels = Logits = PerRow = Mask = torch.Tensor
    else:
        Images = Float[torch.Tensor, "B C H W"]
        Labels = Int[torch.Tensor, "B"]
        Logits = Float[torch.Tensor, "B K"]
        PerRow = Float[torch.Tensor, "B"]
        Mask = Bool[torch.Tensor, "B"]
