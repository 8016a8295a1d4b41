"""Memory of a whole step on one process, phase by phase, and its largest moment."""

import math
from typing import Any

import torch

from utils.preflight.blocks import Blocks, block
from utils.preflight.memory import Engine
from utils.preflight.model_shape import Kind
from utils.preflight.phases import Estimate, Items, Machine, Moment, joined, largest_moments, total_of
from utils.preflight.roles import Role, Subject, frozen_twin, trained_role
from utils.preflight.workload import MicroBatch, Rows, longest_row, micro_batch
from utils.rlhf.batching import PREFILL_TOKENS
from utils.rlhf.decoder import CACHE_STEP
from utils.rlhf.packed_matrix import can_pack
from utils.zero import TORCH_DTYPES

SAMPLING_COPIES = 4  # fp32 copies of the logits of a decoded token while one is chosen


def estimate(config: Any, subject: Subject, machine: Machine) -> Estimate:
    """The phases of a step with the flags of its `config`.

    Raises:
        InputError: the flags do not fit the model, as `check_lora` says it.
    """
    phases_of = _estimate_rlhf if subject.step == 3 else _estimate_supervised
    return phases_of(config, subject, machine)


def training_batch(config: Any, step: int, rows: Rows, *, max_tokens: int) -> MicroBatch:
    """The heaviest micro-batch that the flags and the data allow, in one of `max_tokens` tokens if above 0."""
    if step == 3:
        length = config.max_prompt_seq_len + config.max_answer_seq_len
        fallback, size = longest_row(3, length, config.max_answer_seq_len), config.per_device_training_batch_size
        if config.unsupervised_dataset_name:  # texts of full length, every token of which is a target
            rows, fallback = Rows(None), longest_row(1, length)
    else:
        fallback, size = longest_row(step, config.max_seq_len), config.per_device_train_batch_size
    return micro_batch(
        rows.heaviest,
        fallback,
        rows=size,
        steps=config.gradient_accumulation_steps,
        max_tokens=max_tokens,
    )


def _estimate_supervised(config: Any, subject: Subject, machine: Machine) -> Estimate:
    batch = training_batch(config, subject.step, subject.rows, max_tokens=config.max_tokens_per_batch)
    evaluation = micro_batch(
        subject.rows.heaviest,
        longest_row(subject.step, config.max_seq_len),
        rows=config.per_device_eval_batch_size,
        steps=1,
        max_tokens=0,
    )
    kind: Kind = "causal_lm" if subject.step == 1 else "scalar"
    trained = trained_role(config, subject, machine, batch, role="model", kind=kind)
    engine = trained.engine
    evaluated = trained.scaled(evaluation.tokens / batch.tokens)
    persistent = engine.persistent()
    moments = [Moment("loading", _loading(engine))]
    moments.append(Moment("evaluation", joined(persistent, evaluated.forward(evaluation.targets))))
    if subject.step == 1 and config.num_sample_generations and engine.real_stage == 3:
        moments.append(Moment("evaluation", joined(persistent, {"gather buffers": engine.whole()})))
    moments += [Moment("training", joined(persistent, items)) for items in trained.training(batch)]
    if not machine.on_gpu and config.output_dir:
        moments.append(Moment("saving", joined(persistent, {"copy to save": engine.of_parameters(engine.item_size)})))
    return Estimate(
        largest_moments(moments, machine), _tokens_per_step(config, subject, machine), host=engine.host_bytes()
    )


def _estimate_rlhf(config: Any, subject: Subject, machine: Machine) -> Estimate:
    batch = training_batch(config, 3, subject.rows, max_tokens=config.max_tokens_per_batch)
    actor = trained_role(config, subject, machine, batch, role="actor", kind="causal_lm")
    critic = trained_role(config, subject, machine, batch, role="critic", kind="scalar")
    on_gpu = machine.on_gpu
    reward = frozen_twin(
        critic, subject, role="critic", stage=config.critic_zero_stage, offload=config.offload_reward_model and on_gpu
    )
    frozen = {"reward model": reward}
    if not (config.actor_lora_dim and config.only_optimize_lora):
        offload = config.offload_reference_model and on_gpu
        frozen["reference model"] = frozen_twin(
            actor, subject, role="actor", stage=config.actor_zero_stage, offload=offload
        )
    standing: Items = {"critic": total_of(critic.engine.persistent())}
    standing |= {name: role.engine.parameters() for name, role in frozen.items()}
    if config.enable_ema:
        shards = machine.world_size if actor.engine.real_stage == 3 else 1
        standing["moving average"] = actor.engine.of_parameters(4 / shards, trained_only=True)
    persistent = joined(actor.engine.persistent(), standing)

    generation = _generation(config, actor, machine, batch)
    keeps = _decodes(config, actor) and not config.release_inference_cache
    kept = {"KV cache": generation["KV cache"]} if keeps else {}
    packed = not on_gpu and can_pack(torch.empty(0, dtype=TORCH_DTYPES[config.dtype]))  # made anew for each rollout
    if not config.unpin_actor_parameters and not packed:
        kept["generation copies"] = generation["generation copies"]
    moments = [
        Moment("loading", _loading(actor.engine)),
        Moment("loading", joined(_new(actor.engine), {"critic": total_of(_loading(critic.engine))})),
    ]
    moments.append(Moment("generation", joined(persistent, generation)))
    for role in (actor, critic, *frozen.values()):
        targets = batch.targets if role.engine.shape.vocabulary else 0
        moments.append(Moment("scoring", joined(joined(persistent, kept), role.forward(targets))))
    for name, role in (("actor training", actor), ("critic training", critic)):
        for items in role.training(batch):
            moments.append(Moment(name, joined(joined(persistent, kept), items)))
    if not machine.on_gpu and config.output_dir:
        copy = actor.engine.of_parameters(actor.engine.item_size)
        moments.append(Moment("saving", joined(joined(persistent, kept), {"copy to save": copy})))
    host = sum(role.engine.host_bytes() for role in (actor, critic, *frozen.values()))
    return Estimate(largest_moments(moments, machine), _tokens_per_step(config, subject, machine), host=host)


def _decodes(config: Any, actor: Role) -> bool:
    """Whether the decode engine generates, and not `transformers`."""
    return config.enable_hybrid_engine and actor.engine.shape.decodes


def _generation(config: Any, actor: Role, machine: Machine, batch: MicroBatch) -> Items:
    """Items of generation beside what stands: cache, copies of weights, a prefill pass or the choice of tokens."""
    shape, size = actor.engine.shape, actor.engine.item_size
    prompt, slots = config.max_prompt_seq_len, config.per_device_generation_batch_size
    length = math.ceil((prompt + config.max_answer_seq_len) / CACHE_STEP) * CACHE_STEP
    decodes, shards = _decodes(config, actor), config.inference_tp_size
    cache = slots * length * shape.cache_per_token * size / shards
    prefill = min(slots * prompt, max(PREFILL_TOKENS, prompt)) if decodes else slots * prompt
    return {
        "KV cache": block(cache / 2) * 2 if decodes else Blocks(cache * (1 + 1 / shape.layers)),
        "generation copies": _copies(config, actor, machine) if decodes else Blocks(),
        "gather buffers": _whole_weights(config, actor),
        "activations": actor.activations.layer * (prefill / batch.tokens),
        "logits": block(slots * shape.vocabulary * size) + block(4 * slots * shape.vocabulary) * SAMPLING_COPIES,
    }


def _streams(config: Any, actor: Role) -> bool:
    return config.stream_generation_weights == "on" and actor.engine.real_stage == 3


def _copies(config: Any, actor: Role, machine: Machine) -> Blocks:
    """Weights that `rlhf.decoder_weights` copies: all matrices on a CPU, adapted or divided ones elsewhere."""
    shape, size = actor.engine.shape, actor.engine.item_size
    if _streams(config, actor):
        return Blocks()
    matrices = block(shape.matrices * size / shape.layers / 7) * 7 * shape.layers
    if config.inference_tp_size > 1:
        return matrices * (1 / config.inference_tp_size)
    if not machine.on_gpu:
        return matrices + block(shape.vocabulary * shape.hidden * size)
    return Blocks(shape.adapted * size) if config.lora_generation == "fused" else Blocks()


def _whole_weights(config: Any, actor: Role) -> Blocks:
    """What generation gathers at stage 3: all weights, or a part of the layers where they are streamed or divided."""
    whole, shape = actor.engine.whole(), actor.engine.shape
    if not _streams(config, actor) and config.inference_tp_size == 1:
        return whole
    layers = 1 if _streams(config, actor) else config.tp_gather_partition_size
    inside = shape.matrices * actor.engine.item_size * (1 - min(layers / shape.layers, 1))
    return Blocks(max(whole.small - inside, 0), whole.large) if whole.total else whole


def _tokens_per_step(config: Any, subject: Subject, machine: Machine) -> int:
    """Tokens of an optimiser step of all processes, at most; how rows are grouped does not change them."""
    batch = training_batch(config, subject.step, subject.rows, max_tokens=0)
    return batch.tokens * batch.per_step * machine.world_size


def _new(engine: Engine) -> Items:
    """What stands before the first optimiser step, which makes Adam's states."""
    return {name: blocks for name, blocks in engine.persistent().items() if name != "optimiser states"}


def _loading(engine: Engine) -> Items:
    """The moment in which the optimiser's buffers are made and the weights are still in two places."""
    if engine.real_stage == 3:
        gradients = min(engine.shape.trainable, 10**9) * 4 if engine.on_gpu else engine.part
        return {
            "parameters": engine.parameters() * 2,
            "fp32 master weights": block(engine.part),
            "gradients": block(gradients),
        }
    items = {"parameters": engine.of_parameters(engine.item_size)}
    if engine.real_stage:
        items["flat copy"] = block(engine.shape.trainable * engine.item_size)
        items["fp32 master weights"] = block(engine.part)
        items["gradients"] = block(engine.part)
    return items
