"""Choosing tokens from logits, with separate parameters and a separate random stream for every row.

Randomness is counter-based: the number that decides a token is a hash of the seed, the row's stream and the token's
place in the response. So a row's tokens do not depend on which rows share its batch, in which order, on which device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from utils.kernels import decoding
from utils.kernels.native import usable
from utils.parallel.distributed import derived_seed

# The finalizer of splitmix64 (Steele, Lea and Flood 2014), in the int64 arithmetic that torch has everywhere.
_GAMMA = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
BLOCK = 128  # vocabulary entries whose weights are summed before the search


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one response. `greedy` ignores temperature, top_k and top_p; top_k 0 and top_p 1 are off.

    With any of min_new_tokens, top_k and top_p, responses are not drawn from the model's own distribution, which PPO's
    ratio assumes: the gradient is biased.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


@dataclass(frozen=True)
class Kinds:
    """The kinds of sampling that occur in a batch, known on the host, so that work which no row needs is skipped.

    Attributes:
        samples, greedy: some row draws its tokens; some row takes the likeliest.
        scales: some row that draws its tokens has a temperature other than 1.
        minimum: some row has a minimum length.
        top_k: the largest top_k, 0 for none. top_p: some row uses top_p.
        plain: some row uses neither.
    """

    samples: bool
    greedy: bool
    scales: bool
    minimum: bool
    top_k: int
    top_p: bool
    plain: bool

    @staticmethod
    def of(rows: Iterable[SamplingParams]) -> "Kinds":
        """The kinds of rows with these parameters."""
        rows = list(rows)
        drawn = [row for row in rows if not row.greedy]
        return Kinds(
            samples=bool(drawn),
            greedy=len(drawn) < len(rows),
            scales=any(row.temperature != 1.0 for row in drawn),
            minimum=any(row.min_new_tokens for row in rows),
            top_k=max((row.top_k for row in drawn), default=0),
            top_p=any(row.top_p < 1.0 for row in drawn),
            plain=any(row.greedy or (not row.top_k and row.top_p == 1.0) for row in rows),
        )

    @property
    def filters(self) -> bool:
        return bool(self.top_k) or self.top_p


@dataclass(frozen=True)
class RowSampling:
    """The parameters of n rows as tensors on their device, (n,) each, and the kinds among them."""

    temperature: torch.Tensor  # float64, 0 for greedy
    top_p: torch.Tensor  # float64
    top_k: torch.Tensor  # int64
    minimum: torch.Tensor  # int64, tokens before EOS may be chosen
    kinds: Kinds

    @staticmethod
    def of(rows: list[SamplingParams], device: torch.device | str = "cpu") -> "RowSampling":
        """The tensors for rows with these parameters."""
        numbers = torch.tensor([real_numbers(row) for row in rows], dtype=torch.float64, device=device)
        integers = torch.tensor([whole_numbers(row) for row in rows], dtype=torch.int64, device=device)
        return RowSampling(*numbers.t().contiguous(), *integers.t().contiguous(), Kinds.of(rows))


def real_numbers(sampling: SamplingParams) -> tuple[float, float]:
    """Temperature and top_p as the tensors store them."""
    return (0.0, 1.0) if sampling.greedy else (sampling.temperature, sampling.top_p)


def whole_numbers(sampling: SamplingParams) -> tuple[int, int]:
    """top_k and the minimum length as the tensors store them."""
    return 0 if sampling.greedy else sampling.top_k, sampling.min_new_tokens


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (not arithmetic) shift of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix(values: torch.Tensor) -> torch.Tensor:
    """int64 -> int64, every output bit depends on every input bit."""
    values = values + _GAMMA
    values = (values ^ _shift_right(values, 30)) * _MIX_1
    values = (values ^ _shift_right(values, 27)) * _MIX_2
    return values ^ _shift_right(values, 31)


def row_keys(seed: int, rows: Sequence[int]) -> torch.Tensor:
    """(B,) int64 keys of the random streams of rows, from the seed and each row's number in the batch of all ranks."""
    return mix(torch.tensor([derived_seed(seed, row) for row in rows], dtype=torch.int64))


def uniform(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """(n,) fp32 numbers in [0, 1), multiples of 2^-23, from int64 keys and counters."""
    return _shift_right(mix(keys ^ mix(counters)), 41).float() * 2.0**-23


def choose_tokens(
    logits: torch.Tensor, sampling: RowSampling, keys: torch.Tensor, counters: torch.Tensor, *, eos_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row, and its log-probability under softmax(logits / temperature) (greedy: temperature 1).

    Sampling inverts the cumulative distribution at one uniform number per row, which costs a fraction of
    `torch.multinomial`.

    Args:
        logits: (n, V), any float dtype; fp32 ones may be overwritten.
        keys: (n,) from `row_keys`. counters: (n,) int64, the token's place in its response.
        eos_id: forbidden while a response is shorter than its minimum.
    """
    if not usable(logits) or not sampling.kinds.plain:
        return _choose(logits, sampling, keys, counters, eos_id)
    chosen, logprobs = decoding.choose_from_logits(
        logits, keys, counters, sampling.temperature, sampling.minimum, eos_id=eos_id
    )
    if sampling.kinds.filters:  # which the compiled operation does not support: these rows are chosen again
        rows = ((sampling.top_k > 0) | (sampling.top_p < 1)).nonzero().squeeze(1)
        vectors = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.minimum)
        part = RowSampling(*(vector[rows] for vector in vectors), sampling.kinds)
        chosen[rows], logprobs[rows] = _choose(logits[rows], part, keys[rows], counters[rows], eos_id)
    return chosen, logprobs


def _choose(
    logits: torch.Tensor, sampling: RowSampling, keys: torch.Tensor, counters: torch.Tensor, eos_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choose_tokens` with PyTorch's operations; all shapes follow from `sampling.kinds` and those of the arguments."""
    logits, kinds = logits.float(), sampling.kinds
    if kinds.minimum:
        too_short = counters < sampling.minimum
        logits[:, eos_id] = torch.where(too_short, float("-inf"), logits[:, eos_id])
    likeliest = _greedy(logits) if kinds.greedy else None
    if not kinds.samples:
        return likeliest
    is_greedy = sampling.temperature == 0
    if kinds.scales:
        logits = logits / torch.where(is_greedy, 1.0, sampling.temperature).float()[:, None]
    probabilities = torch.softmax(logits, -1)
    tokens = invert(_filtered(probabilities, sampling), uniform(keys, counters)[:, None])
    logprobs = probabilities.gather(1, tokens[:, None]).squeeze(1).log()
    if likeliest is None:
        return tokens, logprobs
    return torch.where(is_greedy, likeliest[0], tokens), torch.where(is_greedy, likeliest[1], logprobs)


def _greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits.argmax(-1)
    return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


def invert(weights: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Where the cumulative sum of each row first exceeds the given share of its total: (n, V), (n, 1) -> (n,).

    A large vocabulary is searched in two levels, first among the sums of blocks and then inside one, since a cumulative
    sum over the whole vocabulary takes longer than everything else in sampling. A token of weight 0 is never found.
    NaN weights give an arbitrary token, but always a valid id: others would be out of bounds where they are used next.
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


def _filtered(probabilities: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """Probabilities with those outside top-k and, after that, outside top-p set to 0 (Holtzman et al. 2020)."""
    kinds, words = sampling.kinds, probabilities.size(1)
    if kinds.top_k:
        largest = min(kinds.top_k, words)
        is_filtered = (sampling.top_k > 0) & (sampling.top_k < words)
        place = (sampling.top_k - 1).clamp(0, largest - 1)[:, None]
        least = probabilities.topk(largest).values.gather(1, place)
        keeps = (probabilities >= least) | ~is_filtered[:, None]
        probabilities = torch.where(keeps, probabilities, 0.0)
    if kinds.top_p:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        top_p = sampling.top_p.float()[:, None]
        beyond = (before >= top_p * ordered.sum(-1, keepdim=True)) & (top_p < 1)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, torch.where(beyond, 0.0, ordered))
    return probabilities
