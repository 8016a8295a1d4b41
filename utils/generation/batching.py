"""Many responses at once from the decode engine: a loop over the scheduler."""

import dataclasses

import torch

from utils.generation.decoder import LlamaDecoder
from utils.generation.responses import Ends, Responses, no_responses
from utils.generation.sampling import SamplingParams, row_keys
from utils.generation.scheduler import Request, Scheduler
from utils.parallel import distributed


@torch.no_grad()
def decode(
    decoder: LlamaDecoder,
    prompts: list[list[int]],
    sampling: SamplingParams,
    ends: Ends,
    *,
    seed: int,
    slots: int,
    limits: list[int] | None = None,
    keys: torch.Tensor | None = None,
    buckets: bool = False,
) -> Responses:
    """One response for each prompt, by continuous batching: finished rows leave, waiting prompts take their slots.

    Prompts are processed from the longest to the shortest; equal ones (several samples of one prompt) are processed
    once, as long as they decode at the same time. The tokens of a row depend on its prompt and its random stream, not
    on `slots` or on the other rows.

    Args:
        decoder: loaded with the weights to use.
        prompts: token ids, at least one each; none at all is allowed.
        slots: rows that decode together, at most; the KV cache is allocated for as many.
        limits: tokens of each response, at most; without it `max_new_tokens` for all.
        keys: (B,) random streams of the rows; without them, `row_keys` of the seed and the numbers from 0 on.
        buckets: see `Scheduler`.
    """
    if not prompts:
        return no_responses(decoder.device)
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    keys = (row_keys(seed, range(len(prompts))) if keys is None else keys).tolist()
    slots = min(slots, len(prompts))
    scheduler = Scheduler(
        decoder,
        ends,
        slots=slots,
        length=max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)),
        width=max(limits),
        rows=len(prompts),
        admit_at=max(1, slots // 8),
        buckets=buckets,
    )
    by_limit = {limit: dataclasses.replace(sampling, max_new_tokens=limit) for limit in set(limits)}
    first: dict[tuple[int, ...], int] = {}
    identity = [first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)]
    numbers = [0] * len(prompts)
    for row in sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), identity[row])):
        request = Request(prompts[row], by_limit[limits[row]], key=keys[row], stops=ends.stops)
        numbers[row] = scheduler.add(request)
    with distributed.wait("answers", len(prompts)) as bar:
        while scheduler.is_busy:
            scheduler.step()
            bar.update(len(scheduler.finished()))
    return scheduler.take(numbers)
