"""Models from a folder (or a hub name): checked before anything is loaded, whole or already split by ZeRO-3."""

import contextlib
import json
import math
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from utils.errors import InputError
from utils.hub import is_reachable, offline
from utils.models.causal_lm import CausalLM
from utils.models.scalar_head import ScalarHeadModel
from utils.models.tokenizer import has_tokenizer, load_tokenizer
from utils.models.weight_files import check_weight_files
from utils.zero import TORCH_DTYPES, gathered, sharded_loading

HEAD_WEIGHT = "score.weight"


def load_config(
    path: str, flag: str, *, trust_remote_code: bool = False, needs_weights: bool = True
) -> PreTrainedConfig:
    """The `config.json` of a model, read without its weights.

    Raises:
        InputError: naming `flag`: no such folder, no config or no whole weights in it, or a hub name that cannot be
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
    elif _looks_local(path):
        raise InputError(f"{flag} {path}: no such folder")
    reachable = folder.exists() or is_reachable()
    try:
        with contextlib.nullcontext() if reachable else offline():
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        if folder.exists():
            raise InputError(f"{flag} {path}: config.json cannot be used ({reason})") from error
        raise InputError(
            f"{flag} {path}: neither a local folder nor a model that the hub gives ({reason}); "
            "download it on a connected machine and pass the folder"
        ) from error


def _looks_local(path: str) -> bool:
    """Whether a path that is not there was meant as one: the hub's names have at most one slash, inside."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def check_model(config, name: str) -> PreTrainedConfig:
    """Config of the language model that the flag `name` of `config` gives, after a look at its weights and tokenizer.

    Raises:
        InputError: naming the flag and what is missing, or that it is a reward model, which cannot write.
    """
    model_config = _check_folder(config, name)
    if _has_scalar_head(model_config):
        raise InputError(
            f"--{name} {getattr(config, name)}: a reward model ({model_config.architectures[0]}); give a language "
            "model, such as step 1's output folder"
        )
    return model_config


def _has_scalar_head(model_config: PreTrainedConfig) -> bool:
    return (model_config.architectures or [""])[0].endswith("ForSequenceClassification")


def _check_folder(config, name: str) -> PreTrainedConfig:
    path = getattr(config, name)
    model_config = load_config(path, f"--{name}", trust_remote_code=config.trust_remote_code)
    tokenizer = config.tokenizer_name_or_path or path
    if not Path(tokenizer).exists() and _looks_local(tokenizer):
        raise InputError(f"--tokenizer_name_or_path {tokenizer}: no such file or folder")
    if Path(tokenizer).exists() and not has_tokenizer(tokenizer):
        raise InputError(f"--{name} {path}: no tokenizer in {tokenizer}; add its files or set --tokenizer_name_or_path")
    return model_config


def load_matching_tokenizer(config, model_path: str, model_configs: list[PreTrainedConfig]) -> PreTrainedTokenizerBase:
    """The tokenizer that the flags of `config` ask for, the model's own unless they name another.

    Raises:
        InputError: it has ids that one of the models has no embedding for (`--add_eot_token` may add one row).
    """
    path = config.tokenizer_name_or_path or model_path
    tokenizer = load_tokenizer(
        path, add_eot_token=config.add_eot_token, eot_token=config.eot_token, trust_remote_code=config.trust_remote_code
    )
    for model_config in model_configs:
        excess = len(tokenizer) - model_config.vocab_size
        if excess > int(config.add_eot_token):
            raise InputError(
                f"{path}: the tokenizer has {len(tokenizer)} tokens but a model embeds {model_config.vocab_size}; "
                "use the tokenizer that the model was trained with (--tokenizer_name_or_path)"
            )
    return tokenizer


def check_length(config: PreTrainedConfig, length: int, flags: str) -> None:
    """Raise InputError when sequences of `length` tokens have more positions than the model was built for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise InputError(f"{flags} {length}: the model has {positions} positions; lower it to {positions} or less")


def check_scalar_model(config, name: str) -> PreTrainedConfig:
    """`check_model` for a flag that must give a model with a scalar head, as step 2 writes it."""
    model_config = _check_folder(config, name)
    if not _has_scalar_head(model_config) or model_config.num_labels != 1:
        architecture = (model_config.architectures or ["no architecture"])[0]
        raise InputError(
            f"--{name} {getattr(config, name)}: not a reward model ({architecture}); give step 2's output folder"
        )
    return model_config


def set_dropout(config: PreTrainedConfig, dropout: float | None) -> None:
    """Set every dropout probability that the architecture's config knows; None keeps the model's own."""
    if dropout is None:
        return
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, dropout)


def _from_pretrained(
    auto_class, path: str, config: PreTrainedConfig, zero_config: dict, dtype: str, trust_remote_code: bool
):
    with sharded_loading(zero_config):
        model, report = auto_class.from_pretrained(
            path,
            config=config,
            dtype=TORCH_DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


def _refuse_key_mismatch(path: str, missing: set[str], unexpected: set[str]) -> None:
    for what, names in (("lack", missing), ("hold unknown", unexpected)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"{path}: the weights {what} {listed}; the file does not belong to its config.json")


def _carry_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad, bos and eos ids of the tokenizer go into the model's configs, and its sampling defaults out of the way."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.config.use_cache = True
    if hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig(**ids)


def _grow_embedding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows for tokens that `--add_eot_token` added, started from the mean of the others, to a multiple of 8."""
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8), mean_resizing=True)


def load_causal_lm(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    zero_config: dict,
    *,
    dtype: str,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> CausalLM:
    """A causal language model with exactly the weights of `path`, wrapped.

    Args:
        zero_config: from `zero.zero_config`; at stage 3 every rank receives only its part of the weights.

    Raises:
        InputError: weights are missing from the file or left over in it.
    """
    config = load_config(path, "--model_name_or_path", trust_remote_code=trust_remote_code)
    set_dropout(config, dropout)
    model, missing, unexpected = _from_pretrained(
        AutoModelForCausalLM, path, config, zero_config, dtype, trust_remote_code
    )
    _refuse_key_mismatch(path, missing, unexpected)
    _grow_embedding(model, tokenizer)
    _carry_tokens(model, tokenizer)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return CausalLM(model)


def load_scalar_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    zero_config: dict,
    *,
    dtype: str,
    new_head: bool = False,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> ScalarHeadModel:
    """A model with a scalar head, wrapped.

    Args:
        new_head: `path` is a causal LM whose vocabulary head is dropped; the scalar head starts from a normal
            distribution with standard deviation 1 / sqrt(H + 1) (Stiennon et al. 2020). Otherwise `path` is a model
            that step 2 or 3 wrote, and its head must be there.

    Raises:
        InputError: weights are missing from the file or left over in it.
    """
    config = load_config(path, "--model_name_or_path", trust_remote_code=trust_remote_code)
    set_dropout(config, dropout)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    model, missing, unexpected = _from_pretrained(
        AutoModelForSequenceClassification, path, config, zero_config, dtype, trust_remote_code
    )
    if new_head:
        missing.discard(HEAD_WEIGHT)
        unexpected -= {"lm_head.weight", "lm_head.bias", "embed_out.weight"}
    _refuse_key_mismatch(path, missing, unexpected)
    if new_head:
        weight = model.score.weight
        with gathered([weight], write=True), torch.no_grad():
            weight.normal_(0.0, 1 / math.sqrt(model.score.in_features + 1))
    _grow_embedding(model, tokenizer)
    _carry_tokens(model, tokenizer)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return ScalarHeadModel(model)
