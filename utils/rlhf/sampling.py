"""Choosing tokens from logits, with a random stream of its own for every row.

Randomness is counter-based: the number that decides a token is a hash of the seed, the row's stream and the token's
place in the response. So a row's tokens do not depend on which rows share its batch, in which order, on which device.
"""

from dataclasses import dataclass

import torch

from utils.kernels import decoding
from utils.kernels.native import usable

# The finalizer of splitmix64 (Steele, Lea and Flood 2014), in the int64 arithmetic that torch has everywhere.
_GAMMA = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
BLOCK = 128  # words whose weights are added up before the search


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample. `greedy` ignores temperature, top_k and top_p; top_k 0 and top_p 1 are off.

    With any of min_new_tokens, top_k and top_p, responses come from another distribution than the model's, which is
    what PPO's ratio is about: the gradient is biased.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (not arithmetic) shift of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix(values: torch.Tensor) -> torch.Tensor:
    """int64 -> int64, every output bit depends on every input bit."""
    values = values + _GAMMA
    values = (values ^ _shift_right(values, 30)) * _MIX_1
    values = (values ^ _shift_right(values, 27)) * _MIX_2
    return values ^ _shift_right(values, 31)


def row_keys(seed: int, prompts: list[list[int]]) -> torch.Tensor:
    """(B,) int64 keys of the rows' random streams, from the seed and the ids of each row's prompt.

    The second, third, ... time that the same prompt occurs it gets the second, third, ... stream.
    """
    seen: dict[tuple[int, ...], int] = {}
    streams = []
    for prompt in map(tuple, prompts):
        seen[prompt] = seen.get(prompt, 0) + 1
        streams.append(hash((seed, seen[prompt], prompt)))  # integers hash alike in every process
    return mix(torch.tensor(streams, dtype=torch.int64))


def uniform(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """(n,) fp32 numbers in [0, 1), multiples of 2^-23, from int64 keys and counters."""
    return _shift_right(mix(keys ^ mix(counters)), 41).float() * 2.0**-23


def choose_tokens(
    logits: torch.Tensor, sampling: SamplingParams, keys: torch.Tensor, counters: torch.Tensor, *, eos_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row, and its log-probability under softmax(logits / temperature) (greedy: temperature 1).

    Sampling inverts the cumulative distribution at one uniform number per row, which costs a fraction of
    `torch.multinomial`.

    Args:
        logits: (n, V), any float dtype.
        keys: (n,) from `row_keys`. counters: (n,) int64, the token's place in its response.
        eos_id: forbidden while a response is shorter than `min_new_tokens`.
    """
    if sampling.top_k == 0 and sampling.top_p == 1.0 and usable(logits):
        return decoding.choose(
            logits, keys, counters, greedy=sampling.greedy, temperature=sampling.temperature,
            min_new_tokens=sampling.min_new_tokens, eos_id=eos_id,
        )  # fmt: skip
    logits = logits.float()
    if sampling.min_new_tokens:
        too_short = counters < sampling.min_new_tokens
        logits[:, eos_id] = torch.where(too_short, float("-inf"), logits[:, eos_id])
    if sampling.greedy:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    probabilities = torch.softmax(logits, -1)
    tokens = invert(_filtered(probabilities, sampling), uniform(keys, counters)[:, None])
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def invert(weights: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Where the cumulative sum of each row first exceeds the given share of its total: (n, V), (n, 1) -> (n,).

    A large vocabulary is searched in two levels, first among the sums of blocks and then inside one, since a cumulative
    sum over all words takes longer than everything else in sampling. A word of weight 0 is never found. Weights that
    are NaN give any word, but a word: what reads its id next would be an index out of bounds.
    """
    rows, vocabulary = weights.shape
    if vocabulary < 16 * BLOCK:
        return _search(weights.cumsum(-1), quantiles * weights.sum(-1, keepdim=True)).squeeze(1)
    if vocabulary % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - vocabulary % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).cumsum(-1)
    targets = quantiles * sums[:, -1:]
    block = _search(sums, targets)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1)
    return (block * BLOCK + _search(inside, targets - before)).squeeze(1).clamp(max=vocabulary - 1)


def _search(cumulative: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(n, 1) first column of each row whose value exceeds the target, which is kept below the row's last value."""
    targets = torch.minimum(targets.clamp(min=0.0), cumulative[:, -1:] * (1 - 2.0**-23))
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=cumulative.size(1) - 1)


def _filtered(probabilities: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities with those outside top-k and, after that, outside top-p set to 0 (Holtzman et al. 2020)."""
    if 0 < sampling.top_k < probabilities.size(1):
        least = probabilities.topk(sampling.top_k).values[:, -1:]
        probabilities = torch.where(probabilities < least, 0.0, probabilities)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = torch.where(before >= sampling.top_p * ordered.sum(-1, keepdim=True), 0.0, ordered)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    return probabilities
