"""The models of a run and their flags, whatever these are called in its step."""

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["causal_lm", "scalar"]


@dataclass(frozen=True, kw_only=True)
class RoleFlags:
    """What the flags say of one model of a run.

    Attributes:
        name: what the role is called in messages, files and metrics: "model", "actor", "critic", "reference", "reward".
        kind: whether it gives log-probabilities or one number per token. `new_head`: it starts from a language model
            whose vocabulary head makes room for a new scalar head.
        path, path_flag: where it starts from, and the flag that says so.
        prefix: what the names of this role's flags begin with.
        zero_stage: as the flag says. offload: its optimiser state (what trains) or its weights are in host memory.
    """

    name: str
    kind: Kind
    path: str
    path_flag: str
    prefix: str = ""
    trains: bool = True
    new_head: bool = False
    zero_stage: int = 0
    offload: bool = False
    dropout: float | None = None
    gradient_checkpointing: bool = False
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    lora_dim: int = 0
    lora_module_name: str = ""
    lora_learning_rate: float = 0.0
    lora_dropout: float = 0.0
    only_optimize_lora: bool = False


def trained_role(config: Any, name: str, kind: Kind, prefix: str = "", **known: Any) -> RoleFlags:
    """A model that trains, whose flags of `config` begin with `prefix`.

    Args:
        known: what is not a flag of this role, or is fixed in this step.
    """
    flags = {
        "path": getattr(config, f"{prefix}model_name_or_path"),
        "path_flag": f"--{prefix}model_name_or_path",
        "offload": config.offload,
        "lora_dropout": config.lora_dropout,
        "only_optimize_lora": config.only_optimize_lora,
    }
    of_this_role = ("zero_stage", "gradient_checkpointing", "learning_rate", "weight_decay")
    of_its_adapter = ("lora_dim", "lora_module_name", "lora_learning_rate")
    for flag_name in (*of_this_role, *of_its_adapter, "dropout"):
        flags[flag_name] = getattr(config, prefix + flag_name)
    return RoleFlags(name=name, kind=kind, prefix=prefix, **(flags | known))


def frozen_role(name: str, kind: Kind, *, path: str, path_flag: str, zero_stage: int, offload: bool) -> RoleFlags:
    """A model that is only read, without dropout and without LoRA."""
    return RoleFlags(
        name=name,
        kind=kind,
        path=path,
        path_flag=path_flag,
        trains=False,
        zero_stage=zero_stage,
        offload=offload,
        dropout=0.0,
    )
