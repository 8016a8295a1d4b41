"""Responses to prompts: the decode engine for LLaMA-shaped models, `transformers`' own `generate` for the others."""

import contextlib
from typing import Literal

import torch
from torch import nn
from transformers import GenerationConfig

from utils import distributed
from utils.algorithms.masking import response_mask
from utils.models.lora import ADAPTER, adapters_off
from utils.rlhf.batching import decode
from utils.rlhf.decoder import LlamaDecoder
from utils.rlhf.responses import Generation, Stop, finished, stacked
from utils.rlhf.sampling import SamplingParams, row_keys
from utils.rlhf.stop_strings import StopStringCriteria, StopStrings
from utils.rlhf.tensor_parallel import gather_rows

__all__ = ["Generation", "Stop", "decode", "generate", "respond"]


@torch.no_grad()
def generate(
    model: nn.Module, prompts: list[list[int]], sampling: SamplingParams, *,
    eos_id: int, pad_id: int, seed: int, stops: StopStrings | None = None, synced: bool = False,
) -> Generation:  # fmt: skip
    """`transformers`' own `generate` on all the prompts at once, padded on the left.

    Args:
        model: a `transformers` causal LM whose weights are whole on this rank, unless `synced`.
        seed: alone decides the randomness; the global random state is left as it was.
        stops: texts that end a response.
        synced: the weights are partitioned, and every forward gathers them: all ranks go on until the last is done.
    """
    width, device = max(map(len, prompts)), model.device
    input_ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    attention_mask = torch.arange(width, device=device) >= width - lengths[:, None]
    settings = GenerationConfig(
        do_sample=not sampling.greedy,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        use_cache=True,
        **(
            {}
            if sampling.greedy
            else {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        ),
    )
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
    lengths = response_mask(tokens, eos_id).sum(1)
    by_string = torch.zeros_like(lengths, dtype=torch.bool)
    if stops is not None:
        found = [stops.first_stop(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        by_string = torch.tensor([stop is not None for stop in found], device=device)
        lengths = torch.where(by_string, torch.tensor([stop or 0 for stop in found], device=device), lengths)
    return finished(tokens, lengths, by_string, eos_id=eos_id, pad_id=pad_id)


def respond(
    model: nn.Module, prompts: list[list[int]], sampling: SamplingParams, *,
    eos_id: int, pad_id: int, seed: int, slots: int, decoder: LlamaDecoder | None = None,
    stops: StopStrings | None = None, adapter: str | None = ADAPTER,
    lora: Literal["fused", "unfused"] = "fused", stream: bool = False, gather_layers: int = 8,
) -> Generation:  # fmt: skip
    """One response for each prompt: by `decoder`, or without one by `generate` in batches of `slots` prompts.

    Args:
        adapter: the LoRA adapter to apply; None is the base model.
        lora, gather_layers: see `LlamaDecoder.load`.
        stream: the layers are partitioned and gathered in every pass; every rank must call this.
    """
    ends = {"eos_id": eos_id, "pad_id": pad_id, "stops": stops}
    if decoder is None:
        with contextlib.nullcontext() if adapter is not None else adapters_off(model):
            return _generate_in_batches(model, prompts, sampling, seed=seed, slots=slots, synced=stream, **ends)
    decoder.load(model, adapter=adapter, lora=lora, stream=stream, gather_layers=gather_layers)
    try:
        if decoder.shard is not None:
            streams = row_keys(seed, prompts)
            everybody, keys, limits, mine = gather_rows(
                decoder.shard, prompts, streams, sampling.max_new_tokens, decoder.device
            )
            slots *= decoder.shard.size  # each process has the cache of its heads for the rows of all
            together = decode(decoder, everybody, sampling, seed=seed, slots=slots, keys=keys, limits=limits, **ends)
            return together.rows(mine)
        responses = decode(decoder, prompts, sampling, seed=seed, slots=slots, **ends)
        decoder.finish()
        return responses
    finally:
        decoder.unload()


def _generate_in_batches(model, prompts, sampling, *, seed, slots, synced, eos_id, pad_id, stops) -> Generation:
    """`generate` for `slots` prompts at a time; `synced` ranks all make as many batches as the one with the most.

    Its one random stream for a whole batch knows nothing of prompts, so each rank's batches get streams of their own.
    """
    starts = list(range(0, len(prompts), slots))
    rounds = int(distributed.all_reduce_scalar(len(starts), "max")) if synced else len(starts)
    batches = []
    for turn in range(rounds):
        start = turn * slots
        batch = prompts[start : start + slots] or [[pad_id]]
        batches.append(
            generate(
                model, batch, sampling, seed=hash((seed, distributed.rank(), start)) % 2**63,
                eos_id=eos_id, pad_id=pad_id, stops=stops, synced=synced,
            )
        )  # fmt: skip
    if not starts:
        empty = torch.zeros(0, 0, dtype=torch.int64, device=model.device)
        return finished(empty, empty.sum(1), empty.sum(1).bool(), eos_id=eos_id, pad_id=pad_id)
    return stacked(batches[: len(starts)], pad_id=pad_id)
