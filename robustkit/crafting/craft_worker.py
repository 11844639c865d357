"""A worker of a craft run: its own process, with surrogates of its own, that crafts what the driver orders."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from robustkit.core.threat import ThreatModel
from robustkit.crafting.batches import Crafter
from robustkit.crafting.ensemble import Ensemble, Storage
from robustkit.crafting.spec import CraftRequest
from robustkit.data.samples import Samples
from robustkit.engine.evaluation import tasks
from robustkit.engine.evaluation.evaluate_worker import Lent, Voice
from robustkit.engine.evaluation.tasks import Link


def work(brief: tasks.CraftBrief, link: Link) -> object:
    """Craft what the driver orders; return the first thing it says that is no order of this run."""
    begun = time.perf_counter()
    torch.set_num_threads(brief.threads)
    device = torch.device(brief.device)
    nets = []
    for net, model in zip(brief.nets, brief.models, strict=True):
        here = model.unpack(device, link.ask).requires_grad_(False)
        # One that is not to stay is loaded again when it is asked, if it is not of Python.
        stays = brief.loaded or model.itself is not None
        nets.append(replace(net, model=here if stays else None, string=here.string, threads=brief.threads))
    source = Lent(brief.pool)
    plan = CraftRequest(
        nets=nets,
        samples=Samples(brief.data, brief.labels, None, source := Lent(brief.pool), np.arange(len(brief.labels))),
        threat=ThreatModel.parse(brief.threat),
        attack=brief.attack,
        combine=brief.combine,
        weights=brief.weights,
        seed=brief.seed,
        device=device,
        batch_size=brief.batch,
    )
    storage = Storage(loaded=brief.loaded, held=brief.held)
    crafter = Crafter(plan, Voice(link), brief.store.here())
    crafter.use_ensemble(Ensemble(nets, device, storage, brief.combine, brief.weights), brief.ways)
    link.send(tasks.Ready(time.perf_counter() - begun))
    while not isinstance(order := link.receive(), tasks.Briefing):
        if isinstance(order, tasks.Make):
            source.lent = dict(zip(order.positions.tolist(), order.images, strict=True))
            for chunk in crafter.craft(order.stage, order.attack, order.members, order.goals, [order.positions]):
                link.send(tasks.Done([chunk]))
            source.lent.clear()
            link.send(tasks.Idle())
    return order
