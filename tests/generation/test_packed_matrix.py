"""The packed product against `F.linear`, and what happens where a machine lacks it."""

import pytest
import torch
import torch.nn.functional as F

from utils.generation import packed_matrix
from utils.generation.packed_matrix import PackedMatrix, can_pack, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_the_product_of_any_number_of_rows(dtype, with_bias, rows):
    weight, bias = torch.randn(48, 32).to(dtype), torch.randn(48).to(dtype) if with_bias else None
    if not can_pack(weight):
        pytest.skip(f"this machine has no packed product in {dtype}")
    inputs = torch.randn(rows, 32).to(dtype)
    matrix = PackedMatrix(weight)
    assert matrix.shape == (48, 32)
    expected = F.linear(inputs.double(), weight.double(), bias.double() if with_bias else None)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(linear(inputs, matrix, bias).double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(linear(inputs, weight, bias).double(), expected, atol=tolerance, rtol=tolerance)


def test_a_packed_matrix_is_a_copy():
    weight = torch.randn(8, 8)
    matrix, inputs = PackedMatrix(weight), torch.randn(3, 8)
    before = matrix.product(inputs, None)
    weight.zero_()
    assert torch.equal(matrix.product(inputs, None), before)


def test_other_number_formats_and_machines_without_the_product_read_matrices_as_they_are(monkeypatch):
    assert can_pack(torch.zeros(2, 2)) and not can_pack(torch.zeros(2, 2, dtype=torch.float64))
    monkeypatch.setattr(packed_matrix.torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(torch.zeros(2, 2))
