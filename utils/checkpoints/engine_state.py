"""The state of a DeepSpeed engine on disk, in DeepSpeed's own sharded files, and sums of the weights not stored."""

from collections.abc import Iterable
from pathlib import Path

import torch

from utils.checkpoints.elastic import rebuild_engine
from utils.checkpoints.shards import Shards, open_shard
from utils.errors import InputError
from utils.parallel import distributed
from utils.parallel.zero import Engine, is_partitioned


class EngineWriter:
    """Saves engines into a folder. Write failures are kept in `error`, so that all ranks reach DeepSpeed's barriers.

    Attributes:
        files: what this rank has written.
        error: the first failure of this rank, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []
        self.error: OSError | RuntimeError | None = None

    def save(self, engine: Engine, name: str) -> None:
        """Write trainable weights, optimiser, schedule and loss scale of `engine` to `folder/name`; on every rank.

        Frozen weights are those of the model that the run started from, and are not stored.
        """
        shards, write = engine.checkpoint_engine, engine.checkpoint_engine.save

        def write_or_remember(state_dict: dict, path: str) -> None:
            try:
                write(state_dict, path)
                self.files.append(Path(path))
            except (OSError, RuntimeError) as error:
                self.error = self.error or error

        shards.save = write_or_remember
        engine._copy_recovery_script = lambda folder: None  # a checkpoint holds data, no programs
        try:
            with distributed.quiet():
                engine.save_checkpoint(str(self.folder), tag=name, save_latest=False, exclude_frozen_parameters=True)
        finally:
            del shards.save, engine._copy_recovery_script


def load_engine(engine: Engine, folder: Path, name: str) -> None:
    """Bring a freshly built engine to the state that `EngineWriter.save` stored. The files must have been checked.

    With the same number of processes and ZeRO stage, each gets back what it wrote; otherwise it is partitioned again.

    Raises:
        InputError: the weights are not those of this model, or a file holds code.
    """
    shards = Shards(folder / name)
    if (shards.world_size, shards.stage) != (distributed.world_size(), engine.zero_optimization_stage()):
        rebuild_engine(engine, shards)
        return
    frozen = {parameter for parameter, weight in engine.module.named_parameters() if not weight.requires_grad}

    def load_weights(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
        result = dst.load_state_dict(src, strict=False)
        wrong = sorted((set(result.missing_keys) - frozen) | set(result.unexpected_keys))
        if wrong:
            raise InputError(f"{folder} is not a checkpoint of this model: {wrong[0]} is missing or unknown")

    engine.checkpoint_engine.load = lambda path, map_location=None: open_shard(path, mapped=False)
    try:
        with distributed.quiet():
            engine.load_checkpoint(str(folder), tag=name, custom_load_fn=load_weights)
    finally:
        del engine.checkpoint_engine.load


@torch.no_grad()
def frozen_weight_sums(models: Iterable[torch.nn.Module]) -> torch.Tensor:
    """One int64 for each frozen parameter: the sum of its bits, read as integers. Every rank must call it.

    A checkpoint does not store frozen weights; with these sums a resumed run checks that it has loaded the same.
    """
    sums, is_part = [], []
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                continue
            bits = _own_part(parameter).detach().contiguous().view(torch.uint8)
            words = bits.view(
                {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(parameter.element_size(), torch.uint8)
            )
            sums.append(words.sum(dtype=torch.int64).cpu())
            is_part.append(is_partitioned(parameter))
    if any(is_part):
        is_part = torch.tensor(is_part)
        own = torch.stack(sums)
        return torch.where(is_part, distributed.all_reduce(own), own)
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values of a parameter that this rank holds; the last rank's part under ZeRO-3 ends in undefined padding."""
    if not is_partitioned(parameter):
        return parameter
    part = parameter.ds_tensor.flatten()
    return part[: max(parameter.ds_numel - distributed.rank() * part.numel(), 0)]
