"""The compiled operations between the matrix products of attention; `usable` says whether they run.

Notation as in `attention.cpp`: S sequences, T width of their rectangle, Q query heads, h heads, D of a head.
"""

import torch
from torch import Tensor

from utils.kernels.calls import run


def gather_heads(tokens: Tensor, places: Tensor | None, *, sequences: int, width: int, query_heads: int) -> Tensor:
    """(tokens, h, D) as (S * Q, T, D), each head Q / h times: at `places` of the S * T among zeros, or in order."""
    tokens = tokens.contiguous()
    count, heads, size = tokens.shape
    make = torch.empty if places is None else torch.zeros
    rectangle = make(sequences * query_heads, width, size, dtype=tokens.dtype)
    run("gather_heads", tokens, tokens, places, rectangle, count, width, heads, query_heads, size)
    return rectangle


def scatter_heads(rectangle: Tensor, places: Tensor | None, tokens: Tensor, *, query_heads: int) -> None:
    """Fill `tokens` (tokens, h, D) from (S * Q, T, D): the way back, the copies of a head added up."""
    count, heads, size = tokens.shape
    run("scatter_heads", tokens, rectangle, places, tokens, count, rectangle.size(1), heads, query_heads, size)


def causal_softmax_(scores: Tensor, first: int) -> None:
    """Softmax of scores (n, queries, keys) in place, where query q sees the first `first` + q + 1 keys."""
    run("causal_softmax", scores, scores, *scores.shape, first)


def causal_softmax_backward_(gradient: Tensor, weights: Tensor, first: int) -> None:
    """Turn the gradient of the weights (n, queries, keys) into that of the scores, in place."""
    run("causal_softmax_backward", weights, gradient, weights, *weights.shape, first)
