"""The nets that a run trains: built from a model string for the data at hand, counted, in the run's precision."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustkit.core.errors import UsageError
from robustkit.core.shapes import Images, Logits
from robustkit.data.strings import DataString
from robustkit.models import Classifier, load_model
from robustkit.models.ensembles.mixture import Mixture
from robustkit.models.layers.features import Reached
from robustkit.models.randomness import Noise, drawn
from robustkit.models.sources.built import seeded
from robustkit.models.sources.from_run import Run, is_run
from robustkit.models.strings import ENSEMBLE, FOLDER, TIMM, TORCHVISION, ZOO, ModelString, joined
from robustkit.models.zoo.catalog import lookup
from robustkit.registry import spec as record_of
from robustkit.training.method import Method
from robustkit.training.whole_batches import Whole
from robustkit.training.wrapping_method import WrappingMethod

USUAL = {
    "digits": "robustkit:digits-cnn",
    "cifar10": "robustkit:cifar-resnet20",
    "cifar100": "robustkit:cifar-resnet20",
}


@dataclass
class Tally:
    """Sample-propagations through all nets of a run, on all its processes together."""

    forwards: int = 0
    backwards: int = 0


class Member(nn.Module):
    """A classifier in the run's precision, whose propagations are counted; `net` is the net itself.

    In train mode what it draws from torch's generator is a function of `seed`, the step and how many passes came
    before in it: the same numbers whatever the other members do, and in which process.
    """

    def __init__(
        self,
        classifier: Classifier,
        tally: Tally | None = None,
        autocast: Callable[[], AbstractContextManager[None]] | None = None,
        seed: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Wrap a classifier that sees one of so many parts of each batch."""
        super().__init__()
        self.classifier = classifier
        self.tally = tally or Tally()
        self.autocast = autocast
        self.seed, self.part, self.parts = seed, part, parts
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin a step."""
        self.step, self.passes = step, 0

    @property
    def net(self) -> nn.Module:
        """The net that takes normalised images."""
        return net_of(self.classifier)

    def forward(self, images: Images) -> Logits:
        """Return float32 logits of images on [0, 1]. A pass that ends at a layer counts as a whole one."""
        rows = len(images) * self.parts
        self.tally.forwards += rows
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
        """Let the net draw its own numbers, train on the whole batch, and compute in the run's precision."""
        if self.training:
            reseed(f"{self.seed}/torch/{self.step}/{self.passes}", images.device)
            self.passes += 1
        shared = self.training and self.parts > 1
        with (
            nullcontext() if self.autocast is None else self.autocast(),
            Whole(self.part, self.parts, len(images)) if shared else nullcontext(),
        ):
            yield

    def _back(self, rows: int) -> None:
        self.tally.backwards += rows


def net_of(classifier: Classifier) -> nn.Module:
    """Return the net inside, which is a module after `build`."""
    if not isinstance(classifier.net, nn.Module):
        raise TypeError(f"{classifier.string} is no module")
    return classifier.net


def reseed(text: str, device: torch.device) -> None:
    """Set the generators that nets draw from: `torch.manual_seed` takes as long as a small step."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def usual_arch(data: str) -> str:
    """Return the net that is trained on this data if none is named; UsageError if none is usual."""
    name = DataString.parse(data).name
    if name not in USUAL:
        raise UsageError(f"no usual net for {data}; write --arch, e.g. --arch robustkit:cifar-resnet20.")
    return USUAL[name]


def complete(text: str, classes: int, channels: int) -> ModelString:
    """Return a model string made to start from what it names: from weights only if it names a file.

    Number of classes and channels are those of the data, where the string does not say.
    """
    spec = ModelString.parse(text)
    options = dict(spec.options)
    if "defense" in options:
        raise UsageError(f"--arch {text}: a defense is not trained; write it when the net is evaluated.")
    if spec.kind in (ZOO, TIMM, TORCHVISION) and spec.weights is None:
        options.setdefault("pretrained", "false")
        own = lookup(spec.name) if spec.kind == ZOO else None
        outputs = 1 if "binary" in options else classes
        if own is None or own.num_classes != outputs:
            options.setdefault("num_classes", str(outputs))
        if own is not None and own.input[0] != channels:
            options.setdefault("in_channels", str(channels))
    return replace(spec, options=options)


def normalised(spec: ModelString, mean: Sequence[float], std: Sequence[float]) -> ModelString:
    """Return the string with the data's normalisation, unless it names weights or a normalisation of its own."""
    if spec.weights is not None or spec.kind == FOLDER or {"mean", "std"} & spec.options.keys():
        return spec
    numbers = {"mean": ",".join(f"{m:g}" for m in mean), "std": ",".join(f"{s:g}" for s in std)}
    return replace(spec, options={**spec.options, **numbers})


def named(text: str) -> list[str]:
    """Return the string of each net that an `--arch` names, which may be an ensemble or a folder of several.

    Raises:
        UsageError: if it asks for a way to join them, which training has no use for.
    """
    spec = ModelString.parse(text)
    if spec.kind == ENSEMBLE:
        strings = spec.members
    elif spec.kind == FOLDER and is_run(spec):
        strings = [str(replace(spec, arch=arch)) for arch in Run.read(spec).singles]
    else:
        strings = [text]
    if "combine" in spec.options:
        raise UsageError(f"--arch {text}: members are trained, not joined; leave combine out.")
    return strings


def bare(classifiers: Sequence[Classifier]) -> str:
    """Return the model string of trained nets' architectures: what a run's folder keeps besides the weights."""
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
    """Return the members of a run, which must be alike in all but their nets.

    Raises:
        UsageError: see `build`; or if they have not the same classes, or see images not in the same way, or the
            method has no use for them.
    """
    members = [
        build(spec, seed + number, sample, classes, method, trust_code) for number, spec in enumerate(specs)
    ]
    counts = set()
    for member in members:
        with torch.no_grad(), drawn(member, Noise("content")):
            counts.add(member(sample).shape[1])
    if len(counts) > 1:
        few, *_, many = sorted(counts)
        raise UsageError(f"--arch names nets of {few} and of {many} classes; give members of the same classes.")
    ways = {
        str([None if of is None else of.tolist() for of in (one.mean, one.std)] + [one.size]) for one in members
    }
    if len(ways) > 1:
        raise UsageError(
            "--arch names nets whose mean, std or size differ, and a run's folder keeps one of each; give members "
            "with the same."
        )
    method.check_nets(members, sample[:1])
    return members


def build(
    spec: ModelString, seed: int, sample: Images, classes: int, method: Method, trust_code: bool
) -> Classifier:
    """Return a net with a seed's initial weights, and what the method puts around it, if it fits the data.

    Raises:
        UsageError: if it is no module with weights, or its logits are not one for each class.
    """
    classifier = load_model(str(spec), seed=seed, trust_code=trust_code).expect(classes)
    if not isinstance(classifier.net, nn.Module) or not any(True for _ in classifier.net.parameters()):
        raise UsageError(f"{spec} has no weights to train; write an architecture, e.g. robustkit:cifar-resnet20.")
    try:
        classifier.train().eval()
    except NotImplementedError as error:
        raise UsageError(
            f"{spec} has no train mode, as a program of torch.export has none; give the net that it was made of."
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


def laid_out(classifier: Classifier, sample: Images) -> Classifier:
    """Return a classifier in train mode in the layout channels_last, or as it is if its net cannot take that.

    Its net takes the images (B C H W) as they are, but may use what another layout does not allow, such as `view`.
    """
    with seeded(0):
        try:
            # Training a copy leaves the running statistics of batch norms alone.
            twin = copy.deepcopy(classifier).to(memory_format=torch.channels_last)
            twin(sample, torch.channels_last).sum().backward()
        except Exception:  # whatever a stranger's code may raise where it is not run as it expects
            return classifier
    classifier.layout = torch.channels_last
    return classifier.to(memory_format=torch.channels_last)


def _wrapped(classifier: Classifier, seed: int, sample: Images, method: WrappingMethod) -> Classifier:
    if classifier.size is not None:
        raise UsageError(
            f"{method.info.name} changes the size of images itself; leave size out of {classifier.string} and "
            "write --enlarge."
        )
    mean, std = (None if of is None else of.flatten().tolist() for of in (classifier.mean, classifier.std))
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
    """Return the floating-point operations of one image's forward pass; a product with its sum counts as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(sample[:1])
    return int(counter.get_total_flops())
