"""Which tokens count: masks from lengths and end-of-sequence positions, and reductions that respect them.

    tokens           5  8  2  0  0      eos_id = 2
    response_mask    T  T  T  .  .      true through the first EOS, inclusive
    last_index             2            where the score of the sequence goes

Padding behind the first EOS may be any token, EOS included.
"""

import torch
from torch import Tensor


def response_mask(tokens: Tensor, eos_id: int) -> Tensor:
    """True through the first EOS of each row, inclusive; all true in a row without one.

    Only the first EOS matters, so the result is the same whether the columns after it hold padding, more EOS tokens
    (pad == eos) or anything else.

    Args:
        tokens: (B, R) token ids of the responses alone, right-padded.
        eos_id: id of the end-of-sequence token.
    Returns:
        (B, R) bool.
    """
    is_eos = tokens == eos_id
    eos_before = is_eos.cumsum(dim=1) - is_eos.long()
    return eos_before == 0


def lengths_to_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, width) bool, true in the first `lengths[i]` columns of row i."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, T) int64 positions that count real tokens from 0, whichever side the padding is on.

    Padding on the left gets 0, padding on the right repeats the last position; neither is attended to.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def left_aligned(attention_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The mask and other (B, T) tensors with the real tokens of each row, which are contiguous, in its first columns.

    Recurrent layers read padding on the left as tokens; padding behind the last token affects none of them.
    """
    first = attention_mask.int().argmax(1, keepdim=True)
    columns = torch.arange(attention_mask.size(1), device=attention_mask.device) + first
    inside = columns < attention_mask.size(1)
    columns = columns.clamp(max=attention_mask.size(1) - 1)
    return attention_mask.gather(1, columns) & inside, *(tensor.gather(1, columns) for tensor in tensors)


def last_index(mask: Tensor) -> Tensor:
    """(B, R) mask -> (B,) int64 column of the last true entry, -1 for a row that has none."""
    columns = torch.arange(mask.size(1), device=mask.device)
    return columns.masked_fill(~mask.bool(), -1).amax(dim=1)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask` is true, over everything or along `dim`, in fp32 or wider.

    Selects rather than multiplies: `nan * 0` is nan, and garbage behind a mask must stay there.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask.bool(), wide, 0).sum(dim=dim)
