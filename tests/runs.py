"""Folders as `robustkit train` writes them, of untrained nets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from robustkit import load_model
from robustkit.posterior import UnfinishedPosterior

ARCH = "robustkit:digits-cnn?num_classes=4"


def net(seed: int = 0, arch: str = ARCH) -> nn.Module:
    """Return an untrained net, its batch norms, if any, with statistics of their own."""
    made = load_model(f"{arch}&pretrained=false" if arch.startswith("robustkit:") else arch, seed=seed).net
    assert isinstance(made, nn.Module)
    generator = torch.Generator().manual_seed(seed)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=generator) / 9)
            part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
    return made


def facts(arch: str = ARCH, **words: Any) -> dict[str, Any]:
    """Return what a model.json says."""
    return {"format": 1, "arch": arch, "classes": 4, "members": 1, "mean": None, "std": None} | words


def write_single(run: Path, made: nn.Module, **words: Any) -> str:
    """Write a run of one net; return its model string."""
    run.mkdir(parents=True)
    save_file(made.state_dict(), run / "model.safetensors")
    (run / "model.json").write_text(json.dumps(facts(**words)))
    return f"{run}/"


def write_members(run: Path, nets: Sequence[nn.Module], **words: Any) -> str:
    """Write a run of several members."""
    run.mkdir(parents=True)
    state = {f"{k}.{name}": tensor for k, one in enumerate(nets) for name, tensor in one.state_dict().items()}
    save_file(state, run / "model.safetensors")
    (run / "model.json").write_text(json.dumps(facts(members=len(nets), **words)))
    return f"{run}/"


def write_posterior(run: Path, nets: Sequence[nn.Module], **words: Any) -> str:
    """Write a run of posterior samples."""
    draft = UnfinishedPosterior(run)
    for one in nets:
        draft.add(one.state_dict())
    store = draft.pack()
    (run / "model.json").write_text(json.dumps(facts(hashes={store.path.name: store.sha256}, **words)))
    return f"{run}/"
