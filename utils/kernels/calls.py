"""Calls of the compiled operations with tensors as their arguments."""

import torch
from torch import Tensor

from utils.kernels.native import operation

_LETTERS = {float: "f", int: "i"}


def run(name: str, like: Tensor, *arguments: Tensor | float | int | None) -> None:
    """The operation `name` for the type of `like` on contiguous tensors and numbers; nothing on the meta device.

    An `int` is handed over as int64 and a `float` as double: the caller gives what the operation takes.

    Raises:
        ValueError: a tensor is not contiguous; the operation would read other numbers.
    """
    if like.is_meta:
        return
    if not all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor)):
        raise ValueError(f"{name}: a tensor is not contiguous")
    letters = "".join([_LETTERS.get(type(argument), "p") for argument in arguments])
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    operation(name, like.dtype, letters + "i")(*values, torch.get_num_threads())
