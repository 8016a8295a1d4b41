"""Memory of a whole step on one process, phase by phase, and its largest moment."""

from typing import Any

from utils.preflight.blocks import Blocks, block
from utils.preflight.generation import estimate_generation, gathered_for_answers
from utils.preflight.memory import Engine
from utils.preflight.model_shape import Kind
from utils.preflight.phases import Estimate, Items, Machine, Moment, joined, largest_moments, total_of
from utils.preflight.roles import Subject, frozen_twin, trained_role
from utils.preflight.saving import disk_use, host_bytes, saved_model, saving_moments
from utils.preflight.workload import MicroBatch, Rows, longest_row, micro_batch


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
        gathered = {"gather buffers": gathered_for_answers(engine, machine, persistent)}
        moments.append(Moment("evaluation", joined(persistent, gathered)))
    moments += [Moment("training", joined(persistent, items)) for items in trained.training(batch)]
    saved = saved_model(trained, subject, role="model")
    host = {"offloaded": engine.host_bytes()}
    if config.output_dir:
        moments += [Moment("saving", joined(persistent, items)) for items in saving_moments([saved], None)]
        host["saving"] = host_bytes(config, [saved], 0.0)
    return Estimate(
        largest_moments(moments, machine),
        _tokens_per_step(config, subject, machine),
        host=host if machine.on_gpu else {},
        disk=disk_use(config, [saved], None),
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

    generation = estimate_generation(config, actor, machine, batch, persistent)
    between = joined(persistent, generation.kept)
    moments = [
        Moment("loading", _loading(actor.engine)),
        Moment("loading", joined(_new(actor.engine), {"critic": total_of(_loading(critic.engine))})),
    ]
    moments.append(Moment("generation", generation.moment))
    for role in (actor, critic, *frozen.values()):
        targets = batch.targets if role.engine.shape.vocabulary else 0
        moments.append(Moment("scoring", joined(between, role.forward(targets))))
    for name, role in (("actor training", actor), ("critic training", critic)):
        for items in role.training(batch):
            moments.append(Moment(name, joined(between, items)))
    models = [saved_model(actor, subject, role="actor"), saved_model(critic, subject, role="critic")]
    averaged = models[0] if config.enable_ema else None
    host = {
        "offloaded": sum(role.engine.host_bytes() for role in (actor, critic, *frozen.values())),
        "optimiser during generation": generation.host,
    }
    if config.output_dir:
        moments += [Moment("saving", joined(between, items)) for items in saving_moments(models, averaged)]
        host["saving"] = host_bytes(config, models, standing.get("moving average", Blocks()).total)
    return Estimate(
        largest_moments(moments, machine),
        _tokens_per_step(config, subject, machine),
        host=host if machine.on_gpu else {},
        disk=disk_use(config, models, averaged),
        gathering=generation.gathering,
    )


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
