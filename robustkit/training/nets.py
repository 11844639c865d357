"""The nets of a run: built from a model string for the data, with counted passes, in the precision of the run."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import UsageError
from robustkit.core.isolation import seeded
from robustkit.core.shapes import Images, Logits
from robustkit.data.strings import DataString
from robustkit.models import Classifier, load_model
from robustkit.models.ensembles.mixture import Mixture
from robustkit.models.layers.features import Reached
from robustkit.models.randomness import Noise, drawn
from robustkit.models.sources.from_run import Run, is_run
from robustkit.models.sources.source import find_source
from robustkit.models.strings import ENSEMBLE, FOLDER, SOURCE, ModelString, joined
from robustkit.registry import spec as record_of
from robustkit.training.method import Method
from robustkit.training.whole_batches import WholeBatchMode
from robustkit.training.wrapping_method import WrappingMethod

DEFAULT_ARCHS = {
    "digits": "robustkit:digits-cnn",
    "cifar10": "robustkit:cifar-resnet20",
    "cifar100": "robustkit:cifar-resnet20",
}


@dataclass
class PassCounts:
    """Forward and backward passes of images through all nets of a run, summed over all processes."""

    forwards: int = 0
    backwards: int = 0


class Member(nn.Module):
    """A classifier in the precision of the run, with counted passes; `net` is the net itself.

    In train mode, torch's generator is seeded for each pass from `seed`, the step and the number of the pass in
    the step. So the random numbers do not depend on the other members, nor on the process.
    """

    def __init__(
        self,
        classifier: Classifier,
        pass_counts: PassCounts | None = None,
        autocast: Callable[[], AbstractContextManager[None]] | None = None,
        seed: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Wrap a classifier.

        Args:
            classifier: takes images in [0, 1].
            pass_counts: counter of the passes.
            autocast: returns the context of the precision.
            seed: seed of the random numbers that the net draws.
            part: index of this process's part of each batch.
            parts: number of parts of each batch.
        """
        super().__init__()
        self.classifier = classifier
        self.pass_counts = pass_counts or PassCounts()
        self.autocast = autocast
        self.seed, self.part, self.parts = seed, part, parts
        self.start_step(0)

    def start_step(self, step: int) -> None:
        """Start a step of the run."""
        self.step, self.passes = step, 0

    @property
    def net(self) -> nn.Module:
        """The net inside the classifier, which takes normalised images."""
        return net_of(self.classifier)

    def forward(self, images: Images) -> Logits:
        """Return float32 logits (B K) of images (B C H W) in [0, 1]. One that ends at a layer counts in full."""
        rows = len(images) * self.parts
        self.pass_counts.forwards += rows
        try:
            with self._pass(images):
                logits: Tensor = self.classifier(images)
        except Reached:
            if images.requires_grad and images.is_leaf:
                images.register_hook(lambda gradient: self._back(rows))  # type: ignore[no-untyped-call]
            raise
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._back(rows))  # type: ignore[no-untyped-call]
        return logits

    @contextmanager
    def _pass(self, images: Images) -> Iterator[None]:
        """Seed the net's random numbers, use statistics of the whole batch, and use the precision of the run."""
        if self.training:
            reseed(f"{self.seed}/torch/{self.step}/{self.passes}", images.device)
            self.passes += 1
        shared = self.training and self.parts > 1
        with (
            nullcontext() if self.autocast is None else self.autocast(),
            WholeBatchMode(self.part, self.parts, len(images)) if shared else nullcontext(),
        ):
            yield

    def _back(self, rows: int) -> None:
        self.pass_counts.backwards += rows


def net_of(classifier: Classifier) -> nn.Module:
    """Return the net inside a classifier; after `build` it is a module."""
    if not isinstance(classifier.net, nn.Module):
        raise TypeError(f"{classifier.string} is not a torch module")
    return classifier.net


def reseed(text: str, device: torch.device) -> None:
    """Seed torch's generators of the CPU and the device; `torch.manual_seed` takes as long as a small step."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    torch.default_generator.manual_seed(seed)
    ComputeDevice(device).seed(seed)


def default_arch(data: str) -> str:
    """Return the default architecture for a data string; UsageError if there is none."""
    name = DataString.parse(data).name
    if name not in DEFAULT_ARCHS:
        raise UsageError(f"no default net for {data}; set --arch, e.g. --arch robustkit:cifar-resnet20.")
    return DEFAULT_ARCHS[name]


def complete_arch(text: str, classes: int, channels: int) -> ModelString:
    """Return a model string that starts from random weights unless it names a weights file.

    Numbers of classes and channels that the string does not set are those of the data.

    Raises:
        UsageError: if the string contains a defense.
    """
    spec = ModelString.parse(text)
    options = dict(spec.options)
    if "defense" in options:
        raise UsageError(f"--arch {text}: a defense is not trained; add it when the net is evaluated.")
    source = find_source(spec.source) if spec.kind == SOURCE and spec.weights is None else None
    if source is not None and source.takes("pretrained"):
        options.setdefault("pretrained", "false")
        own = source.facts(spec.name)
        outputs = 1 if "binary" in options else classes
        if own is None or own.num_classes != outputs:
            options.setdefault("num_classes", str(outputs))
        if own is not None and own.input[0] != channels:
            options.setdefault("in_channels", str(channels))
    return replace(spec, options=options)


def with_normalisation(spec: ModelString, mean: Sequence[float], std: Sequence[float]) -> ModelString:
    """Return the model string with this normalisation, unless it names weights or has a normalisation."""
    if spec.weights is not None or spec.kind == FOLDER or {"mean", "std"} & spec.options.keys():
        return spec
    numbers = {"mean": ",".join(f"{m:g}" for m in mean), "std": ",".join(f"{s:g}" for s in std)}
    return replace(spec, options={**spec.options, **numbers})


def arch_strings(text: str) -> list[str]:
    """Return the model string of each net that `--arch` names, which may be an ensemble or a run folder.

    Raises:
        UsageError: if the string has the field `combine`, which training does not use.
    """
    spec = ModelString.parse(text)
    if spec.kind == ENSEMBLE:
        strings = spec.members
    elif spec.kind == FOLDER and is_run(spec):
        strings = [str(replace(spec, arch=arch)) for arch in Run.read(spec).singles]
    else:
        strings = [text]
    if "combine" in spec.options:
        raise UsageError(f"--arch {text}: members are trained, not combined; leave combine out.")
    return strings


def architecture_string(classifiers: Sequence[Classifier]) -> str:
    """Return the model string of the nets' architectures, which a run folder stores beside the weights."""
    archs = [_bare(ModelString.parse(classifier.string)) for classifier in classifiers]
    return archs[0] if len(set(archs)) == 1 else joined(archs)


def _bare(spec: ModelString) -> str:
    if spec.kind == FOLDER:
        run = Run.read(spec)
        return str(run.arch_of((run.numbers or [0])[0]))
    return str(
        replace(
            spec,
            weights=None,
            options={k: v for k, v in spec.options.items() if k not in ("mean", "std", "weights")},
        )
    )


def build_all(
    specs: Sequence[ModelString], seed: int, sample: Images, classes: int, method: Method, trust_code: bool
) -> list[Classifier]:
    """Return the members of a run.

    Args:
        specs: model string of each member.
        seed: seed of the first member's initial weights; the next member has `seed + 1` and so on.
        sample: some images (B C H W) of the data.
        classes: number of classes of the data.
        method: the training method.
        trust_code: whether Python code that a run folder names may be run.

    Raises:
        UsageError: see `build`; also if the members differ in number of classes, normalisation or image size, or
            the method cannot train them.
    """
    members = [
        build(spec, seed + number, sample, classes, method, trust_code) for number, spec in enumerate(specs)
    ]
    counts = set()
    for member in members:
        with torch.no_grad(), drawn(member, Noise("content")):
            counts.add(member(sample).shape[1])
    if len(counts) > 1:
        fewest, *_, most = sorted(counts)
        raise UsageError(f"--arch names nets of {fewest} and of {most} classes; give members of the same classes.")
    inputs = {
        str([None if values is None else values.tolist() for values in (member.mean, member.std)] + [member.size])
        for member in members
    }
    if len(inputs) > 1:
        raise UsageError(
            "--arch names nets whose mean, std or size differ, and a run's folder keeps one of each; give members "
            "with the same."
        )
    method.check_nets(members, sample[:1])
    return members


def build(
    spec: ModelString, seed: int, sample: Images, classes: int, method: Method, trust_code: bool
) -> Classifier:
    """Return one member with initial weights, wrapped if the method wraps its nets.

    The arguments are those of `build_all`.

    Raises:
        UsageError: if it is not a module with weights, or it has fewer logits than the data has classes.
    """
    classifier = load_model(str(spec), seed=seed, trust_code=trust_code).expect(classes)
    if not isinstance(classifier.net, nn.Module) or not any(True for _ in classifier.net.parameters()):
        raise UsageError(f"{spec} has no weights to train; write an architecture, e.g. robustkit:cifar-resnet20.")
    try:
        classifier.train().eval()
    except NotImplementedError as error:
        raise UsageError(
            f"{spec} has no train mode, like any program of torch.export; give the net that it was made from."
        ) from error
    if isinstance(classifier.net, Mixture):
        raise UsageError(f"{spec} is several nets and cannot be one member; name each of them.")
    if isinstance(method, WrappingMethod):
        classifier = _wrapped(classifier, seed, sample, method)
    with torch.no_grad(), drawn(classifier, Noise("content")):
        logits = classifier(sample)
    if logits.shape[1] < classes:
        raise UsageError(
            f"{spec} has {logits.shape[1]} logits and the data {classes} classes; write num_classes={classes}."
        )
    return classifier


def in_channels_last(classifier: Classifier, sample: Images) -> Classifier:
    """Return a classifier in train mode in channels_last memory format, or unchanged if its net fails with it.

    A net may use operations that need the default memory format, such as `view`.
    """
    with seeded(0):
        try:
            # A copy is run, so that the running statistics of batch norms do not change.
            copied = copy.deepcopy(classifier).to(memory_format=torch.channels_last)
            copied(sample, torch.channels_last).sum().backward()
        except Exception:  # the errors of a user's net are not a closed list
            return classifier
    classifier.layout = torch.channels_last
    return classifier.to(memory_format=torch.channels_last)


def _wrapped(classifier: Classifier, seed: int, sample: Images, method: WrappingMethod) -> Classifier:
    if classifier.size is not None:
        raise UsageError(
            f"{method.info.name} changes the size of images itself; leave size out of {classifier.string} and "
            "write --enlarge."
        )
    statistics = (classifier.mean, classifier.std)
    mean, std = (None if values is None else values.flatten().tolist() for values in statistics)
    identity = {"around": classifier.fingerprint, "method": record_of(method)}
    with seeded(seed):
        net = method.wrap(net_of(classifier), torch.zeros_like(sample[:1]), mean, std)
    return Classifier(
        net.eval(),
        string=classifier.string,
        identity=identity,
        num_classes=classifier.num_classes,
        preprocess=classifier.preprocess,
    )


def flops(classifier: Classifier, sample: Images) -> int:
    """Return the floating-point operations of one image's forward pass; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(sample[:1])
    return int(counter.get_total_flops())
