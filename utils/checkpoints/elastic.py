"""Resuming with another number of processes or another ZeRO stage: the same state, partitioned again.

Weights, moments, schedule, counters and averages are those of the checkpoint, to the last bit. What is computed from
there on is not: sums over processes are taken in another order, and dropout on a process that is new to the run begins
a new stream of random numbers.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from utils.checkpoints.shards import MOMENTS, ParameterState, Shards
from utils.errors import InputError
from utils.parallel import distributed
from utils.parallel.zero import Engine, is_partitioned, parameter_groups


@dataclasses.dataclass
class Piece:
    """Where this rank keeps part of a parameter: `length` of its values from `start` on, at `offset` of `flat`."""

    flat: torch.Tensor
    offset: int
    start: int
    length: int


@torch.no_grad()
def rebuild_engine(engine: Engine, shards: Shards) -> None:
    """Bring a freshly built engine to the state in `shards`, of any ZeRO stage and number of processes.

    Raises:
        InputError: the parameters are not those of this model.
    """
    shards.open_optimizer()
    optimizer, base = engine.optimizer, getattr(engine.optimizer, "optimizer", engine.optimizer)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = parameter_groups(engine.module, learning_rate=0.0, weight_decay=0.0, lora_learning_rate=0.0)
    ordered = [parameter for group in groups for parameter in group["params"]]
    own = _pieces(engine)
    for index, parameter in enumerate(ordered):
        name = names[id(parameter)]
        state = shards.read(name, index)
        numel = parameter.ds_numel if is_partitioned(parameter) else parameter.numel()
        if state.weight.numel() != numel:
            raise InputError(f"{shards.folder.parent} is not a checkpoint of this model: {name} has another size")
        if id(parameter) in own:
            _write(own[id(parameter)], state, base)
    _publish_weights(engine, own)
    engine.lr_scheduler.load_state_dict(shards.model["lr_scheduler"])
    for group, rate in zip(optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, shards.model[name])
    if engine.fp16_enabled():
        optimizer.loss_scaler = shards.optimizer[0]["loss_scaler"]
        optimizer.dynamic_loss_scale = shards.optimizer[0]["dynamic_loss_scale"]


def divide_average(parts: Sequence[torch.Tensor], own: torch.Tensor, rank: int) -> None:
    """Write this rank's part of an average into `own`.

    Args:
        parts: those of the ranks that wrote it: the whole from rank 0 alone, or an equal share from each (ZeRO-3).
    """
    whole = torch.cat([part.flatten() for part in parts])
    share = whole[rank * own.numel() : (rank + 1) * own.numel()]  # rank 0's is the whole where only it averages
    own.flatten()[: share.numel()].copy_(share)


def _pieces(engine: Engine) -> dict[int, Piece]:
    """This rank's piece of each trainable parameter of which it has one, by the parameter's id."""
    return {id(parameter): piece for parameter, piece in _each_piece(engine)}


def _each_piece(engine: Engine) -> Iterator[tuple[torch.nn.Parameter, Piece]]:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if stage == 0:
        for parameter in trainable:
            yield parameter, Piece(parameter, 0, 0, parameter.numel())
    elif stage == 3:
        for parameter in trainable:
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = distributed.rank() * length
            length = max(0, min(length, parameter.ds_numel - start))
            yield parameter, Piece(optimizer.fp32_partitioned_groups_flat[group], offset, start, length)
    else:
        is_bf16 = hasattr(optimizer, "bf16_groups")  # DeepSpeed's optimiser for 16-bit training at stage 1
        flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
        for flat, group in zip(flats, optimizer.bf16_groups if is_bf16 else optimizer.bit16_groups, strict=True):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                    yield parameter, Piece(flat, here.start, there.start, here.numel)


def _write(piece: Piece, state: ParameterState, base: torch.optim.Optimizer) -> None:
    def copy(target: torch.Tensor, values: torch.Tensor) -> None:
        target.view(-1)[piece.offset : piece.offset + piece.length].copy_(
            values[piece.start : piece.start + piece.length]
        )

    copy(piece.flat.data, state.weight)
    if state.step is None:
        return
    own = base.state[piece.flat]
    for key in MOMENTS:
        if key not in own:
            own[key] = torch.zeros_like(piece.flat.data, dtype=torch.float32)
        copy(own[key], state.moments[key])
    own["step"] = state.step.clone().to(piece.flat.device) if torch.is_tensor(state.step) else state.step


def _publish_weights(engine: Engine, own: dict[int, Piece]) -> None:
    """Copy the weights that `_write` has written to those that compute, on every rank."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage != 3:
        return
    persistent = optimizer.persistent_parameters  # small ones that every rank keeps whole
    if persistent:
        persistent[0].partition(persistent)
    for parameter in engine.module.parameters():
        if piece := own.get(id(parameter)):
            values = piece.flat.data[piece.offset : piece.offset + piece.length]
            parameter.ds_tensor.data.view(-1)[: piece.length].copy_(values)
    if persistent:
        persistent[0].all_gather(persistent)
