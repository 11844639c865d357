"""Classifiers of images by texts: a model of images and texts, and the texts of the classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.models.sources.image_processor import ImageSettings


@dataclass(frozen=True)
class Towers:
    """A model of images and texts.

    Attributes:
        model: The module.
        encode_image: Returns the features (B, D) of images by the module.
        encode_text: Returns the features (K, D) of texts by the module.
        settings: How it wants its images.
    """

    model: nn.Module
    encode_image: Callable[[Any, torch.Tensor], torch.Tensor]
    encode_text: Callable[[Any, Sequence[str]], torch.Tensor]
    settings: ImageSettings


class ZeroShotNet(nn.Module):
    """The scaled cosines of images and of the texts of the classes; differentiable."""

    texts: torch.Tensor

    def __init__(self, towers: Towers, texts: Sequence[str]) -> None:
        """Encode the texts once."""
        super().__init__()
        self.model, self.encode_image = towers.model.eval(), towers.encode_image
        with torch.no_grad():
            features = F.normalize(towers.encode_text(self.model, texts), dim=-1)
        self.register_buffer("texts", features, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K) of images (B C H W)."""
        features = F.normalize(self.encode_image(self.model, images), dim=-1)
        model: Any = self.model
        logits: torch.Tensor = model.logit_scale.exp() * features @ self.texts.T
        bias = getattr(model, "logit_bias", None)
        return logits if bias is None else logits + bias


def open_clip_towers(open_clip: Any, name: str, tag: str | None, pretrained: bool) -> Towers:
    """Return a model of open_clip.

    Args:
        open_clip: The module.
        name: Of the architecture, or `hf-hub:OWNER/NAME`.
        tag: Of the weights; None for none, or those of the repository.
        pretrained: Whether the weights of a repository are loaded.
    """
    weights = {} if pretrained else {"pretrained_hf": False, "load_weights": False}
    if not name.startswith("hf-hub:"):
        weights = {}
    model = open_clip.create_model(name, pretrained=tag, **weights)
    tokenizer = open_clip.get_tokenizer(name)
    wanted = open_clip.get_model_preprocess_cfg(model)
    size = wanted["size"]
    height, width = (size, size) if isinstance(size, int) else size
    side = min(height, width) if wanted.get("resize_mode", "shortest") == "shortest" else None
    settings = ImageSettings(
        tuple(wanted["mean"]), tuple(wanted["std"]), side, (height, width), wanted.get("interpolation", "bicubic")
    )
    return Towers(
        model.float(),
        lambda model, images: model.encode_image(images),
        lambda model, texts: model.encode_text(tokenizer(list(texts))),
        settings,
    )


def transformers_towers(transformers: Any, folder: str) -> Towers:
    """Return the model of a folder of transformers."""
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)

    def encode_text(model: Any, texts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        return _features(model.get_text_features(**tokens))

    return Towers(
        model,
        lambda model, images: _features(model.get_image_features(pixel_values=images)),
        encode_text,
        ImageSettings.read(processor),
    )


def _features(output: Any) -> torch.Tensor:
    """Return the features, which transformers 5 returns with others."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return found
