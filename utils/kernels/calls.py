"""Calls of the compiled operations with tensors as their arguments."""

import torch
from torch import Tensor

from utils.kernels.native import operation

_LETTERS = {float: "f", int: "i"}


def call(name: str, like: Tensor, *arguments: Tensor | float | int | None) -> None:
    """Run the operation `name` for the dtype of `like` on contiguous tensors and numbers; nothing on the meta device.

    An `int` is passed as int64 and a `float` as double: the caller must pass the types that the operation takes.

    Raises:
        ValueError: a tensor is not contiguous; the operation would read the wrong numbers.
    """
    if like.is_meta:
        return
    if not all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor)):
        raise ValueError(f"{name}: a tensor is not contiguous")
    letters = "".join([_LETTERS.get(type(argument), "p") for argument in arguments])
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    operation(name, like.dtype, letters + "i")(*values, torch.get_num_threads())
