"""Loads several models and tries each on the data, so that an unusable one is reported before the run starts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from robustkit.core.errors import RobustkitError, RunError, UsageError
from robustkit.core.isolation import evaluation_mode, own_randomness
from robustkit.core.memory import free_memory
from robustkit.core.out_of_memory import NO_MEMORY, is_out_of_memory
from robustkit.data.samples import Samples
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.models import as_classifier, load_model
from robustkit.models.classifier import Classifier
from robustkit.models.ensembles.mixture import Mixture
from robustkit.models.failures import described
from robustkit.models.sources.from_run import training_flops

# The batch size by which a net counts as slow.
TYPICAL_BATCH = 64
# Data whose files are read at the size that the model requires.
READ_TO_SIZE = ("folder:", "webdataset:", "imagenet")


@dataclass(frozen=True)
class Net:
    """A model that is in memory, or loaded again by its string when it is used.

    Attributes:
        string: how to load it.
        fingerprint: of what determines its logits.
        classes: number of logits.
        parameters: bytes of its tensors; for several nets, of those in memory while one is used.
        graph: bytes that autograd saves for one image.
        threads: CPU threads for it.
        alike: equal for models that can be stacked into one; None for one that cannot.
        model: the classifier if it is in memory.
        count: of its nets: a posterior's samples or an ensemble's members.
        training: floating-point operations of the run that trained it, for a run folder.
        slow_batch, seconds: as measured by `engine.model.profiling.measure`.
        trust_code: whether loading it may run Python code that a run folder names.
        class_names: of its classes, where known.
    """

    string: str
    fingerprint: str
    classes: int
    parameters: int
    graph: int
    threads: int
    alike: str | None
    model: Classifier | None
    count: int = 1
    training: int | None = None
    slow_batch: int | None = None
    seconds: float = 0.0
    trust_code: bool = False
    class_names: tuple[str, ...] | None = None

    def instrumented(self, model: Classifier, device: torch.device) -> InstrumentedModel:
        """Return a classifier of this net as an instrumented model, with what was measured of the net."""
        found = InstrumentedModel(model, device)
        found.slow_batch, found.seconds = self.slow_batch, self.seconds
        return found

    def load(self, device: torch.device) -> Classifier:
        """Return the model on this device; a newly loaded one without parameter gradients."""
        if self.model is not None:
            return self.model.to(device)
        model = load_model(self.string, device=device, trust_code=self.trust_code)
        return model.expect(self.classes).requires_grad_(False)

    @property
    def identity(self) -> dict[str, str]:
        """Its string and fingerprint, for a spec."""
        return {"string": self.string, "fingerprint": self.fingerprint}


def gather(
    models: Sequence[str | Callable[[torch.Tensor], object]],
    samples: Samples,
    device: torch.device,
    *,
    what: str = "surrogate",
    keep: Callable[[int], bool] = lambda total: True,
    trust_code: bool = False,
) -> list[Net]:
    """Return nets of model strings or callables, each tried on the first image.

    Args:
        models: what to load.
        samples: the data of the run.
        device: where they are tried.
        what: what error messages call one of them.
        keep: whether nets of so many bytes in all stay in memory; others are loaded again by their strings.
        trust_code: whether Python code that a run folder names is run.

    Raises:
        UsageError: for a model that cannot be loaded or does not take the images, one given twice, different
            numbers of classes or sizes, labels outside the classes, a surrogate without a gradient.
    """
    nets: list[Net] = []
    total = 0
    for model in models:
        classifier = (
            load_model(model, device=device, trust_code=trust_code)
            if isinstance(model, str)
            else as_classifier(model).to(device)
        )
        _check_size(classifier, nets, samples)
        net = _measured(classifier, samples, device, what)
        total += net.parameters
        for other in nets:
            if other.fingerprint == net.fingerprint:
                more = ", and --weights for more of one" if what == "surrogate" else ""
                raise UsageError(f"{what} {net.string!r} is given twice; give each model once{more}.")
            if other.classes != net.classes:
                raise UsageError(
                    f"{what}s with different classes: {other.string!r} has {other.classes}, {net.string!r} "
                    f"{net.classes}; give models of the same classes."
                )
        nets.append(net)
        if isinstance(model, str) and not keep(total):
            # A model given as a Python object cannot be loaded again.
            pairs = zip(nets, models, strict=False)
            nets = [replace(one, model=None) if isinstance(given, str) else one for one, given in pairs]
            del classifier, net
            # The bytes of a net that is in a cycle of references are free only then.
            gc.collect()
    return nets


def gather_both(
    surrogates: Sequence[str | Callable[[torch.Tensor], object]],
    targets: Sequence[str | Callable[[torch.Tensor], object]],
    samples: Samples,
    device: torch.device,
    streaming: bool | None,
    what: str = "surrogate",
    trust_code: bool = False,
) -> tuple[list[Net], list[Net]]:
    """Return surrogates and targets; `streaming` loads each when it is used, None does so if memory is short.

    See `gather` for the rest.
    """
    room = free_memory(device) // 2

    def keep(total: int) -> bool:
        return total <= room if streaming is None else not streaming

    nets = gather(surrogates, samples, device, what=what, keep=keep, trust_code=trust_code)
    return nets, gather(
        targets,
        samples,
        device,
        what="target",
        keep=lambda total: keep(total) and total <= room // 4,
        trust_code=trust_code,
    )


def same_classes(nets: Sequence[Net], others: Sequence[Net]) -> None:
    """Raise UsageError for targets whose number of classes differs from the surrogates'."""
    for net in others:
        if net.classes != nets[0].classes:
            raise UsageError(
                f"target {net.string!r} has {net.classes} classes, surrogate {nets[0].string!r} has "
                f"{nets[0].classes}; "
                "give models of the same classes."
            )


def _measured(classifier: Classifier, samples: Samples, device: torch.device, what: str) -> Net:
    image = samples.images([0]).to(device)
    instrumented = InstrumentedModel(classifier.expect(samples.num_classes), device)
    try:
        with own_randomness("nets"), evaluation_mode(classifier):
            measure(instrumented, image, TYPICAL_BATCH)
            logits = instrumented.logits_fp32(image)
    except RobustkitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(NO_MEMORY) from error
        raise UsageError(
            f"model {classifier.string!r} failed with {described(error)}; correct its code."
        ) from error
    if what != "target" and not instrumented.differentiable:
        raise UsageError(
            f"{what} {classifier.string!r} has no gradient, so no image can be crafted on it; give it as a target."
        )
    classes = logits.shape[1]
    if not bool(logits.isfinite().all()):
        raise UsageError(
            f"model {classifier.string!r} returns NaN or infinite logits for the first image of {samples.name}; "
            "give one that returns finite logits."
        )
    if len(outside := np.flatnonzero(samples.labels >= classes)):
        raise UsageError(
            f"model {classifier.string!r} has {classes} classes but {samples.name} has the label "
            f"{samples.labels[outside[0]]} at position {outside[0]}; give the data it was made for."
        )
    tensors = [*classifier.parameters(), *classifier.buffers()]
    return Net(
        string=classifier.string,
        fingerprint=classifier.fingerprint,
        classes=classes,
        parameters=sum(tensor.nbytes for tensor in tensors),
        graph=instrumented.saved_bytes,
        threads=instrumented.threads,
        alike=_alike(classifier),
        model=classifier,
        count=len(classifier.net) if isinstance(classifier.net, Mixture) else 1,
        training=training_flops(classifier.string),
        slow_batch=instrumented.slow_batch,
        seconds=instrumented.seconds,
        trust_code=classifier.trust_code,
        class_names=classifier.class_names,
    )


def _check_size(classifier: Classifier, nets: Sequence[Net], samples: Samples) -> None:
    """Raise UsageError for a model that needs image files at another size than the first one."""
    first = next((net.model for net in nets if net.model is not None), None)
    if first is None or not samples.name.startswith(READ_TO_SIZE):
        return
    ours, theirs = classifier.preprocess, first.preprocess
    if ours and theirs and ours.size != theirs.size and classifier.size is None:
        raise UsageError(
            f"{classifier.string!r} takes images of {'x'.join(map(str, ours.size))} but {samples.name} is read at "
            f"{'x'.join(map(str, theirs.size))} for {first.string!r}; write ?size=N at the end of its string."
        )


def _alike(classifier: Classifier) -> str | None:
    net = classifier.net
    if not isinstance(net, torch.nn.Module) or isinstance(net, Mixture):
        return None
    shapes = [(name, tuple(tensor.shape)) for name, tensor in classifier.state_dict().items()]
    outer = [None if values is None else tuple(values.shape) for values in (classifier.mean, classifier.std)]
    return repr((repr(net), shapes, outer, classifier.size))
