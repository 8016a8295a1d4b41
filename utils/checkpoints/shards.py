"""DeepSpeed's files of one engine, read parameter by parameter, whatever ZeRO stage and number of processes wrote them.

Stage 0 keeps whole tensors. Stages 1 and 2 concatenate the parameters of a group and cut the result into one piece for
each process; stage 3 cuts every parameter into equal pieces, the last one padded. Tensors are memory-mapped from the
files, so that no process holds more than the parameter it is reading.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch

from utils.errors import InputError, RankError
from utils.parallel.zero import CHECKPOINT_CLASSES

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass
class ParameterState:
    """One parameter as its optimiser saw it: fp32 weight and Adam's moments, flat, and its number of steps.

    `moments` is empty and `step` None where the optimiser had not stepped yet.
    """

    weight: torch.Tensor
    moments: dict[str, torch.Tensor]
    step: torch.Tensor | int | None


class Shards:
    """Opens the files in `folder`, whose checksums must have been verified.

    Attributes:
        stage: the ZeRO stage that wrote them. world_size: by how many processes.
        model: what is the same on all of them: `lr_scheduler`, `global_steps`, `skipped_steps` and more.
        optimizer: what the optimiser of each process wrote, once `open_optimizer` has been called; empty at stage 0,
            where it is in `model`.

    Raises:
        InputError: DeepSpeed's files are not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("*mp_rank_00_model_states.pt"), key=_rank_of)
        if not files:
            raise InputError(
                f"{folder.parent}: holds no state of the {folder.name}; resume with the flags of the run that wrote it"
            )
        self.model = open_shard(files[0])
        self.stage = int(self.model["ds_config"]["zero_optimization"]["stage"])
        self.world_size = int(self.model["dp_world_size"])

    def open_optimizer(self) -> None:
        """Open every process's optimiser state, for `read`."""
        files = sorted(self.folder.glob("*mp_rank_00_optim_states.pt"), key=_rank_of)
        self.optimizer = [open_shard(file)["optimizer_state_dict"] for file in files]
        if len(files) != (self.world_size if self.stage else 0):
            raise InputError(f"{self.folder}: holds {len(files)} optimiser states for {self.world_size} processes")

    def read(self, name: str, index: int) -> ParameterState:
        """The state of parameter `name`, the `index`-th in the order of the optimiser's groups.

        Raises:
            InputError: there is no such parameter.
        """
        try:
            if self.stage == 0:
                state = self.model["optimizer"]["state"].get(index, {})
                return _joined([(self.model["module"][name].flatten(), state, slice(None))])
            pieces = self._cut_parameters(name) if self.stage == 3 else self._cut_groups(name)
        except KeyError:
            raise InputError(f"{self.folder.parent}: is not a checkpoint of this model: {name} is missing") from None
        return _joined(pieces)

    def _cut_groups(self, name: str) -> list[tuple]:
        pieces = []
        for shard in self.optimizer:
            for group, places in enumerate(shard["param_slice_mappings"]):
                if name in places:
                    place = slice(places[name].start, places[name].start + places[name].numel)
                    weights = shard["single_partition_of_fp32_groups"][group]
                    pieces.append((weights, shard["base_optimizer_state"]["state"].get(group, {}), place))
        if not pieces:
            raise KeyError(name)
        return pieces

    def _cut_parameters(self, name: str) -> list[tuple]:
        group = next((group for group, shapes in enumerate(self.model["param_shapes"]) if name in shapes), None)
        if group is None:
            raise KeyError(name)
        start = 0
        for other, shape in self.model["param_shapes"][group].items():
            length = -(-shape.numel() // self.world_size)
            if other == name:
                break
            start += length
        pieces = []
        for rank, shard in enumerate(self.optimizer):
            real = max(0, min(length, shape.numel() - rank * length))
            state = shard["optimizer_state_dict"]["state"].get(group, {})
            pieces.append((shard["fp32_flat_groups"][group], state, slice(start, start + real)))
        return pieces


def _joined(pieces: Sequence[tuple[torch.Tensor, dict, slice]]) -> ParameterState:
    """The state whose parts are slices of flat weights and of the optimiser's state for them."""
    moments = {
        key: torch.cat([state[key].flatten()[place] for _, state, place in pieces])
        for key in MOMENTS
        if key in pieces[0][1]
    }
    weight = torch.cat([weights[place] for weights, _, place in pieces])
    return ParameterState(weight, moments, pieces[0][1].get("step"))


def open_shard(file: Path, *, mapped: bool = True) -> dict:
    """The content of one of DeepSpeed's files, on the CPU. No code in the file runs.

    Args:
        mapped: tensors are memory-mapped, and must not outlive the file.

    Raises:
        RankError: it holds more than plain data, tensors and `CHECKPOINT_CLASSES`.
    """
    try:
        with torch.serialization.safe_globals(list(CHECKPOINT_CLASSES)):
            return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise RankError(
            f"{file}: holds code, or is not a DeepSpeed file, and was not loaded: resume from another checkpoint "
            f"({str(error).splitlines()[0]})"
        ) from error


def _rank_of(file: Path) -> int:
    """`[bf16_]zero_pp_rank_3_mp_rank_00_...` is rank 3's; a name without `pp_rank_` is for all ranks."""
    _, found, rest = file.name.partition("pp_rank_")
    return int(rest.partition("_")[0]) if found else 0
