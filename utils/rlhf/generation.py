"""Responses to prompts: the decode engine for LLaMA-shaped models, `transformers`' own `generate` for the others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig

from utils.algorithms.masking import lengths_to_mask, response_mask
from utils.rlhf.decoder import LlamaDecoder
from utils.rlhf.sampling import SamplingParams, choose_tokens, row_keys

PREFILL_TOKENS = 4096  # padded prompt tokens of one prefill pass
CHECK_INTERVAL = {"cpu": 1}  # decode steps between two looks at which rows have finished; elsewhere 4, a look waits


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Responses to B prompts. R is the longest response of this batch, in tokens."""

    tokens: torch.Tensor  # (B, R) ids, right-padded
    mask: torch.Tensor  # (B, R) bool, true through the first EOS inclusive
    ended: torch.Tensor  # (B,) bool: the response ended with EOS rather than at the length limit
    logprobs: torch.Tensor | None = None  # (B, R) fp32 at sampling time, before top-k and top-p; None from `generate`


class _Rows:
    """State of the rows in the slots of the decoder: slot i holds row `row[i]` of the output."""

    def __init__(self, slots: int, device: torch.device):
        self.row, self.token, self.position, self.place, self.key, self.limit = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(6)
        )
        self.done = torch.zeros(slots, dtype=torch.bool, device=device)
        self.active = 0

    def move(self, sources: list[int], targets: list[int]) -> None:
        for state in (self.row, self.token, self.position, self.place, self.key, self.limit, self.done):
            state[targets] = state[sources]


@torch.no_grad()
def decode(
    decoder: LlamaDecoder, prompts: list[list[int]], sampling: SamplingParams, *,
    eos_id: int, pad_id: int, seed: int, slots: int, limits: list[int] | None = None,
) -> Generation:  # fmt: skip
    """One response for each prompt, by continuous batching: finished rows leave, waiting prompts take their slots.

    Prompts are processed from the longest to the shortest, without their padding. What a row becomes depends on the
    seed and its prompt alone, not on `slots` or on the other rows.

    Args:
        decoder: loaded with the weights to use.
        prompts: token ids, at least one each.
        slots: rows that decode together, at most; the KV cache is allocated for as many.
        limits: tokens of each response, at most; without it `max_new_tokens` for all.
    """
    device = decoder.device
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    limit_of = torch.tensor(limits, device=device)
    waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    keys = row_keys(seed, prompts).to(device)
    slots = min(slots, len(prompts))
    decoder.allocate(slots, max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
    tokens = torch.full((len(prompts), max(limits)), pad_id, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(prompts), max(limits), dtype=torch.float32, device=device)
    rows, positions = _Rows(slots, device), []  # positions: of the newest token of each active slot, on the host

    def choose(logits: torch.Tensor, part: slice) -> None:
        row, place = rows.row[part], rows.place[part]
        chosen, chosen_logprobs = choose_tokens(logits, sampling, rows.key[part], place, eos_id=eos_id)
        done = rows.done[part]
        # a row that is done but still in its slot writes what stands there already
        tokens[row, place] = torch.where(done, tokens[row, place], chosen)
        logprobs[row, place] = torch.where(done, logprobs[row, place], chosen_logprobs)
        rows.token[part] = chosen
        rows.done[part] = done | (chosen == eos_id) | (place + 1 >= rows.limit[part])

    def admit() -> None:
        """Fill free slots with the next prompts, as many at a time as the prefill budget holds."""
        while waiting and rows.active < slots:
            width = len(prompts[waiting[0]])
            count = min(slots - rows.active, max(1, PREFILL_TOKENS // width), len(waiting))
            batch = [waiting.pop(0) for _ in range(count)]
            ids = torch.tensor([prompts[row] + [pad_id] * (width - len(prompts[row])) for row in batch], device=device)
            lengths = torch.tensor([len(prompts[row]) for row in batch], device=device)
            part = slice(rows.active, rows.active + count)
            rows.row[part] = torch.tensor(batch, device=device)
            rows.position[part], rows.place[part] = lengths, 0
            rows.key[part], rows.limit[part] = keys[rows.row[part]], limit_of[rows.row[part]]
            rows.done[part] = False
            choose(decoder.prefill(ids, lengths, rows.active), part)
            positions.extend(len(prompts[row]) for row in batch)
            rows.active += count

    def retire() -> None:
        """Take finished rows out and close the gaps with the last active ones."""
        done = rows.done[: rows.active].tolist()
        kept = [slot for slot, finished in enumerate(done) if not finished]
        gaps = [slot for slot in range(len(kept)) if done[slot]]
        sources = kept[len(kept) - len(gaps) :]
        if gaps:
            decoder.move(sources, gaps)
            rows.move(sources, gaps)
            for source, gap in zip(sources, gaps, strict=True):
                positions[gap] = positions[source]
        del positions[len(kept) :]
        rows.active = len(kept)

    interval = CHECK_INTERVAL.get(device.type, 4)
    while waiting or rows.active:
        if slots - rows.active >= max(1, slots // 8) or not rows.active:
            admit()
        retire()
        for _ in range(interval if rows.active else 0):
            part = slice(0, rows.active)
            longest = min(max(positions), decoder.capacity - 1)
            logits = decoder.step(rows.token[part], rows.position[part].clamp(max=decoder.capacity - 1), longest)
            rows.position[part] += 1
            rows.place[part] = torch.where(rows.done[part], rows.place[part], rows.place[part] + 1)
            positions[:] = [position + 1 for position in positions]
            choose(logits, part)
    mask = response_mask(tokens, eos_id) & lengths_to_mask(limit_of, tokens.size(1))
    width = int(mask.sum(1).max())
    mask = mask[:, :width]
    return Generation(
        tokens=tokens[:, :width].masked_fill(~mask, pad_id),
        mask=mask,
        ended=_ended(tokens, mask, eos_id),
        logprobs=logprobs[:, :width].masked_fill(~mask, 0.0),
    )


@torch.no_grad()
def generate(
    model: nn.Module, prompts: list[list[int]], sampling: SamplingParams, *, eos_id: int, pad_id: int, seed: int
) -> Generation:
    """`transformers`' own `generate` on all the prompts at once, padded on the left.

    Args:
        model: a `transformers` causal LM whose weights are whole on this rank.
        seed: alone decides the randomness; the global random state is left as it was.
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
            input_ids=input_ids, attention_mask=attention_mask.long(), generation_config=settings, synced_gpus=False
        )
    tokens = sequences[:, width:]
    mask = response_mask(tokens, eos_id)
    longest = int(mask.sum(1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    return Generation(tokens=tokens.masked_fill(~mask, pad_id), mask=mask, ended=_ended(tokens, mask, eos_id))


def respond(
    model: nn.Module, prompts: list[list[int]], sampling: SamplingParams, *,
    eos_id: int, pad_id: int, seed: int, slots: int, decoder: LlamaDecoder | None = None,
) -> Generation:  # fmt: skip
    """One response for each prompt: by `decoder`, or without one by `generate` in batches of `slots` prompts."""
    tokens = {"eos_id": eos_id, "pad_id": pad_id}
    if decoder is not None:
        decoder.load(model)
        try:
            return decode(decoder, prompts, sampling, seed=seed, slots=slots, **tokens)
        finally:
            decoder.unload()
    batches = [
        generate(model, prompts[start : start + slots], sampling, seed=hash((seed, start)) % 2**63, **tokens)
        for start in range(0, len(prompts), slots)
    ]
    width = max(batch.tokens.size(1) for batch in batches)
    return Generation(
        tokens=torch.cat([F.pad(batch.tokens, (0, width - batch.tokens.size(1)), value=pad_id) for batch in batches]),
        mask=torch.cat([F.pad(batch.mask, (0, width - batch.mask.size(1)), value=False) for batch in batches]),
        ended=torch.cat([batch.ended for batch in batches]),
    )


def _ended(tokens: torch.Tensor, mask: torch.Tensor, eos_id: int) -> torch.Tensor:
    """(B,) bool: the last token of the response is EOS."""
    return tokens.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1) == eos_id
