"""What a run is about to do, in a few lines at its start."""

from collections.abc import Iterator

import torch

from utils.arguments.roles import RoleFlags
from utils.errors import counted
from utils.models.on_meta import build_on_meta
from utils.parallel import distributed
from utils.parallel.zero import TORCH_DTYPES, effective_stage
from utils.runs.plan import Plan

MILLION, BILLION = 1e6, 1e9


def announce(plan: Plan) -> None:
    """Print the opening lines on rank 0; only that rank counts parameters."""
    if distributed.is_main():
        for line in opening_lines(plan):
            distributed.log(line)


def opening_lines(plan: Plan) -> Iterator[str]:
    """A line each for the machine, the models, the length of the run, and its output."""
    config, processes = plan.config, distributed.world_size()
    yield f"{plan.title} on {counted(processes, 'process')} ({_device()}), {config.dtype}, seed {config.seed}"
    for role in plan.roles.values():
        yield f"{role.name}: {role.path}, {_about(plan, role)}"
    rows = processes * config.step_rows
    by_prompt = config.pairs == "all"  # a step then has all pairs of so many prompts
    kind = "prompts" if by_prompt else "rows"
    step = f"{rows} {kind} ({processes} x {config.micro_batch_rows} x {config.gradient_accumulation_steps})"
    longest = config.longest_row()[0]
    tokens = f"pairs of up to {longest:,} tokens" if by_prompt else f"up to {rows * longest:,} tokens"
    schedule = f"{config.lr_scheduler_type}, {config.num_warmup_steps} of warm-up"
    if plan.generates:
        steps = ", ".join(
            f"{name} {count:,} at {_rate(plan.roles[name])}" for name, count in plan.optimizer_steps.items()
        )
        prompts = processes * config.rollout_rows
        yield f"{counted(plan.length, plan.unit)} of {prompts} prompts; optimiser steps of {step}, {tokens}"
        yield f"optimiser steps: {steps} ({schedule})"
    else:
        rate = _rate(next(iter(plan.roles.values())))
        yield f"{counted(plan.length, plan.unit)} of {step}, {tokens}; learning rate {rate} ({schedule})"
    yield f"output: {_output(plan)}"


def _device() -> str:
    threads = "" if torch.accelerator.is_available() else f", {counted(torch.get_num_threads(), 'thread')} each"
    return distributed.device_name() + threads


def _about(plan: Plan, role: RoleFlags) -> str:
    """Architecture, size, and how it is trained."""
    model_config = plan.models[role.name]
    parameters = list(build_on_meta(model_config, role, plan.config.dtype).parameters())
    total = sum(parameter.numel() for parameter in parameters)
    text = f"{model_config.model_type} of {_size(total)} parameters"
    if not role.trains:
        return f"{text}, frozen"
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    stage = effective_stage(role.zero_stage, plan.config.dtype)
    lora = f", LoRA {role.lora_dim}" if role.lora_dim else ""
    return f"{text}{lora}, {'all' if trained == total else _size(trained)} trained, ZeRO {stage}"


def _rate(role: RoleFlags) -> str:
    return f"{role.learning_rate:g}" + (f" (LoRA {role.lora_learning_rate:g})" if role.lora_dim else "")


def _output(plan: Plan) -> str:
    config = plan.config
    if not config.output_dir:
        return "none, since no --output_dir is given"
    stored = {str(plan.models[name].dtype).removeprefix("torch.") for name, role in plan.roles.items() if role.trains}
    mine = str(TORCH_DTYPES[config.dtype]).removeprefix("torch.")
    change = "" if stored <= {mine, "None"} else f" (they were read from {', '.join(sorted(stored - {mine}))})"
    saves = f", a checkpoint every {counted(config.save_interval, plan.unit)}" if config.save_interval else ""
    return f"{config.output_dir}, weights in {mine}{change}{saves}"


def _size(numbers: int) -> str:
    if numbers >= BILLION:
        return f"{numbers / BILLION:.2f} billion"
    return f"{numbers / MILLION:.1f} million" if numbers >= MILLION else f"{numbers:,}"
