"""Fewer matrix shapes: the code that oneDNN compiles for each shape stays in memory until the process ends."""

import torch


def rounded_rows(count: int, device: torch.device) -> int:
    """`count` rows of a matrix product, on a CPU rounded up to a multiple of 8 or by at most a sixteenth.

    For each new shape in bf16, and for packed matrices in any format, oneDNN (as of torch 2.13) compiles code and never
    frees a quarter of a MiB, whatever the capacity of its cache. The number of real tokens differs from batch to batch:
    with exact numbers a long run would run out of memory. Rounded up, there are only sixteen between a number and its
    double.
    """
    if device.type != "cpu":
        return count
    step = max(8, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step
