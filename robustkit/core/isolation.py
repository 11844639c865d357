"""Contexts that restore the state of the process: generators, training mode, gradient modes, folder."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import torch
from torch import nn

from robustkit.core.devices import ACCELERATORS
from robustkit.core.errors import RunError
from robustkit.core.float32 import float32_operations


@contextmanager
def own_randomness(*key: object) -> Iterator[None]:
    """Seed all global generators (torch, numpy, random) from `key` inside, and restore them afterwards.

    For attacks of other packages and for random models; robustkit's attacks draw from `robustkit.core.rng`.
    """
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
    before_numpy, before_random = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before_numpy)
            random.setstate(before_random)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch draw the same initial weights every time, and leave the caller's generator as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def generators() -> dict[str, torch.Tensor]:
    """Return the states of all global generators (torch, numpy, random, CUDA devices) as tensors by name."""
    _, words, index, has, value = np.random.get_state()
    version, numbers, spare = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.array([*words, index, has], np.int64)),
        "numpy-normal": torch.tensor([value], dtype=torch.float64),
        "random": torch.tensor([version, *numbers]),
        "random-normal": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {f"cuda-{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_generators(states: Mapping[str, torch.Tensor]) -> None:
    """Set the states of all global generators."""
    torch.set_rng_state(states["torch"])
    *words, index, has = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), index, has, float(states["numpy-normal"])))
    version, *numbers = states["random"].tolist()
    random.setstate((version, tuple(numbers), next(iter(states["random-normal"].tolist()), None)))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for name, state in states.items():
            if name.startswith("cuda-") and int(name[5:]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, int(name[5:]))


@contextmanager
def default_torch_modes() -> Iterator[None]:
    """Switch autograd on, and inference mode and autocast off, inside."""
    devices = ["cpu", *(kind for kind in ACCELERATORS if torch.get_device_module(kind).is_available())]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of torch's CPU threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def switch_mode(module: nn.Module, training: bool) -> set[nn.Module]:
    """Set a module to train or eval mode; return its parts without a mode, such as an exported program."""
    try:
        module.train(training)
    except NotImplementedError:
        module.training = training
        if "train" in vars(module) or type(module).train is not nn.Module.train:
            for part in module.modules():
                part.training = training
            return set(module.modules())
        return set[nn.Module]().union(*(switch_mode(child, training) for child in module.children()))
    return set()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[bool]:
    """Set all modules to eval mode inside, without parameter gradients; yield whether any was in train mode.

    Operations in float32 have full precision inside, since verdicts are read there.

    Attacks need input gradients only. Without this, an attack that calls `.backward()` would also compute the
    parameters' gradients and leave them in `.grad`.
    """
    # A frozen script module has no mode.
    training = {module: module.training for module in model.modules() if hasattr(module, "training")}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    without_mode = switch_mode(model, False)
    for parameter in trained:
        parameter.requires_grad_(False)
    inner = training.keys() - without_mode - {model}
    try:
        with float32_operations("ieee"):
            yield any(training[module] for module in inner) or (training[model] and not without_mode)
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def same_folder() -> Iterator[None]:
    """Return to the current folder afterwards: a user's code may change it, and robustkit's paths are relative."""
    before = Path.cwd()
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def quietly() -> Iterator[None]:
    """Hide what is written to stderr inside, for trials: a traced net prints why it failed."""
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Turn sys.exit into an error inside, so that a user's code cannot end the process.

    Args:
        what: what is run, for the message.

    Raises:
        RunError: `what` called sys.exit.
    """
    try:
        yield
    except SystemExit as error:
        raise RunError(f"{what} called sys.exit({error.code!r}): remove that call from its code.") from error


def training_count(model: nn.Module) -> int:
    """Return the number of a model's modules in train mode."""
    return sum(getattr(module, "training", False) for module in model.modules())
