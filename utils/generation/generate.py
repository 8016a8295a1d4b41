"""Responses to prompts: by the decode engine where it supports the architecture, by `transformers` for the others."""

import contextlib
from collections.abc import Sequence

from torch import nn

from utils.generation.batching import decode
from utils.generation.decoder import LlamaDecoder, Loading
from utils.generation.fallback import generate_in_batches
from utils.generation.responses import Ends, Responses
from utils.generation.sampling import SamplingParams, row_keys
from utils.generation.tensor_parallel import gather_rows
from utils.models.lora import adapters_off


def generate_responses(
    model: nn.Module,
    prompts: list[list[int]],
    sampling: SamplingParams,
    ends: Ends,
    *,
    seed: int,
    slots: int,
    rows: Sequence[int] | None = None,
    decoder: LlamaDecoder | None = None,
    how: Loading | None = None,
) -> Responses:
    """One response for each prompt: by `decoder`, or without one by `transformers` in batches of `slots` prompts.

    Args:
        rows: the prompts' numbers in the batch of all ranks, so that the decode engine draws the same tokens however
            many ranks there are; without them, prompts are numbered from 0.
        how: how the weights are read, and which adapter is applied. With `how.stream` every rank must call this.
    """
    how = how or Loading()
    if decoder is None:
        with contextlib.nullcontext() if how.adapter is not None else adapters_off(model):
            return generate_in_batches(model, prompts, sampling, ends, seed=seed, slots=slots, synced=how.stream)
    streams = row_keys(seed, range(len(prompts)) if rows is None else rows)
    decoder.load(model, how)
    try:
        if decoder.shard is None:
            responses = decode(decoder, prompts, sampling, ends, seed=seed, slots=slots, keys=streams)
            decoder.finish()
            return responses
        all_prompts, keys, limits, mine = gather_rows(
            decoder.shard, prompts, streams, sampling.max_new_tokens, decoder.device
        )
        slots *= decoder.shard.size  # each process caches its heads for the rows of all processes
        together = decode(decoder, all_prompts, sampling, ends, seed=seed, slots=slots, keys=keys, limits=limits)
        return together.rows(mine)
    finally:
        decoder.unload()
