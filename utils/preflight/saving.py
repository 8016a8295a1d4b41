"""Saving models and checkpoints: memory besides the persistent items, and the disk space at `--output_dir`.

Derived from models/saving.py and checkpoints/, and measured on a CPU: the process that writes a model collects all of
it in host memory, LoRA merged, one ZeRO-3 parameter after the other; safetensors and DeepSpeed's files are written
directly from the tensors, which on a GPU pass through host memory one at a time.
"""

import math
from dataclasses import dataclass, replace

from utils.arguments.steps import StepConfig
from utils.preflight.blocks import Blocks, block, blocks_of
from utils.preflight.memory import Engine
from utils.preflight.model_shape import ModelShape
from utils.preflight.phases import Disk, Items, total_of
from utils.preflight.roles import Role, Subject


@dataclass(frozen=True)
class SavedModel:
    """A model that trains, and its written form, with LoRA merged. `twice`: tied numbers, copied under both names."""

    engine: Engine
    written: ModelShape
    twice: int

    def copy(self) -> Blocks:
        """The whole model in the memory of the process that writes it."""
        size = self.engine.item_size
        return blocks_of(matrix.numel * size for matrix in self.written.parameters) + block(self.twice * size)

    def file_bytes(self, *, adapter: bool) -> float:
        """Bytes of the written model; with `adapter` also of all that was trained, tied matrices under both names."""
        shape = self.engine.shape
        has_adapter = adapter and shape.adapted > 0
        trained = shape.trainable + (self.twice if shape.head_trains else 0) if has_adapter else 0
        return self.engine.item_size * (self.written.total + trained)


def saved_model(trained: Role, subject: Subject) -> SavedModel:
    """`trained` as `models.saving.save_model` writes it."""
    flags = trained.flags
    written = subject.shape(replace(flags, lora_dim=0), trained.engine.dtype)
    tied = flags.kind == "causal_lm" and getattr(subject.models[flags.name], "tie_word_embeddings", False)
    return SavedModel(trained.engine, written, written.vocabulary * written.hidden if tied else 0)


def saving_moments(models: list[SavedModel], averaged: SavedModel | None) -> list[Items]:
    """Items at each moment of a save, besides the persistent ones.

    Args:
        models: written with their own weights. averaged: the one that is written with its moving average as well; its
            own weights are put aside meanwhile.
    """
    moments = []
    for model in models:
        moments += _save(model)
    if averaged is not None:
        engine = averaged.engine
        shards = engine.world_size if engine.real_stage == 3 else 1
        aside = {"weights put aside": engine.of_parameters(engine.item_size / shards, trained_only=True)}
        moments += [aside | items for items in _save(averaged)]
    # where a CPU's allocator makes moments equal, the report shows the first
    return sorted(moments, key=lambda items: -total_of(items).total)


def _save(model: SavedModel) -> list[Items]:
    engine = model.engine
    items = {} if engine.on_gpu else {"copy to save": model.copy()}
    if engine.real_stage == 3:
        items["gather buffers"] = block(engine.shape.largest * engine.item_size)
    return [{"check for NaN": engine.nan_check()}, items]


def host_bytes(config: StepConfig, models: list[SavedModel], average: float) -> float:
    """Bytes in host memory while a process with a GPU saves; `average` are those of its moving average.

    It holds a whole model there, or one tensor of a checkpoint, or the average as a checkpoint stores it.
    """
    largest = [model.copy().total for model in models]
    if config.save_interval:
        largest += [average, *(model.engine.largest_stored() for model in models)]
    return max(largest)


def disk_use(config: StepConfig, models: list[SavedModel], averaged: SavedModel | None) -> Disk:
    """Bytes written to `--output_dir`. `averaged` is one of `models`, whose moving average is written too."""
    if not config.output_dir:
        return Disk()
    checkpoint = sum(model.engine.stored_bytes() for model in models) if config.save_interval else 0.0
    if averaged is not None and config.save_interval:
        checkpoint += 4 * averaged.engine.shape.trainable
    sizes = [model.file_bytes(adapter=config.save_adapter) for model in models]
    if averaged is not None:
        sizes.append(averaged.file_bytes(adapter=False))
    if config.keep_best:  # in a separate folder; a better one is written beside the one that it replaces
        return Disk(checkpoint, 2 * sum(sizes) + max(sizes))
    return Disk(checkpoint, sum(sizes))


def checkpoints_at_once(config: StepConfig, length: int | None) -> int | None:
    """The most checkpoints that are on the disk at a time: those kept and the one being written; None if not known.

    Args:
        length: of the run, in the unit of `--save_interval`; None if not known.
    """
    if not config.save_interval:
        return 0
    limits = [] if length is None else [math.ceil(length / config.save_interval)]
    if config.save_total_limit:
        limits.append(config.save_total_limit + 1)
    return min(limits, default=None)
