"""What a checkpoint holds, read back for comparisons."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from utils.checkpoints.shards import open_shard


def state_of(checkpoint: Path) -> dict:
    """Everything in a checkpoint except the times."""
    from utils.parallel import distributed

    content = json.loads((checkpoint / "state.json").read_text())
    content["state"].pop("seconds"), content["state"].pop("metrics_position")
    state = {"state": content["state"]}
    file = checkpoint / f"rank-{distributed.rank()}.safetensors"
    state["tensors"] = load_file(file)
    with safe_open(file, framework="pt") as opened:
        state["texts"] = opened.metadata()  # python's and numpy's random states
    for path in sorted(checkpoint.glob("*/*.pt")):
        shards = open_shard(path)
        shards.pop("ds_config", None)
        state[f"{path.parent.name}/{path.name}"] = shards
    return state


def same(one, other, place: str = "") -> bool:
    """Whether two nested containers hold the same bits; fails with the place of the first difference."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        assert all(same(one[key], other[key], f"{place}/{key}") for key in one)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        assert all(same(a, b, f"{place}/{index}") for index, (a, b) in enumerate(zip(one, other)))
    elif hasattr(one, "__dict__"):
        assert same(vars(one), vars(other), place)
    else:
        assert one == other, (place, one, other)
    return True
