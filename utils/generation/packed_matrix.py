"""Matrices in oneDNN's own layout: on a CPU, multiplying a few rows takes a quarter to two thirds of the time.

With a small matrix, oneDNN's overhead takes longer than the product itself. For the few rows of a decode step such a
matrix is also kept in a second layout, for our own product.
"""

import torch
import torch.nn.functional as F

from utils.kernels import decoding
from utils.kernels.native import usable

SMALL = 1 << 17  # elements of a matrix, at most
_DTYPES = (torch.float32, torch.bfloat16)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine has the packed product for matrices like `weight`.

    torch has it for its own compiler, under names that may change; where they are missing, matrices are not packed.
    """
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    operations = torch.ops.mkldnn
    if not (hasattr(operations, "_reorder_linear_weight") and hasattr(operations, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedMatrix:
    """A copy of an (out, in) matrix in oneDNN's layout, and of a small one in that of `decoding.small_product`.

    Attributes:
        panels: the second copy; None for a matrix that is not small.
    """

    def __init__(self, weight: torch.Tensor):
        self.shape = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.panels = decoding.panels(weight.detach()) if weight.numel() <= SMALL and usable(weight) else None

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None, *, is_step: bool = False) -> torch.Tensor:
        """(n, in) -> (n, out).

        Args:
            is_step: these are the rows of a decode step. The caller passes this, since it must not be inferred from n:
                the two products round differently, and a row must not depend on how many share its batch.
        """
        if is_step and self.panels is not None:
            return decoding.small_product(inputs, self.panels, self.shape[0], bias)
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, bias, "none", [], "")


def linear(
    inputs: torch.Tensor,
    matrix: torch.Tensor | PackedMatrix,
    bias: torch.Tensor | None = None,
    *,
    is_step: bool = False,
) -> torch.Tensor:
    """`F.linear` with a matrix in either form; `is_step` as for `PackedMatrix.product`."""
    return (
        matrix.product(inputs, bias, is_step=is_step)
        if isinstance(matrix, PackedMatrix)
        else F.linear(inputs, matrix, bias)
    )
