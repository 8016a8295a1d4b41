"""DeepSpeed: a complete configuration for every ZeRO stage, and engines."""

import contextlib
import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from utils.parallel import distributed  # before deepspeed: it chooses the accelerator

import deepspeed  # isort: skip
import transformers
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from transformers.integrations import HfDeepSpeedConfig

from utils.errors import InputError

Engine = deepspeed.DeepSpeedEngine  # a model and, if it trains, its optimiser and schedule

# Classes of the objects in DeepSpeed's checkpoint files: allowing only these, torch reads them without running code.
CHECKPOINT_CLASSES = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
REDUCE_PIECE = 1 << 25  # gradient elements that `_reduce_gradients` reduces at a time
PERSISTENT = 10_000  # elements: smaller parameters stay whole at stage 3
# Elements that stage 3 keeps whole at a time, and those of them that it prefetches. A layer of a 7B model has 200
# million: with less, a GPU waits for its gathers. On a CPU nothing overlaps, and saving memory matters more.
GATHERED_ON_GPU, GATHERED_ON_CPU = (1_000_000_000, 200_000_000), (30_000_000, 30_000_000)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(dtype: str) -> None:
    """Raise InputError when this machine cannot train in `dtype`."""
    if dtype == "fp16" and not torch.accelerator.is_available():
        raise InputError("--dtype fp16 needs a GPU: use --dtype bf16 or --dtype fp32 on a CPU")


def check_offload() -> None:
    """Raise InputError when DeepSpeed cannot compile its optimiser for host memory, which `--offload` runs on a GPU."""
    if not torch.accelerator.is_available() or installed_ops.get("cpu_adam"):
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++") if name):
        raise InputError(
            "--offload compiles DeepSpeed's optimiser for host memory, and this machine has no C++ compiler: install "
            "g++, or leave the flag out"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise InputError(
            f"--offload compiles DeepSpeed's optimiser for host memory, which needs {header}: install Python's headers "
            f"(python{sys.version_info.major}.{sys.version_info.minor}-dev), or leave the flag out"
        )


def effective_stage(stage: int, dtype: str, *, offload: bool = False) -> int:
    """The ZeRO stage that actually runs.

    16-bit training at stage 0 runs as stage 1: the same mathematics on fp32 master weights, sharded over the ranks.
    DeepSpeed's own stage-0 bf16 optimizer starts with a dummy step: Adam's first update becomes 0.75 times its size.
    Offloading the optimiser needs stage 1 as well.
    """
    return 1 if stage == 0 and (dtype != "fp32" or offload) else stage


def zero_config(
    stage: int,
    dtype: str,
    *,
    micro_batch_size: int = 1,
    max_grad_norm: float = 1.0,
    offload: bool = False,
    trainable: bool = True,
) -> dict:
    """A complete DeepSpeed configuration.

    Args:
        stage: ZeRO stage 0 to 3. Engines that do not train exist at stages 0 and 3 only: 1 and 2 become 0.
        dtype: "bf16", "fp16" or "fp32", of parameters and activations. 16-bit types train on fp32 master weights.
        micro_batch_size: rows per process and micro-batch; DeepSpeed uses it for bookkeeping only.
        max_grad_norm: global gradient norm limit; 0 turns clipping off. Always set: DeepSpeed's own default is 1.0.
        offload: optimizer state (training) or parameters (not training, stage 3) live in host memory.
    """
    has_gpu = torch.accelerator.is_available()
    host_memory = {"device": "cpu", "pin_memory": has_gpu}
    offload = offload and has_gpu
    stage = effective_stage(stage, dtype, offload=offload) if trainable else (3 if stage == 3 else 0)
    live, prefetched = GATHERED_ON_GPU if has_gpu else GATHERED_ON_CPU
    zero = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage >= 2 and has_gpu,
        "stage3_param_persistence_threshold": PERSISTENT,
        "stage3_max_live_parameters": live,
        "stage3_prefetch_bucket_size": prefetched,
        "memory_efficient_linear": False,
    }
    if offload and trainable:
        zero["offload_optimizer"] = host_memory
    if offload and stage == 3:
        zero["offload_param"] = host_memory
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # `updates.optimizer_step` sets the boundary itself
        "gradient_clipping": float(max_grad_norm),
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 100}
    if dtype != "fp32" and trainable and stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class sharded_loading:
    """Context in which `from_pretrained` and `from_config` build ZeRO-3 models already partitioned over the ranks.

    No rank ever holds a whole model: transformers sees the live `HfDeepSpeedConfig` and wraps construction in
    `deepspeed.zero.Init`. Outside stage 3 it does nothing.
    """

    def __init__(self, config: dict):
        self.config = config if config["zero_optimization"]["stage"] == 3 else None

    def __enter__(self) -> None:
        self.live = HfDeepSpeedConfig(self.config) if self.config else None

    def __exit__(self, *exception) -> None:
        if self.live is not None:
            transformers.integrations.deepspeed.unset_hf_deepspeed_config()
        self.live = None


def is_partitioned(parameter: torch.Tensor) -> bool:
    """True for a parameter that ZeRO-3 has split over the ranks."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Iterable[torch.nn.Parameter], *, write: bool = False):
    """Context in which ZeRO-3 parameters are whole; with `write`, rank 0's changes reach every rank."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None, enabled=bool(partitioned))


def partition_again(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Discard the whole copies of ZeRO-3 parameters, so that the next gather reads their shards.

    Small parameters stay whole between steps; a change to their shards alone would go unnoticed.
    """
    whole = [p for p in parameters if is_partitioned(p) and p.ds_status.name == "AVAILABLE"]
    if whole:
        whole[0].partition(param_list=whole, has_been_updated=False)


def parameter_groups(
    model: torch.nn.Module, *, learning_rate: float, weight_decay: float, lora_learning_rate: float
) -> list[dict]:
    """Trainable parameters in up to three groups: decayed, not decayed (biases and norms), and LoRA factors."""
    decayed, plain, lora = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        dimensions = len(parameter.ds_shape) if is_partitioned(parameter) else parameter.ndim
        if "lora_" in name:
            lora.append(parameter)
        elif dimensions < 2:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": plain, "lr": learning_rate, "weight_decay": 0.0},
        {"params": lora, "lr": lora_learning_rate, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict], *, betas: tuple[float, float], eps: float, offload: bool
) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay: fused on a GPU, DeepSpeed's vectorised one where state is offloaded."""
    if offload and torch.accelerator.is_available():
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, betas=betas, eps=eps, adamw_mode=True)
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def initialize_engine(
    model: torch.nn.Module,
    config: dict,
    *,
    groups: list[dict] | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    scheduler: str = "constant",
    warmup_steps: int = 0,
    total_steps: int = 1,
) -> Engine:
    """Wrap `model`, loaded in the dtype of `config`, in a DeepSpeed engine; without `groups` it only evaluates.

    Args:
        groups: from `parameter_groups`.
        scheduler: a name of `transformers.SchedulerType`; it advances once per optimiser step.
        warmup_steps, total_steps: in optimiser steps.
    """
    if groups is None:
        if config["zero_optimization"]["stage"] != 3:
            model.to(distributed.device())  # not to a dtype: rotary frequencies, a buffer, must stay fp32
        with distributed.quiet():
            engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=config)
        engine.eval()
        return engine
    offload = "offload_optimizer" in config["zero_optimization"]
    optimizer = build_optimizer(groups, betas=betas, eps=eps, offload=offload)
    schedule = transformers.get_scheduler(
        scheduler, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max(total_steps, 1)
    )
    with distributed.quiet():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    engine._reduce_non_expert_gradients = functools.partial(_reduce_gradients, engine._reduce_non_expert_gradients)
    if engine.fp16_enabled():
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # `updates.optimizer_step` raises, with advice
    if engine.zero_optimization_partition_weights():
        engine.module.register_forward_hook(functools.partial(_release_prefetched, engine))
    return engine


def _reduce_gradients(reduce: Callable, gradients: list[torch.Tensor], *_: object) -> None:
    """DeepSpeed's own reduction (of fp32 at stage 0, of bf16 at stage 1), a piece at a time, and none for one process.

    Left alone, it first copies all gradients into one flat tensor, converts that to bf16, and copies back, even in a
    single process: for bf16 that takes half as much memory again as the weights of the optimiser, and rounds gradients
    to bf16 for nothing.
    """
    if distributed.world_size() > 1:
        reduce([piece for gradient in gradients for piece in gradient.view(-1).split(REDUCE_PIECE)], REDUCE_PIECE)


def _release_prefetched(engine: Engine, *_: object) -> None:
    """After a forward pass without gradients: release what ZeRO-3 has started to prefetch for a backward pass.

    It would arrive while the same weights are gathered for saving or generation, which DeepSpeed refuses.
    """
    if not torch.is_grad_enabled():
        engine.optimizer.empty_partition_cache()


@contextlib.contextmanager
def optimizer_on_host(engine: Engine, *, pin_memory: bool = True) -> Iterator[None]:
    """Keep Adam's moments and the fp32 master weights of `engine` in host memory within the block; no bit changes.

    DeepSpeed can move them for some of its optimisers only, and its bf16 optimiser is not one of these. So the storages
    of the tensors are emptied and refilled in place: whatever refers to them, such as the fragments by which ZeRO finds
    a parameter in its flat partition, stays valid.
    """
    storages = list(_optimizer_storages(engine))
    hosts = []
    for storage in storages:
        host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin_memory)
        hosts.append(host.copy_(_bytes_of(storage)))
        storage.resize_(0)
    try:
        yield
    finally:
        for storage, host in zip(storages, hosts, strict=True):
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host)


# Attributes of DeepSpeed's optimisers for the fp32 master weights of this rank: bf16, ZeRO 1 and 2, ZeRO-3.
MASTER_WEIGHTS = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


def _optimizer_storages(engine: Engine) -> Iterator[torch.UntypedStorage]:
    """The storages of the optimiser's tensors on the device, except those of the model's parameters."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [tensor for name in MASTER_WEIGHTS for tensor in getattr(engine.optimizer, name, ())]
    for parameter, state in optimizer.state.items():
        tensors += [parameter, *(tensor for tensor in state.values() if torch.is_tensor(tensor))]
    own = (parameter.ds_tensor if is_partitioned(parameter) else parameter for parameter in engine.module.parameters())
    seen = {tensor.untyped_storage().data_ptr() for tensor in own}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device == distributed.device() and storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
