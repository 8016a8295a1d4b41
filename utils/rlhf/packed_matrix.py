"""Matrices in the layout that oneDNN computes with: on a CPU, few rows times a matrix take a quarter to two thirds."""

import torch
import torch.nn.functional as F

_DTYPES = (torch.float32, torch.bfloat16)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine has the packed product for matrices like `weight`.

    torch keeps it for its own compiler, under names that may change; without them matrices are read as they are.
    """
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    operations = torch.ops.mkldnn
    if not (hasattr(operations, "_reorder_linear_weight") and hasattr(operations, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedMatrix:
    """A copy of an (out, in) matrix in oneDNN's layout."""

    def __init__(self, weight: torch.Tensor):
        self.shape = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(n, in) -> (n, out)."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, bias, "none", [], "")


def linear(inputs: torch.Tensor, matrix: torch.Tensor | PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with a matrix in either form."""
    return matrix.product(inputs, bias) if isinstance(matrix, PackedMatrix) else F.linear(inputs, matrix, bias)
