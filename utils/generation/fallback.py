"""Responses by `transformers`' own generate, for architectures that the decode engine does not support."""

import torch
from torch import nn
from transformers import GenerationConfig

from utils.algorithms.masking import response_mask
from utils.generation.responses import Ends, Responses, finish, no_responses, stacked
from utils.generation.sampling import SamplingParams
from utils.generation.stop_strings import StopStringCriteria
from utils.parallel import distributed


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    sampling: SamplingParams,
    ends: Ends,
    *,
    seed: int,
    synced: bool = False,
) -> Responses:
    """`transformers`' own `generate` on all the prompts at once, padded on the left.

    Args:
        model: a `transformers` causal LM whose weights are whole on this rank, unless `synced`.
        seed: the only source of randomness; the global random state is left unchanged.
        synced: the weights are partitioned, and every forward gathers them: all ranks continue until the last is done.
    """
    width, device = max(map(len, prompts)), model.device
    input_ids = torch.tensor([[ends.pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    attention_mask = torch.arange(width, device=device) >= width - lengths[:, None]
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    settings = GenerationConfig(
        do_sample=not sampling.greedy,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        eos_token_id=ends.eos_id,
        pad_token_id=ends.pad_id,
        use_cache=True,
        **({} if sampling.greedy else drawn),
    )
    stops = ends.stops
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask.long(),
            generation_config=settings,
            stopping_criteria=None if stops is None else [StopStringCriteria(stops, width)],
            synced_gpus=synced,
        )
    tokens = sequences[:, width : width + sampling.max_new_tokens]
    lengths = response_mask(tokens, ends.eos_id).sum(1)
    by_string = torch.zeros_like(lengths, dtype=torch.bool)
    if stops is not None:
        found = [stops.first_stop(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        by_string = torch.tensor([stop is not None for stop in found], device=device)
        lengths = torch.where(by_string, torch.tensor([stop or 0 for stop in found], device=device), lengths)
    return finish(tokens, lengths, by_string, ends)


def generate_in_batches(
    model: nn.Module,
    prompts: list[list[int]],
    sampling: SamplingParams,
    ends: Ends,
    *,
    seed: int,
    slots: int,
    synced: bool,
) -> Responses:
    """`generate` for `slots` prompts at a time; `synced` ranks all run as many batches as the one with the most.

    `generate` has one random stream for a whole batch, whatever its prompts, so every batch gets its own seed.
    """
    starts = list(range(0, len(prompts), slots))
    rounds = int(distributed.all_reduce_scalar(len(starts), "max")) if synced else len(starts)
    batches = []
    for start in distributed.wait("answers, batches", rounds).over(range(0, rounds * slots, slots)):
        batch = prompts[start : start + slots] or [[ends.pad_id]]
        own_seed = distributed.derived_seed(seed, distributed.rank(), start)
        batches.append(generate(model, batch, sampling, ends, seed=own_seed, synced=synced))
    if not starts:
        return no_responses(model.device, with_logprobs=False)
    return stacked(batches[: len(starts)], pad_id=ends.pad_id)
