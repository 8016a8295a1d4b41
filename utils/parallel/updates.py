"""One optimiser step over micro-batches whose losses add up."""

import math
from collections.abc import Callable, Sequence

import torch

from utils.errors import DivergenceError
from utils.parallel import distributed, watchdog
from utils.parallel.divergence import DivergenceGuard
from utils.parallel.zero import Engine


def optimizer_step(
    engine: Engine,
    micro_batches: Sequence,
    loss_function: Callable[..., torch.Tensor],
    *,
    what: str,
    guard: DivergenceGuard = DivergenceGuard(),  # noqa: B008 (it is frozen)
) -> tuple[float, float]:
    """One optimiser step over `micro_batches`, whose losses add up.

    A step whose loss or gradient is NaN or infinite on any rank changes neither weights nor schedule: the run stops, or
    with `guard.on_nan` "skip" the step is counted in `engine.skipped_steps`.

    Args:
        loss_function: micro-batch -> scalar loss, already divided by the global count of what it averages over (tokens
            or rows of the whole optimiser step on all ranks), so that how rows are grouped does not change the result.
        what: names the step in an error, for example "step 12 of the reward model".

    Returns:
        (loss, gradient norm before clipping), both over all ranks.

    Raises:
        DivergenceError: the loss or the gradient is NaN or infinite on any rank, or the loss scale of fp16 is at its
            minimum; the weights were not updated.
    """
    world = distributed.world_size()
    losses = []
    for index, micro_batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
        watchdog.alive(f"{what}, forward pass of micro-batch {index + 1}")
        loss = loss_function(micro_batch)
        watchdog.alive(f"{what}, backward pass of micro-batch {index + 1}")
        losses.append(loss.detach().double())
        # DeepSpeed averages gradients over ranks, but our losses are shares of a sum, hence the factor `world`. A loss
        # that is not finite may have a finite gradient: the factor NaN makes every rank's optimiser skip this step.
        engine.backward(loss * torch.where(loss.detach().isfinite(), float(world), math.nan), scale_wrt_gas=False)
    losses = torch.stack(losses).cpu()
    loss_value = distributed.all_reduce(losses.sum()).item()
    if guard.on_nan == "stop" and not math.isfinite(loss_value):
        guard.report(what, loss_value, math.nan, micro_batches, losses.tolist())
    watchdog.alive(f"{what}, update of the weights")
    norm = _step(engine, what)
    if not math.isfinite(loss_value + norm) and not (engine.fp16_enabled() and math.isfinite(loss_value)):
        guard.report(what, loss_value, norm, micro_batches, losses.tolist())
    return loss_value, norm


def _step(engine: Engine, what: str) -> float:
    """Update the weights unless a gradient is NaN or infinite. Returns the norm over all ranks before clipping."""
    if engine.zero_optimization_stage() == 0:
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
        if math.isfinite(norm):
            engine.step()
        else:
            engine.zero_grad()
            engine.skipped_steps += 1
        return norm
    scale = engine.optimizer.loss_scale if engine.fp16_enabled() else 1.0
    engine.step()
    if not engine.optimizer.overflow:
        return float(engine.get_global_grad_norm())
    if engine.fp16_enabled() and scale <= engine.optimizer.loss_scaler.min_scale:
        raise DivergenceError(
            f"{what}: the loss scale of fp16 is at its minimum, {scale:g}, and gradients still overflow: use --dtype "
            "bf16, which needs no scale, or lower the learning rate"
        )
    return math.inf
