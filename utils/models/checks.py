"""Checks of the models and the tokenizer that the flags name, before any weights are read."""

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from utils.arguments.roles import RoleFlags
from utils.arguments.steps import StepConfig
from utils.chat_templates.choice import choose_template
from utils.errors import InputError
from utils.hub import is_reachable, looks_local, offline
from utils.models.lora import check_lora
from utils.models.scalar_head import install_head
from utils.models.tokenizer import check_same_tokens, has_tokenizer, load_tokenizer
from utils.models.weight_files import check_shapes, check_weight_files
from utils.parallel import distributed

MOST_UNUSED = 2  # largest ratio of rows in the embedding to tokens of the tokenizer


def check_models(config: StepConfig) -> dict[str, PreTrainedConfig]:
    """The configurations of the models of a run by role, after checking their folders, lengths and adapters.

    Raises:
        InputError: names the flag and what is missing or does not fit.
    """
    models: dict[str, PreTrainedConfig] = {}
    checked: dict[tuple[str, bool], PreTrainedConfig] = {}
    for name, role in config.roles().items():
        has_head = role.kind == "scalar" and not role.new_head
        if (role.path, has_head) not in checked:
            checked[role.path, has_head] = (_check_scalar_model if has_head else _check_language_model)(config, role)
        models[name] = checked[role.path, has_head]
    length, flags = config.longest_sequence()
    for name, role in config.roles().items():
        _check_length(models[name], length, flags)
        if role.lora_dim:
            check_lora(models[name], role)
    return models


def load_config(
    path: str, flag: str, *, trust_remote_code: bool = False, needs_weights: bool = True
) -> PreTrainedConfig:
    """The `config.json` of a model, read without its weights.

    Raises:
        InputError: names `flag`: no such folder, no config or no complete weights in it, or a hub name that cannot be
            reached.
    """
    folder = Path(path)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{flag} {path}: no config.json there; give the folder of a step's output or of a Hugging Face model"
            )
        if needs_weights:
            check_weight_files(folder, f"{flag} {path}")
    elif looks_local(path):
        raise InputError(f"{flag} {path}: no such folder")
    reachable = folder.exists() or is_reachable()
    try:
        with contextlib.nullcontext() if reachable else offline():
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # wrong values raise errors of many kinds
        reason = _reason(error)
        if folder.exists():
            raise InputError(f"{flag} {path}: config.json cannot be used ({reason})") from error
        raise InputError(
            f"{flag} {path}: neither a local folder nor a model that the hub provides ({reason}); "
            "download it on a connected machine and pass the folder"
        ) from error


def load_matching_tokenizer(config: StepConfig, models: Mapping[str, PreTrainedConfig]) -> PreTrainedTokenizerBase:
    """The tokenizer that the flags ask for: the first model's own, unless they name another. It carries the chat
    template of `--chat_template`, which the log names.

    Raises:
        InputError: it has ids that one of the models has no embedding for (`--add_eot_token` may add one row), or one
            of the models was trained with another tokenizer.
    """
    first, *others = config.roles().values()
    path = config.tokenizer_name_or_path or first.path
    tokenizer = load_tokenizer(
        path, add_eot_token=config.add_eot_token, eot_token=config.eot_token, trust_remote_code=config.trust_remote_code
    )
    note = choose_template(tokenizer, config.chat_template, eos_is_given=config.add_eot_token)
    for vocabulary in sorted({model_config.vocab_size for model_config in models.values()}):
        excess, too_few = len(tokenizer) - vocabulary, len(tokenizer) < vocabulary / MOST_UNUSED
        sizes = f"{path}: the tokenizer has {len(tokenizer)} tokens but a model embeds {vocabulary}"
        if excess > int(config.add_eot_token) or (too_few and config.tokenizer_name_or_path):
            raise InputError(f"{sizes}; use the tokenizer that the model was trained with (--tokenizer_name_or_path)")
        if too_few:
            distributed.warn(f"{sizes}: is it the one that the model was trained with?")
    for other in {role.path: role for role in others if role.path != first.path}.values():
        label = f"{other.path_flag} {other.path}"
        check_same_tokens(tokenizer, other.path, label, trust_remote_code=config.trust_remote_code)
    distributed.log(note)
    return tokenizer


def _check_language_model(config: StepConfig, role: RoleFlags) -> PreTrainedConfig:
    model_config = _check_folder(config, role)
    if _has_scalar_head(model_config):
        raise InputError(
            f"{role.path_flag} {role.path}: a reward model ({model_config.architectures[0]}); give a language model, "
            "such as step 1's output folder"
        )
    if kind := _other_kind(model_config):
        architecture = (model_config.architectures or [model_config.model_type])[0]
        raise InputError(
            f"{role.path_flag} {role.path}: {kind} ({architecture}); give a causal language model, such as LLaMA"
        )
    _check_shapes(role, model_config, AutoModelForCausalLM)
    return model_config


def _check_scalar_model(config: StepConfig, role: RoleFlags) -> PreTrainedConfig:
    model_config = _check_folder(config, role)
    if not _has_scalar_head(model_config) or model_config.num_labels != 1:
        architecture = (model_config.architectures or ["no architecture"])[0]
        raise InputError(
            f"{role.path_flag} {role.path}: not a reward model ({architecture}); give step 2's output folder"
        )
    _check_shapes(role, model_config, AutoModelForSequenceClassification)
    return model_config


def _other_kind(model_config: PreTrainedConfig) -> str:
    """What kind of model this is, if not a causal language model; empty for one."""
    if getattr(model_config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if model_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model_config, "is_decoder", False):
        return "an encoder"
    is_known = model_config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return "" if is_known or hasattr(model_config, "auto_map") else "not a language model"


def _check_shapes(role: RoleFlags, model_config: PreTrainedConfig, auto_class: type) -> None:
    """Compare the shapes in a local folder's weight files with those of a model built from its config.json."""
    if not Path(role.path).exists() or hasattr(model_config, "auto_map"):
        return
    label = f"{role.path_flag} {role.path}"
    try:
        with torch.device("meta"):
            model = auto_class.from_config(copy.deepcopy(model_config))
            if role.kind == "scalar" and not role.new_head:
                install_head(model)
    except Exception as error:
        raise InputError(f"{label}: config.json describes no model that can be built ({_reason(error)})") from error
    check_shapes(Path(role.path), label, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _has_scalar_head(model_config: PreTrainedConfig) -> bool:
    return (model_config.architectures or [""])[0].endswith("ForSequenceClassification")


def _check_folder(config: StepConfig, role: RoleFlags) -> PreTrainedConfig:
    model_config = load_config(role.path, role.path_flag, trust_remote_code=config.trust_remote_code)
    tokenizer = config.tokenizer_name_or_path or role.path
    if not Path(tokenizer).exists() and looks_local(tokenizer):
        raise InputError(f"--tokenizer_name_or_path {tokenizer}: no such file or folder")
    if Path(tokenizer).exists() and not has_tokenizer(tokenizer):
        raise InputError(
            f"{role.path_flag} {role.path}: no tokenizer in {tokenizer}; add its files or set --tokenizer_name_or_path"
        )
    return model_config


def _check_length(model_config: PreTrainedConfig, length: int, flags: str) -> None:
    """Refuse sequences of more tokens than the model has positions."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise InputError(f"{flags} {length}: the model has {positions} positions; lower it to {positions} or less")
