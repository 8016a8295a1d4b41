"""Memory of generation: what it adds to the persistent items, what stays of that, and how ZeRO-3 gathers the weights.

Where --inference_tp_size processes share the actor, each decodes the rows of all of them with its part of the heads:
twice the rows with half the heads, for two, so that the cache is as large as without sharing.
"""

import math
from dataclasses import dataclass

import torch

from utils.arguments.steps import PpoConfig, StepConfig
from utils.generation.decoder import CACHE_STEP, JOIN_ON
from utils.generation.packed_matrix import can_pack
from utils.generation.scheduler import PREFILL_TOKENS
from utils.parallel.memory import is_room_for
from utils.parallel.zero import TORCH_DTYPES
from utils.preflight.blocks import Blocks, block
from utils.preflight.memory import Engine
from utils.preflight.phases import Gathering, Items, Machine, joined, total_of
from utils.preflight.roles import Role
from utils.preflight.workload import BatchShape

SAMPLING_COPIES = 4  # fp32 copies of a decode step's logits while tokens are chosen; compiled operations make none
OPTIMIZER = ("fp32 master weights", "optimiser states")  # what `parallel.zero.optimizer_on_host` moves


@dataclass(frozen=True)
class GenerationMemory:
    """The largest moment of generation, and its effect on the rest of the run.

    `kept` stays until the next rollout; `host` are bytes in host memory meanwhile; `gathering` is what
    `--stream_generation_weights auto` is expected to choose, None where it has no choice.
    """

    moment: Items
    kept: Items
    host: float
    gathering: Gathering | None


def estimate_generation(
    config: PpoConfig, actor: Role, machine: Machine, batch: BatchShape, persistent: Items
) -> GenerationMemory:
    """Generation with the flags of `config`, besides what is `persistent`."""
    standing, host = persistent, 0.0
    if config.offload_optimizer_during_generation and machine.on_gpu and not config.offload:
        standing = {name: blocks for name, blocks in persistent.items() if name not in OPTIMIZER}
        host = sum(blocks.total for name, blocks in persistent.items() if name in OPTIMIZER)
    free = _free(machine, standing)
    needed, decodes = needed_to_gather(config, actor, machine), _decodes(config, actor)
    chooses = actor.engine.real_stage == 3 and _parts(config, actor) == 1
    automatic = config.stream_generation_weights == "auto"
    streams = chooses and (must_stream(needed, free) if automatic else config.stream_generation_weights == "on")
    added = {
        "KV cache": _cache(config, actor, decodes),
        "generation copies": _copies(config, actor, machine) if decodes and not streams else Blocks(),
        "gather buffers": _gathered(config, actor, streams),
    }
    kept = {}
    if decodes and not config.release_inference_cache:
        kept["KV cache"] = added["KV cache"]
        if machine.on_gpu and config.generation_cuda_graphs and not streams and _parts(config, actor) == 1:
            kept["decode graphs"] = _logits(config, actor)
    packed = not machine.on_gpu and can_pack(torch.empty(0, dtype=TORCH_DTYPES[config.dtype]))  # made for each rollout
    if not config.unpin_actor_parameters and not packed:
        kept["generation copies"] = added["generation copies"]
    gathering = Gathering(streams, needed, free) if chooses and automatic else None
    moment = joined(standing, added | _passes(config, actor, batch, decodes))
    return GenerationMemory(moment, kept, host, gathering)


def answers_memory(config: StepConfig, engine: Engine, machine: Machine, persistent: Items) -> Items:
    """Sample answers before and after training, see `generation.answers`.

    At stage 3 they gather all weights, or where these do not fit, what any pass gathers. The decode engine allocates a
    cache, and on a CPU copies of the weights, where there is room for them.
    """
    whole, free, shape = engine.whole(), _free(machine, persistent), engine.shape
    if must_stream(whole.total, free):
        return {"gather buffers": engine.gathered()}
    items = {"gather buffers": whole}
    length = config.longest_sequence()[0] + config.sample_max_new_tokens
    cache = config.num_sample_generations * length * shape.cache_per_token * engine.item_size
    copies = shape.total * engine.item_size if machine.device_type in JOIN_ON else 0
    if shape.decodes and not must_stream(whole.total + cache + copies, free):
        matrices = block(shape.matrices * engine.item_size / shape.layers / 7) * 7 * shape.layers
        head = block(shape.vocabulary * shape.hidden * engine.item_size)
        items |= {"KV cache": block(cache / 2) * 2, "generation copies": (matrices + head) if copies else Blocks()}
    return items


def _free(machine: Machine, standing: Items) -> float | None:
    return None if machine.memory is None else machine.memory - machine.base - total_of(standing).total


def must_stream(needed: float, free: float | None) -> bool:
    """Whether the weights cannot be gathered all at once; False where `free` is not known (None)."""
    return free is not None and not is_room_for(needed, free)


def needed_to_gather(config: PpoConfig, actor: Role, machine: Machine) -> float:
    """Bytes by which `HybridEngine` decides: the whole weights and `LlamaDecoder.extra_bytes` before any allocation."""
    shape, size = actor.engine.shape, actor.engine.item_size
    needed = actor.engine.whole().total
    if not _decodes(config, actor):
        return needed
    cache = config.per_device_generation_batch_size * _length(config) * shape.cache_per_token * size
    if machine.device_type in JOIN_ON:
        return cache + 2 * needed
    return cache + needed + (shape.adapted * size if config.lora_generation == "fused" else 0)


def _decodes(config: PpoConfig, actor: Role) -> bool:
    """Whether the decode engine generates, rather than `transformers`."""
    return config.enable_hybrid_engine and actor.engine.shape.decodes


def _parts(config: PpoConfig, actor: Role) -> int:
    """Processes that share the actor in generation."""
    return config.inference_tp_size if _decodes(config, actor) else 1


def _length(config: PpoConfig) -> int:
    """Tokens of each slot of the cache."""
    return math.ceil((config.max_prompt_seq_len + config.max_answer_seq_len) / CACHE_STEP) * CACHE_STEP


def _cache(config: PpoConfig, actor: Role, decodes: bool) -> Blocks:
    shape = actor.engine.shape
    cache = config.per_device_generation_batch_size * _length(config) * shape.cache_per_token * actor.engine.item_size
    return block(cache / 2) * 2 if decodes else Blocks(cache * (1 + 1 / shape.layers))


def _passes(config: PpoConfig, actor: Role, batch: BatchShape, decodes: bool) -> Items:
    """A prefill pass and the choice of tokens."""
    rows = config.per_device_generation_batch_size * _parts(config, actor)
    prompt = config.max_prompt_seq_len
    prefill = min(rows * prompt, max(PREFILL_TOKENS, prompt)) if decodes else rows * prompt
    return {
        "activations": actor.activations.layer * (prefill / batch.tokens),
        "logits": _logits(config, actor),
    }


def _logits(config: PpoConfig, actor: Role) -> Blocks:
    """Logits of one token per row, and the copies made to choose tokens; steps recorded as CUDA graphs keep them."""
    rows = config.per_device_generation_batch_size * _parts(config, actor)
    vocabulary = actor.engine.shape.vocabulary
    return block(rows * vocabulary * actor.engine.item_size) + block(4 * rows * vocabulary) * SAMPLING_COPIES


def _copies(config: PpoConfig, actor: Role, machine: Machine) -> Blocks:
    """Weights that `generation.weights` copies: all matrices on a CPU, adapted or divided ones elsewhere."""
    shape, size, parts = actor.engine.shape, actor.engine.item_size, _parts(config, actor)
    matrices = block(shape.matrices * size / shape.layers / 7 / parts) * 7 * shape.layers
    if machine.device_type in JOIN_ON:
        return matrices + block(shape.vocabulary * shape.hidden * size)
    if parts > 1:
        return matrices
    return Blocks(shape.adapted * size) if config.lora_generation == "fused" else Blocks()


def _gathered(config: PpoConfig, actor: Role, streams: bool) -> Blocks:
    """What generation gathers at stage 3.

    All weights; or what lies outside the layers, and one layer where layers are streamed or several where they are
    divided; or, streamed without the decode engine, what any forward pass gathers.
    """
    engine, shape = actor.engine, actor.engine.shape
    whole = engine.whole()
    if not whole.total or (_parts(config, actor) == 1 and not streams):
        return whole
    if not _decodes(config, actor):
        return engine.gathered()
    layers = 1 if streams else config.tp_gather_partition_size
    elsewhere = shape.matrices * engine.item_size * (1 - min(layers / shape.layers, 1))
    small = min(elsewhere, whole.small)
    return Blocks(whole.small - small, max(whole.large - (elsewhere - small), 0))
