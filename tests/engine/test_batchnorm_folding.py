"""Folded batch norms: the same function, and only where folding is safe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustkit.engine.model.batchnorm_folding import folded
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.tuning import tune
from robustkit.models import as_classifier
from robustkit.models.classifier import Classifier


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 7, 6))
    with torch.no_grad():
        layers[1].running_mean.normal_()
        layers[1].running_var.uniform_(0.5, 2)
        layers[1].weight.normal_()
    return layers.eval()


X = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(1))


def test_the_folded_net_is_the_same_function_and_the_original_is_unchanged() -> None:
    model = Classifier(net(), string="x", identity={}, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    twin = folded(model, X)
    assert twin is not None
    assert not any(isinstance(part, nn.BatchNorm2d) for part in twin.modules())
    assert torch.allclose(twin(X), model(X), atol=1e-5)
    assert all(torch.equal(value, model.net.state_dict()[name]) for name, value in before.items())
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.modules())


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn(x.shape))


class Branching(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.mean() > 0 else self.net(-x)


def hooked() -> nn.Module:
    model = net()
    model[1].register_forward_hook(lambda part, given, out: out + 1)
    return model


@pytest.mark.parametrize(
    "make", [Noisy, Branching, hooked, lambda: nn.Sequential(nn.Flatten(), nn.Linear(189, 6))]
)
def test_nets_that_tracing_could_change_are_not_folded(make: type[nn.Module]) -> None:
    assert folded(as_classifier(make().eval()), X) is None


def test_tuning_the_search_keeps_the_logits() -> None:
    model = as_classifier(net())
    instrumented = InstrumentedModel(model, torch.device("cpu"))
    plain = instrumented(X)
    tune(instrumented, X, precision=False)
    assert torch.allclose(instrumented(X), plain, atol=1e-5)
    assert torch.equal(instrumented.logits_fp32(X), model(X).detach())
