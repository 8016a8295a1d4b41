"""Bytes as the C library's allocator sees them, since its behaviour decides a CPU process's resident memory.

A block of 32 MiB or more comes from the system and goes back to it the moment it is freed. Smaller ones come from a
heap that grows and hardly ever shrinks: what was freed there serves later small blocks only (glibc, malloc(3),
M_MMAP_THRESHOLD, whose maximum is 32 MiB). A GPU's caching allocator makes no such distinction.
"""

from collections.abc import Iterable
from dataclasses import dataclass

LARGE_BLOCK = 32 << 20


@dataclass(frozen=True)
class Blocks:
    """Bytes in `small` blocks and in `large` ones."""

    small: float = 0.0
    large: float = 0.0

    @property
    def total(self) -> float:
        return self.small + self.large

    def __add__(self, other: "Blocks") -> "Blocks":
        return Blocks(self.small + other.small, self.large + other.large)

    def __sub__(self, other: "Blocks") -> "Blocks":
        return Blocks(self.small - other.small, self.large - other.large)

    def __mul__(self, factor: float) -> "Blocks":
        return Blocks(self.small * factor, self.large * factor)


def blocks_of(sizes: Iterable[float]) -> Blocks:
    """Blocks of the given sizes, in bytes."""
    small = large = 0.0
    for size in sizes:
        if size >= LARGE_BLOCK:
            large += size
        else:
            small += size
    return Blocks(small, large)


def block(size: float) -> Blocks:
    """One block of `size` bytes."""
    return blocks_of([size])
