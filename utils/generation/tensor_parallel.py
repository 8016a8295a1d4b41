"""Processes that share one model in generation: each holds a part of every matrix, all decode the same rows."""

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from utils.errors import InputError
from utils.generation.decoder import supports
from utils.generation.weights import Shard
from utils.parallel import distributed


def check_tensor_parallel(model_config: PreTrainedConfig, size: int) -> None:
    """Raise InputError when `--inference_tp_size` does not divide what it must; call it before loading."""
    if size == 1:
        return
    if not supports(model_config):
        raise InputError(
            f"--inference_tp_size {size} needs the decode engine, which has no fast path for this "
            f"{model_config.model_type}: leave the flag out"
        )
    heads = model_config.num_attention_heads
    counts = {
        "processes": distributed.world_size(),
        "attention heads of the actor": heads,
        "key-value heads of the actor": getattr(model_config, "num_key_value_heads", None) or heads,
        "columns of the actor's MLP": model_config.intermediate_size,
    }
    for what, count in counts.items():
        if count % size:
            raise InputError(
                f"--inference_tp_size {size} does not divide the {count} {what}; choose a number that does"
            )


def join_shard_group(size: int) -> Shard | None:
    """This process's place among `size` neighbouring ranks; None for size 1. Every rank must call it."""
    if size == 1:
        return None
    mine = None
    for first in range(0, distributed.world_size(), size):
        group = distributed.new_group(range(first, first + size))
        if first <= distributed.rank() < first + size:
            mine = Shard(distributed.rank() - first, size, group)
    return mine


def gather_rows(
    shard: Shard, prompts: list[list[int]], keys: torch.Tensor, limit: int, device: torch.device
) -> tuple[list[list[int]], torch.Tensor, list[int], slice]:
    """The rows of all processes of the group: prompts, random streams, token limits, and which are this process's."""
    count = torch.tensor([len(prompts), max(map(len, prompts), default=0)], device=device)
    sizes = torch.stack(_all_gather(shard, count)).tolist()
    most, width = (max(column) for column in zip(*sizes, strict=True))
    packed = torch.full((most, 2 + width), -1, dtype=torch.int64)  # a row's stream, its limit, its prompt, then -1
    packed[: len(prompts), 0], packed[: len(prompts), 1] = keys, limit
    for index, prompt in enumerate(prompts):
        packed[index, 2 : 2 + len(prompt)] = torch.tensor(prompt)
    gathered = [part[:real].cpu() for part, (real, _) in zip(_all_gather(shard, packed.to(device)), sizes, strict=True)]
    rows = torch.cat(gathered)
    prompts = [[token for token in row if token >= 0] for row in rows[:, 2:].tolist()]
    start = sum(real for real, _ in sizes[: shard.rank])
    return prompts, rows[:, 0], rows[:, 1].tolist(), slice(start, start + sizes[shard.rank][0])


def _all_gather(shard: Shard, tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(shard.size)]
    dist.all_gather(parts, tensor, group=shard.group)
    return parts
