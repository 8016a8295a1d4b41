"""The models of a run and their settings, whatever the flags are called in its step."""

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["causal_lm", "scalar"]


@dataclass(frozen=True, kw_only=True)
class RoleFlags:
    """The settings of one model of a run, taken from the flags.

    Attributes:
        name: what the role is called in messages, files and metrics: "model", "actor", "critic", "reference", "reward".
        kind: whether it outputs log-probabilities or one number per token. `new_head`: it starts from a language model
            whose vocabulary head is replaced by a new scalar head, with a hidden layer of `head_hidden_size` (0: none).
            `head_dropout`: in front of the head's last linear map.
        path, path_flag: where its weights come from, and the flag that names the place.
        prefix: what the names of this role's flags begin with.
        zero_stage: as set by the flag. offload: its optimiser state (if it trains) or its weights are in host memory.
    """

    name: str
    kind: Kind
    path: str
    path_flag: str
    prefix: str = ""
    trains: bool = True
    new_head: bool = False
    head_hidden_size: int = 0
    head_dropout: float = 0.0
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
    trust_remote_code: bool = False


def trained_role(config: Any, name: str, kind: Kind, prefix: str = "", **known: Any) -> RoleFlags:
    """A model that trains, whose flags of `config` begin with `prefix`.

    Args:
        known: settings that are not flags of this role, or that the step fixes.
    """
    flags = {
        "path": getattr(config, f"{prefix}model_name_or_path"),
        "path_flag": f"--{prefix}model_name_or_path",
        "offload": config.offload,
        "lora_dropout": config.lora_dropout,
        "only_optimize_lora": config.only_optimize_lora,
        "trust_remote_code": config.trust_remote_code,
    }
    of_this_role = ("zero_stage", "gradient_checkpointing", "learning_rate", "weight_decay")
    of_its_adapter = ("lora_dim", "lora_module_name", "lora_learning_rate")
    for flag_name in (*of_this_role, *of_its_adapter, "dropout"):
        flags[flag_name] = getattr(config, prefix + flag_name)
    return RoleFlags(name=name, kind=kind, prefix=prefix, **(flags | known))


def frozen_role(
    name: str, kind: Kind, *, path: str, path_flag: str, zero_stage: int, offload: bool, trust_remote_code: bool
) -> RoleFlags:
    """A model that is not trained, without dropout and without LoRA."""
    return RoleFlags(
        name=name,
        kind=kind,
        path=path,
        path_flag=path_flag,
        trains=False,
        zero_stage=zero_stage,
        offload=offload,
        dropout=0.0,
        trust_remote_code=trust_remote_code,
    )
