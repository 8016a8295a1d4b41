"""Generation on a CPU has three ways to compute the same thing; a GPU uses the last."""

import pytest

from utils.generation import packed_matrix
from utils.kernels import native

WAYS = ("small model", "compiled", "PyTorch")


@pytest.fixture(params=WAYS)
def operations(request, monkeypatch) -> str:
    """Which operations generation uses: a step in one call, compiled ones between matrix products, or PyTorch's."""
    if request.param != "PyTorch" and native.library() is None:
        pytest.skip("this machine compiles no operations: it has no C++ compiler, or RLHF_CPU_KERNELS is 0")
    if request.param == "compiled":
        monkeypatch.setattr(packed_matrix, "SMALL", 0)
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    return request.param
