"""A worker of a craft run: a process with surrogates of its own that crafts batches for the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from robustkit.core.determinism import prepare_deterministic
from robustkit.core.memory import share_device
from robustkit.crafting.batches import Crafter
from robustkit.crafting.ensemble import Ensemble, Storage
from robustkit.crafting.spec import CraftRequest
from robustkit.data.samples import Samples
from robustkit.distributed.pool import Handle, State
from robustkit.distributed.sent_models import SentModel
from robustkit.engine.evaluation.evaluate_worker import Outbox
from robustkit.engine.evaluation.tasks import Data, Result
from robustkit.engine.evaluation.worker_images import WorkerImages
from robustkit.engine.model.loaded_models import Net
from robustkit.runs.unfinished_work import Store


@dataclass(frozen=True)
class CraftJob:
    """All that a worker has to know of a craft run before its first batch.

    Attributes:
        nets: the surrogates, without their models.
        models: of the surrogates.
        storage: how much of them is in memory at once.
        configs: how they are run, as the driver has chosen.
        data: of the run, with the images that others may be mixed with.
        request: the run's request, without nets and samples.
        batch: images of a batch.
        device: where the worker computes.
        processes: how many workers compute on this device.
        threads: how many CPU threads it uses.
        store: keeps unfinished work; used where its folder can be reached.
    """

    nets: Sequence[Net]
    models: Sequence[SentModel]
    storage: Storage
    configs: Mapping[str, Any]
    data: Handle[Data]
    request: Mapping[str, Any]
    batch: int
    device: str
    processes: int
    threads: int
    store: Store


@dataclass(frozen=True)
class CraftBatch:
    """One batch of a stage.

    Attributes:
        stage: of the ledger.
        attack: of the stage.
        members: the surrogates to use; None for all.
        goals: target classes by position; None for an untargeted attack.
        positions: in the data (B).
        images: (B C H W).
    """

    stage: int
    attack: Any
    members: Sequence[int] | None
    goals: Mapping[int, int] | None
    positions: np.ndarray
    images: np.ndarray


def load(job: CraftJob, state: State) -> bool:
    """Load the surrogates of a run; return that the driver sends the images."""
    state.clear()
    torch.set_num_threads(job.threads)
    prepare_deterministic(bool(job.request["deterministic"]))
    share_device(job.processes)
    device, data = torch.device(job.device), job.data.get()
    nets = []
    for net, model in zip(job.nets, job.models, strict=True):
        loaded = model.load(device).requires_grad_(False)
        # One that does not stay in memory is loaded again when it is used, unless it is from Python.
        stays = job.storage.loaded or model.itself is not None
        nets.append(replace(net, model=loaded if stays else None, string=loaded.string, threads=job.threads))
    source = WorkerImages(data)
    samples = Samples(data.name, data.labels, None, source, np.arange(len(data.labels)))
    request = CraftRequest(nets=nets, samples=samples, device=device, batch_size=job.batch, **job.request)
    outbox = state["outbox"] = Outbox(source)
    crafter = Crafter(request, outbox, job.store.here())
    crafter.use_ensemble(Ensemble(nets, device, job.storage, request.combine, request.weights), job.configs)
    state["crafter"] = crafter
    return False


def craft(batch: CraftBatch, state: State) -> Result:
    """Craft one batch."""
    crafter: Crafter = state["crafter"]
    outbox: Outbox = state["outbox"]
    outbox.source.add(batch.positions, batch.images)
    outbox.write(*crafter.craft(batch.stage, batch.attack, batch.members, batch.goals, [batch.positions]))
    return Result(*outbox.take())
