"""Memory of a whole step on one process, phase by phase, and its largest moment."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from utils.preflight.activations import Activations, count_activations
from utils.preflight.blocks import Blocks, block
from utils.preflight.memory import Engine, backward_work, saved_activations, vocabulary_head
from utils.preflight.model_shape import Kind, ModelFlags, model_shape
from utils.preflight.workload import MicroBatch, Rows, longest_row, micro_batch
from utils.rlhf.decoder import CACHE_STEP, supports
from utils.rlhf.generation import PREFILL_TOKENS
from utils.zero import TORCH_DTYPES

Items = dict[str, Blocks]
KEPT_HEAP = "freed, kept by the allocator"
GPU_SLACK = 0.08  # assumed, not measured: share that the caching allocator holds beyond what is in use
SAMPLING_COPIES = 4  # fp32 copies of the logits of a decoded token while one is chosen


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one process has. `base` and `memory` in bytes; `memory` None where it is not known."""

    device_type: str  # "cpu" or "cuda"
    world_size: int
    base: float
    memory: float | None

    @property
    def on_gpu(self) -> bool:
        return self.device_type != "cpu"


@dataclass(frozen=True)
class Subject:
    """What is estimated: a step, its models' configs by role, tokens of the tokenizer, and the data."""

    step: int
    configs: dict[str, PreTrainedConfig]  # steps 1 and 2: "model"; step 3: "actor" and "critic"
    tokens: int
    rows: Rows


@dataclass(frozen=True)
class Phase:
    """The largest moment of a phase, in bytes by item."""

    name: str
    items: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass(frozen=True)
class Estimate:
    """All phases of a step on one process."""

    phases: list[Phase]
    tokens_per_step: int  # of all processes, at most
    host: float = 0.0  # bytes that --offload puts into the host's memory, per process
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float:
        return max(phase.total for phase in self.phases)


@dataclass(frozen=True)
class _Moment:
    phase: str
    items: Items


@dataclass(frozen=True)
class _Role:
    """A model in its engine, and what it computes for a micro-batch."""

    engine: Engine
    flags: ModelFlags
    activations: Activations

    def saved(self, batch: MicroBatch) -> Blocks:
        layer_input = batch.tokens * self.engine.shape.hidden * self.engine.item_size
        return saved_activations(
            self.activations, checkpointing=self.flags.gradient_checkpointing, layer_input=layer_input
        )

    def forward(self, targets: int) -> Items:
        """Items of a pass without gradients."""
        head = vocabulary_head(self.engine, targets, with_grad=False)
        return {"activations": self.activations.layer, "gather buffers": self.engine.gathered()} | head

    def training(self, batch: MicroBatch) -> list[Items]:
        head = vocabulary_head(self.engine, batch.targets, with_grad=True)
        work = backward_work(self.activations)
        return self.engine.backward_moments(self.saved(batch), work, head, batch.per_step)


def _role(config: Any, subject: Subject, machine: Machine, batch: MicroBatch, *, role: str, kind: Kind) -> _Role:
    prefix = "" if role == "model" else f"{role}_"
    rlhf = bool(prefix)
    flags = ModelFlags(
        kind=kind,
        dtype=config.dtype,
        lora_dim=getattr(config, f"{prefix}lora_dim"),
        lora_module_name=getattr(config, f"{prefix}lora_module_name"),
        only_lora=config.only_optimize_lora,
        dropout=0.0 if rlhf else config.dropout,
        lora_dropout=0.0 if rlhf else config.lora_dropout,
        gradient_checkpointing=getattr(config, f"{prefix}gradient_checkpointing"),
    )
    model_config = subject.configs[role]
    engine = Engine(
        shape=model_shape(model_config, flags, tokens=subject.tokens),
        dtype=config.dtype,
        stage=getattr(config, f"{prefix}zero_stage"),
        world_size=machine.world_size,
        offload=config.offload and machine.on_gpu,
        on_gpu=machine.on_gpu,
    )
    counted = count_activations(
        model_config, flags, sequences=batch.sequences, width=batch.width, device_type=machine.device_type
    )
    scaled = Activations(counted.outside * batch.fill, counted.layer * batch.fill, counted.layers)
    if kind == "scalar" and config.dtype != "fp32":  # the head computes in fp32
        scaled = Activations(scaled.outside + block(4 * batch.tokens * engine.shape.hidden), scaled.layer, scaled.layers)
    return _Role(engine, flags, scaled)


def _frozen(role: _Role, config: Any, model_config: PreTrainedConfig, subject: Subject, *, stage: int, offload: bool):
    """The frozen twin of a model that trains, without its LoRA: the reference or the reward model."""
    flags = ModelFlags(kind=role.flags.kind, dtype=config.dtype, dropout=0.0)
    engine = Engine(
        shape=model_shape(model_config, flags, tokens=subject.tokens),
        dtype=config.dtype,
        stage=3 if offload else stage,
        world_size=role.engine.world_size,
        trains=False,
        offload=offload,
        on_gpu=role.engine.on_gpu,
    )
    return _Role(engine, flags, role.activations)


def estimate(config: Any, subject: Subject, machine: Machine) -> Estimate:
    """The phases of a step with the flags of its `config`.

    Raises:
        InputError: the flags do not fit the model, as `check_lora` says it.
    """
    return _estimate_rlhf(config, subject, machine) if subject.step == 3 else _estimate_supervised(config, subject, machine)


def training_batch(config: Any, step: int, rows: Rows) -> MicroBatch:
    """The heaviest micro-batch that the flags and the data allow."""
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
        max_tokens=config.max_tokens_per_batch,
    )


def _estimate_supervised(config: Any, subject: Subject, machine: Machine) -> Estimate:
    batch = training_batch(config, subject.step, subject.rows)
    evaluation = micro_batch(
        subject.rows.heaviest,
        longest_row(subject.step, config.max_seq_len),
        rows=config.per_device_eval_batch_size,
        steps=1,
        max_tokens=0,
    )
    kind: Kind = "causal_lm" if subject.step == 1 else "scalar"
    trained = _role(config, subject, machine, batch, role="model", kind=kind)
    engine = trained.engine
    evaluated = _Role(engine, trained.flags, _scaled(trained.activations, evaluation.tokens / batch.tokens))
    persistent = engine.persistent()
    moments = [_Moment("loading", _loading(engine))]
    moments.append(_Moment("evaluation", _sum(persistent, evaluated.forward(evaluation.targets))))
    if subject.step == 1 and config.num_sample_generations and engine.real_stage == 3:
        moments.append(_Moment("evaluation", _sum(persistent, {"gather buffers": engine.whole()})))
    moments += [_Moment("training", _sum(persistent, items)) for items in trained.training(batch)]
    if not machine.on_gpu and config.output_dir:
        moments.append(_Moment("saving", _sum(persistent, {"copy to save": engine.of_parameters(engine.item_size)})))
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    tokens = _tokens_per_step(batch, config, rows_per_step, subject, machine)
    return Estimate(_largest(moments, machine), tokens, host=engine.host_bytes())


def _estimate_rlhf(config: Any, subject: Subject, machine: Machine) -> Estimate:
    batch = training_batch(config, 3, subject.rows)
    actor = _role(config, subject, machine, batch, role="actor", kind="causal_lm")
    critic = _role(config, subject, machine, batch, role="critic", kind="scalar")
    frozen = {
        "reward model": _frozen(
            critic, config, subject.configs["critic"], subject,
            stage=config.critic_zero_stage, offload=config.offload_reward_model and machine.on_gpu,
        )
    }  # fmt: skip
    if not (config.actor_lora_dim and config.only_optimize_lora):
        frozen["reference model"] = _frozen(
            actor, config, subject.configs["actor"], subject,
            stage=config.actor_zero_stage, offload=config.offload_reference_model and machine.on_gpu,
        )  # fmt: skip
    standing: Items = {"critic": _total(critic.engine.persistent())}
    standing |= {name: role.engine.parameters() for name, role in frozen.items()}
    if config.enable_ema:
        shards = machine.world_size if actor.engine.real_stage == 3 else 1
        standing["moving average"] = actor.engine.of_parameters(4 / shards, trained_only=True)
    persistent = _sum(actor.engine.persistent(), standing)

    generation = _generation(config, actor, subject, machine, batch)
    kept = {} if config.release_inference_cache or "KV cache" not in generation else {"KV cache": generation["KV cache"]}
    if not _decodes(config, subject):
        kept = {}
    moments = [_Moment("loading", _sum(standing, _loading(actor.engine)))]
    moments.append(_Moment("generation", _sum(persistent, generation)))
    for role in (actor, critic, *frozen.values()):
        targets = batch.targets if role.engine.shape.vocabulary else 0
        moments.append(_Moment("scoring", _sum(_sum(persistent, kept), role.forward(targets))))
    for name, role in (("actor training", actor), ("critic training", critic)):
        for items in role.training(batch):
            moments.append(_Moment(name, _sum(_sum(persistent, kept), items)))
    if not machine.on_gpu and config.output_dir:
        copy = actor.engine.of_parameters(actor.engine.item_size)
        moments.append(_Moment("saving", _sum(_sum(persistent, kept), {"copy to save": copy})))
    rows_per_step = config.per_device_training_batch_size * config.gradient_accumulation_steps
    tokens = _tokens_per_step(batch, config, rows_per_step, subject, machine)
    host = sum(role.engine.host_bytes() for role in (actor, critic, *frozen.values()))
    return Estimate(_largest(moments, machine), tokens, host=host)


def _decodes(config: Any, subject: Subject) -> bool:
    """Whether the decode engine generates, and not `transformers`."""

    @dataclass
    class _Model:
        config: PreTrainedConfig

    return config.enable_hybrid_engine and supports(_Model(subject.configs["actor"]))


def _generation(config: Any, actor: _Role, subject: Subject, machine: Machine, batch: MicroBatch) -> Items:
    """Items of generation beside what stands: cache, copies of weights, a prefill pass or the choice of tokens."""
    shape, size = actor.engine.shape, actor.engine.item_size
    prompt, slots = config.max_prompt_seq_len, config.per_device_generation_batch_size
    length = math.ceil((prompt + config.max_answer_seq_len) / CACHE_STEP) * CACHE_STEP
    cache = slots * length * shape.cache_per_token * size
    decodes = _decodes(config, subject)
    prefill = min(slots * prompt, max(PREFILL_TOKENS, prompt)) if decodes else slots * prompt
    copied = 0
    if decodes:
        joined = 0 if machine.on_gpu else shape.joined
        copied = joined + max(shape.adapted - joined, 0)
    layer = actor.activations.layer * (prefill / batch.tokens)
    return {
        "KV cache": block(cache / 2) * 2 if decodes else Blocks(cache * (1 + 1 / shape.layers)),
        "generation copies": block(copied * size / shape.layers / 3) * 3 * shape.layers,
        "gather buffers": actor.engine.whole(),
        "activations": layer,
        "logits": block(slots * shape.vocabulary * size) + block(4 * slots * shape.vocabulary) * SAMPLING_COPIES,
    }


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


def _scaled(activations: Activations, factor: float) -> Activations:
    return Activations(activations.outside * factor, activations.layer * factor, activations.layers)


def _sum(one: Items, other: Items) -> Items:
    return {name: one.get(name, Blocks()) + other.get(name, Blocks()) for name in (one | other)}


def _total(items: Items) -> Blocks:
    return sum(items.values(), Blocks())


def _tokens_per_step(batch: MicroBatch, config: Any, rows: int, subject: Subject, machine: Machine) -> int:
    if config.max_tokens_per_batch:
        whole = training_batch(_WithoutBudget(config), subject.step, subject.rows)
        return whole.tokens * config.gradient_accumulation_steps * machine.world_size
    return batch.tokens * batch.per_step * machine.world_size


class _WithoutBudget:
    """A config as if `--max_tokens_per_batch` were 0."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.max_tokens_per_batch = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _largest(moments: list[_Moment], machine: Machine) -> list[Phase]:
    """The largest moment of each phase, with what lies around it: the process's base and the allocator's own."""
    reckon = _on_gpu if machine.on_gpu else _on_cpu
    phases: dict[str, Phase] = {}
    for moment, items in zip(moments, reckon(moments), strict=True):
        phase = Phase(moment.phase, {"base of the process": machine.base} | items)
        if moment.phase not in phases or phase.total > phases[moment.phase].total:
            phases[moment.phase] = phase
    return list(phases.values())


def _on_gpu(moments: list[_Moment]) -> list[dict[str, float]]:
    listed = []
    for moment in moments:
        items = {name: blocks.total for name, blocks in moment.items.items()}
        listed.append(items | {KEPT_HEAP: GPU_SLACK * sum(items.values())})
    return listed


def _on_cpu(moments: list[_Moment]) -> list[dict[str, float]]:
    """The heap keeps its greatest size; the loop comes back to every phase but loading, which comes once, first."""
    greatest = max(_total(moment.items).small for moment in moments)
    listed = []
    for moment in moments:
        items = {name: blocks.total for name, blocks in moment.items.items()}
        kept = 0.0 if moment.phase == "loading" else greatest - _total(moment.items).small
        listed.append(items | {KEPT_HEAP: kept})
    return listed


Estimator = Callable[[Any, Subject, Machine], Estimate]
