"""What of a GPU's memory a run uses, and what happens when it is short."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from simulated_gpu import simulated_gpu
from torch import Tensor, nn

import robustkit
from robustkit.attacks.gradient.pgd import PGD
from robustkit.core import memory
from robustkit.core.devices import ComputeDevice, pick_device
from robustkit.core.out_of_memory import is_out_of_memory, retry_in_memory, try_in_memory
from robustkit.crafting import lazy_models
from robustkit.distributed.processes import ProcessPool
from robustkit.distributed.sent_models import SentModel
from robustkit.engine.evaluation import block_runner
from robustkit.engine.model import loaded_models
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.models import as_classifier

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# Bytes of the images that the net below keeps for its backward pass: its input and two activations.
IMAGE = 4 * (3 * 32 * 32 + 2 * 256 * 32 * 32)


class Wide(nn.Module):
    """Two convolutions with many weights; the ReLU between them and the second one keep the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 256, 3, padding=1)
        self.second = nn.Conv2d(256, 256, 3, padding=1)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("gib", [24, 80, 141])
def test_half_of_the_free_memory_is_for_activations(gib: int) -> None:
    model = InstrumentedModel(as_classifier(Wide()), GPU)
    with simulated_gpu(memory=gib << 30):
        model.model.to(GPU)
        measure(model, torch.rand(1, 3, 32, 32).to(GPU), 1 << 20)
    assert IMAGE <= model.saved_bytes < 1.01 * IMAGE
    assert model.micro_batch == (gib << 30) // 2 // model.saved_bytes


def test_weights_and_repeated_tensors_are_not_memory_of_an_image() -> None:
    model = InstrumentedModel(as_classifier(Wide()), CPU)
    measure(model, torch.rand(1, 3, 32, 32), 8)
    assert IMAGE <= model.saved_bytes < 1.01 * IMAGE  # the last layer keeps its input of 256 numbers, too
    assert sum(weight.nbytes for weight in model.model.parameters()) > model.saved_bytes


def test_free_memory_counts_the_cache_and_is_shared_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(memory=80 << 30, cached=2 << 30):
        assert memory.free_memory(GPU) == 82 << 30
        monkeypatch.setattr(memory, "_processes", 4)
        assert memory.free_memory(GPU) == 22 << 30
        assert memory.free_memory() == memory.free_memory(CPU)


@pytest.mark.parametrize(("n", "slots"), [(600, 600), (40, 512)])
def test_slots_are_no_more_than_the_images_that_wait(monkeypatch: pytest.MonkeyPatch, n: int, slots: int) -> None:
    seen: list[int] = []

    def fastest(model: InstrumentedModel, x: Tensor, least: int, most: int) -> int:
        seen.append(most)
        return most

    monkeypatch.setattr(block_runner, "fastest_batch", fastest)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(n, 1, 2, 2)
    y = net(x).argmax(1)
    with simulated_gpu():
        robustkit.evaluate(net, x, y, "linf:0.001", suite="pgd(steps=1)", device="cuda", precision="fp32")
    assert seen == [slots]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("XPU out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_errors_of_every_allocator_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError(str(error)))


@pytest.mark.parametrize(
    "words", ["CUDNN_STATUS_NOT_SUPPORTED. This error may appear", "GET was unable to find an engine"]
)
def test_a_missing_kernel_is_a_lack_of_memory_where_little_is_free(words: str) -> None:
    assert not is_out_of_memory(RuntimeError(words))
    with simulated_gpu(memory=80 << 30):
        assert not is_out_of_memory(RuntimeError(words))
        with mock.patch.object(torch.cuda, "mem_get_info", return_value=(8 << 30, 80 << 30)):
            assert is_out_of_memory(RuntimeError(words))


def test_the_failed_try_is_free_before_the_next_one() -> None:
    class Large:
        alive = 0

        def __init__(self) -> None:
            Large.alive += 1

        def __del__(self) -> None:
            Large.alive -= 1

    tries: list[int] = []

    def work() -> str:
        tries.append(Large.alive)
        kept = Large()
        if len(tries) < 3:
            raise MemoryError
        return f"done with {kept.alive}"

    assert retry_in_memory(work, lambda: None, CPU) == "done with 1"
    assert tries == [0, 0, 0]
    with pytest.raises(RuntimeError, match="other"):
        try_in_memory(lambda: (_ for _ in ()).throw(RuntimeError("other")), CPU)


def small() -> Any:
    data = robustkit.load_data("digits:test").head(5)
    model = robustkit.load_model("robustkit:digits-cnn")
    return robustkit.evaluate(model, data, threat="linf:0.1", suite="pgd(steps=3)", device="cpu", precision="fp32")


def test_memory_that_is_short_between_two_passes_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, step, failed = small(), PGD.step, list[int]()

    def failing(self: PGD, *arguments: Any) -> Any:
        if not failed:
            failed.append(1)
            raise RuntimeError("CUDA error: out of memory")
        return step(self, *arguments)

    monkeypatch.setattr(PGD, "step", failing)
    found = small()
    assert failed
    for one, other in zip(found.verdicts, expected.verdicts, strict=True):
        assert (one.robust, one.attack) == (other.robust, other.attack)
        assert one.margin == pytest.approx(other.margin, rel=1e-5)  # a pass of fewer images rounds differently
    assert (found.cost.forwards, found.cost.backwards) == (expected.cost.forwards, expected.cost.backwards)


def test_a_fingerprint_is_one_download() -> None:
    net = as_classifier(Wide())
    expected = net.fingerprint
    with simulated_gpu() as gpu:
        net.to(GPU)
        gpu.counts.clear()
        assert net.fingerprint == expected
        assert gpu.total("sync") == 1


def test_streamed_nets_are_built_once_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = robustkit.load_model

    def counted(string: str, **options: Any) -> Any:
        loads.append(string)
        return load(string, **options)

    monkeypatch.setattr(loaded_models, "load_model", counted)
    nets = ["robustkit:digits-cnn", "robustkit:digits-cnn?defense=bit-depth"]
    data = robustkit.load_data("digits:test").head(2)
    with simulated_gpu():
        robustkit.craft(nets, data, threat="linf:0.1", attack="mi-fgsm(steps=3)", streaming=True, device="cuda")
    assert sorted(loads) == sorted(3 * nets)  # to measure it, to craft on it, and to judge the images by it
    loads.clear()
    monkeypatch.setattr(lazy_models, "free_memory", lambda: 0)  # no room for a copy in main memory
    with simulated_gpu():
        robustkit.craft(nets, data, threat="linf:0.1", attack="mi-fgsm(steps=3)", streaming=True, device="cuda")
    assert len(loads) > 3 * len(nets)


class RecordingPool(ProcessPool):
    """Three workers that never start; it notes on which device a model is when it is pickled."""

    def __init__(self) -> None:
        self.count, self.seen = 3, list[str]()

    def share(self, value: Any, name: str) -> Any:
        self.seen.append(next(value.parameters()).device.type)
        return None


def test_workers_get_a_share_of_a_gpu_and_python_models_from_the_cpu() -> None:
    pool = RecordingPool()
    with simulated_gpu():
        model = as_classifier(Wide()).to(GPU)
        assert pool.processes_per_device(torch.device("cuda")) == 3
        SentModel.of(pool, model)
        assert pool.seen == ["cpu"]
        assert next(model.parameters()).device == GPU


def test_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu():
        assert pick_device("auto").type == "cuda"
        assert ComputeDevice(GPU).name == "simulated GPU"
        with pytest.raises(robustkit.UsageError, match="write auto, cpu, cuda or cuda:1"):
            pick_device("tpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(robustkit.UsageError, match="'mps' has no float64, in which distances are measured"):
        pick_device("mps")
