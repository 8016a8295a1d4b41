"""The models of a run in their engines, as its plan says, and the items of their passes."""

from dataclasses import dataclass, field, replace
from typing import Any

from utils.arguments.roles import RoleFlags
from utils.arguments.steps import StepConfig
from utils.data.batches.sizes import Rows
from utils.models.scalar_head import hidden_size_of
from utils.preflight.activations import Activations, count_activations
from utils.preflight.blocks import Blocks, blocks_of
from utils.preflight.memory import Engine, backward_work, saved_activations, vocabulary_head
from utils.preflight.model_shape import ModelShape, model_shape
from utils.preflight.phases import Items, Machine
from utils.preflight.workload import BatchShape
from utils.runs.plan import Models, Plan, Planner


@dataclass(frozen=True)
class Subject:
    """What is estimated: a step's planner, its models' configurations, size of the tokenizer, and the data.

    It caches what it has counted: advice estimates many sets of flags that leave the models unchanged.
    """

    planner: Planner
    models: Models
    tokens: int
    rows: Rows
    counted: dict[tuple, ModelShape | Activations] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, config: StepConfig, machine: Machine) -> Plan:
        """The plan of a run with the flags of `config`."""
        return self.planner(config, self.models, self.rows.count, machine.world_size)

    def shape(self, role: RoleFlags, dtype: str) -> ModelShape:
        """`model_shape` of the role's model."""
        key = (*self._identity(role), dtype)
        if key not in self.counted:
            self.counted[key] = model_shape(self.models[role.name], role, dtype, tokens=self.tokens)
        return self.counted[key]

    def activations(self, role: RoleFlags, dtype: str, batch: BatchShape, device_type: str) -> Activations:
        """`count_activations` of the role's model for as many tokens as `batch` has."""
        size = {"sequences": batch.sequences, "width": batch.width, "uneven": batch.fill < 1}
        key = (*self._identity(role), dtype, *size.values(), device_type)
        if key not in self.counted:
            model = self.models[role.name]
            self.counted[key] = count_activations(model, role, dtype, device_type=device_type, **size)
        return self.counted[key].scaled(batch.fill)

    def _identity(self, role: RoleFlags) -> tuple[Any, ...]:
        """What a model and its passes depend on."""
        adapter = (role.lora_dim, role.lora_module_name, role.lora_dropout, role.only_optimize_lora)
        head = (role.new_head, role.head_hidden_size, role.head_dropout)
        return (id(self.models[role.name]), role.kind, role.dropout, *head, *(adapter if role.lora_dim else ()))


@dataclass(frozen=True)
class Role:
    """A model in its engine, and what it computes for a micro-batch."""

    flags: RoleFlags
    engine: Engine
    activations: Activations

    def saved(self, batch: BatchShape) -> Blocks:
        """What the forward pass keeps for the backward pass."""
        layer_input = batch.tokens * self.engine.shape.hidden * self.engine.item_size
        return saved_activations(
            self.activations, checkpointing=self.flags.gradient_checkpointing, layer_input=layer_input
        )

    def scaled(self, factor: float) -> "Role":
        """For a micro-batch of `factor` times as many tokens."""
        return replace(self, activations=self.activations.scaled(factor))

    def forward(self, targets: int) -> Items:
        """Items of a pass without gradients, in which a model with a vocabulary predicts `targets` tokens."""
        head = vocabulary_head(self.engine, targets, with_grad=False) if self.engine.shape.vocabulary else {}
        return {"activations": self.activations.layer, "gather buffers": self.engine.gathered()} | head

    def training(self, batch: BatchShape) -> list[Items]:
        """Items at each moment of an optimiser step, besides the persistent ones."""
        head = vocabulary_head(self.engine, batch.targets, with_grad=True)
        work = backward_work(self.activations)
        return self.engine.backward_moments(self.saved(batch), work, head, batch.per_step)


def planned_roles(plan: Plan, subject: Subject, machine: Machine, batch: BatchShape) -> dict[str, Role]:
    """The models of a run, for micro-batches like `batch`."""
    return {name: _planned_role(flags, plan, subject, machine, batch) for name, flags in plan.roles.items()}


def _planned_role(flags: RoleFlags, plan: Plan, subject: Subject, machine: Machine, batch: BatchShape) -> Role:
    dtype = plan.config.dtype
    offload = flags.offload and machine.on_gpu
    engine = Engine(
        shape=subject.shape(flags, dtype),
        dtype=dtype,
        stage=3 if offload and not flags.trains else flags.zero_stage,  # see `models.engine.build_frozen_engine`
        world_size=machine.world_size,
        trains=flags.trains,
        offload=offload,
        on_gpu=machine.on_gpu,
    )
    counted = subject.activations(flags, dtype, batch, machine.device_type)
    if flags.kind == "scalar":
        width = flags.head_hidden_size if flags.new_head else hidden_size_of(subject.models[flags.name])
        head = _head_activations(flags, dtype, batch.tokens, engine.shape.hidden, width)
        counted = replace(counted, outside=counted.outside + head)
    return Role(flags, engine, counted)


def _head_activations(flags: RoleFlags, dtype: str, tokens: float, hidden: int, width: int) -> Blocks:
    """What a scalar head keeps for the backward pass, in fp32.

    A copy of its input, where the model computes in another format; the output of its hidden layer of `width` (0: there
    is none); and with dropout the output of that and a mask of bytes.
    """
    copied = 0 if dtype == "fp32" else hidden
    dropped = (width or hidden) if flags.head_dropout else 0
    return blocks_of(tokens * size for size in (4 * copied, 4 * width, 4 * dropped, dropped) if size)
