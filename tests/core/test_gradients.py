"""Vector-Jacobian products."""

import pytest
import torch

from robustkit.core.gradients import vector_jacobian


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_bit_equal_to_that_of_autograd(dtype):
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(5, 7, generator=generator).requires_grad_()
    output = (point.sin() @ torch.randn(7, 3, generator=generator)).to(dtype)
    vector = torch.randn(5, 3, generator=generator).to(dtype)
    vector[0, 0] = torch.inf
    (expected,) = torch.autograd.grad(output, point, vector, retain_graph=True)
    with torch.no_grad():
        found = vector_jacobian(output, point, vector)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(found.isnan(), expected.isnan())


def test_the_product_is_zero_for_a_point_without_influence():
    point, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert torch.equal(vector_jacobian(2 * other, point, torch.ones(2)), torch.zeros(2))
