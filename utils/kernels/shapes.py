"""Few shapes of matrices: what oneDNN compiles for a shape, a CPU process keeps until it ends."""

import torch


def rounded_rows(count: int, device: torch.device) -> int:
    """Rows that a matrix product of `count` rows should have: at most a sixteenth more, or 8, on a CPU.

    For each shape that it meets in bf16, and for packed matrices in any format, oneDNN (as of torch 2.13) compiles code
    and keeps a quarter of a MiB for ever, whatever the capacity of its cache. Numbers of real tokens are all different:
    a long run on them would run out of memory. Rounded up there are sixteen between a number and its double.
    """
    if device.type != "cpu":
        return count
    step = max(8, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step
