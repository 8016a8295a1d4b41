"""The models of a step in their engines, as its flags ask for them, and the items of their passes."""

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig

from utils.preflight.activations import Activations, count_activations
from utils.preflight.blocks import Blocks, block
from utils.preflight.memory import Engine, backward_work, saved_activations, vocabulary_head
from utils.preflight.model_shape import Kind, ModelFlags, ModelShape, model_shape
from utils.preflight.phases import Items, Machine
from utils.preflight.workload import MicroBatch, Rows


@dataclass(frozen=True)
class Subject:
    """What is estimated: a step, its models' configs by role, tokens of the tokenizer, and the data.

    It remembers what it has counted: advice estimates many flags that leave the models as they are.
    """

    step: int
    configs: dict[str, PreTrainedConfig]  # steps 1 and 2: "model"; step 3: "actor" and "critic"
    tokens: int
    rows: Rows
    counted: dict[tuple, ModelShape | Activations] = field(default_factory=dict, compare=False, repr=False)

    def shape(self, role: str, flags: ModelFlags) -> ModelShape:
        """`model_shape` of the role's model."""
        key = (role, replace(flags, gradient_checkpointing=False))
        if key not in self.counted:
            self.counted[key] = model_shape(self.configs[role], flags, tokens=self.tokens)
        return self.counted[key]

    def activations(self, role: str, flags: ModelFlags, batch: MicroBatch, device_type: str) -> Activations:
        """`count_activations` of the role's model for as many tokens as `batch` has."""
        size = {"sequences": batch.sequences, "width": batch.width, "uneven": batch.fill < 1}
        key = (role, replace(flags, gradient_checkpointing=False), *size.values(), device_type)
        if key not in self.counted:
            self.counted[key] = count_activations(self.configs[role], flags, device_type=device_type, **size)
        return self.counted[key].scaled(batch.fill)


@dataclass(frozen=True)
class Role:
    """A model in its engine, and what it computes for a micro-batch."""

    engine: Engine
    flags: ModelFlags
    activations: Activations

    def saved(self, batch: MicroBatch) -> Blocks:
        """What the forward pass keeps for the backward pass."""
        layer_input = batch.tokens * self.engine.shape.hidden * self.engine.item_size
        return saved_activations(
            self.activations, checkpointing=self.flags.gradient_checkpointing, layer_input=layer_input
        )

    def scaled(self, factor: float) -> "Role":
        """For a micro-batch of `factor` times as many tokens."""
        return replace(self, activations=self.activations.scaled(factor))

    def forward(self, targets: int) -> Items:
        """Items of a pass without gradients."""
        head = vocabulary_head(self.engine, targets, with_grad=False)
        return {"activations": self.activations.layer, "gather buffers": self.engine.gathered()} | head

    def training(self, batch: MicroBatch) -> list[Items]:
        """Items of the moments of an optimiser step, beside those that stand."""
        head = vocabulary_head(self.engine, batch.targets, with_grad=True)
        work = backward_work(self.activations)
        return self.engine.backward_moments(self.saved(batch), work, head, batch.per_step)


def trained_role(config: Any, subject: Subject, machine: Machine, batch: MicroBatch, *, role: str, kind: Kind) -> Role:
    """A model that trains on micro-batches like `batch`.

    Args:
        role: "model" in steps 1 and 2, else "actor" or "critic", whose flags carry the role's name in front.
    """
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
    engine = Engine(
        shape=subject.shape(role, flags),
        dtype=config.dtype,
        stage=getattr(config, f"{prefix}zero_stage"),
        world_size=machine.world_size,
        offload=config.offload and machine.on_gpu,
        on_gpu=machine.on_gpu,
    )
    counted = subject.activations(role, flags, batch, machine.device_type)
    if kind == "scalar" and config.dtype != "fp32":  # the head computes in fp32
        widened = counted.outside + block(4 * batch.tokens * engine.shape.hidden)
        counted = replace(counted, outside=widened)
    return Role(engine, flags, counted)


def frozen_twin(trained: Role, subject: Subject, *, role: str, stage: int, offload: bool) -> Role:
    """The frozen twin of a model that trains, without its LoRA: the reference or the reward model."""
    flags = ModelFlags(kind=trained.flags.kind, dtype=trained.flags.dtype, dropout=0.0)
    engine = replace(
        trained.engine,
        shape=subject.shape(role, flags),
        stage=3 if offload else stage,  # parameters can only be offloaded at stage 3
        trains=False,
        offload=offload,
    )
    return Role(engine, flags, trained.activations)
