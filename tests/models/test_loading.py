"""What loading refuses, before and while it reads weights."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import save_causal_lm, save_reward_model

from utils.errors import InputError
from utils.models.loading import (
    check_length,
    check_model,
    check_scalar_model,
    load_causal_lm,
    load_matching_tokenizer,
    load_scalar_model,
)
from utils.zero import zero_config

ZERO = zero_config(0, "fp32")


def flags(path, **changes):
    defaults = {
        "model_name_or_path": str(path),
        "tokenizer_name_or_path": None,
        "trust_remote_code": False,
        "add_eot_token": False,
        "eot_token": "<|endoftext|>",
    }
    return SimpleNamespace(**(defaults | changes))


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    return save_causal_lm(tmp_path / "model", tiny_tokenizer)


def test_missing_folder_config_weights_tokenizer_are_named(folder):
    with pytest.raises(InputError, match=r"--model_name_or_path .*nowhere.*no such folder"):
        check_model(flags(folder.parent / "nowhere"), "model_name_or_path")
    with pytest.raises(InputError, match=r"^--tokenizer_name_or_path \./nowhere: no such file or folder"):
        check_model(flags(folder, tokenizer_name_or_path="./nowhere"), "model_name_or_path")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        check_model(flags(folder), "model_name_or_path")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        check_model(flags(folder), "model_name_or_path")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        check_model(flags(folder), "model_name_or_path")


def test_hub_name_while_offline_says_what_to_do():
    with pytest.raises(InputError, match="download it"):
        check_model(flags("some-org/some-model"), "model_name_or_path")


def test_a_reward_model_is_not_an_actor(tiny_tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"--model_name_or_path .*: a reward model \(LlamaForSequenceClassification\)"):
        check_model(flags(save_reward_model(tmp_path, tiny_tokenizer)), "model_name_or_path")


def test_broken_config_is_one_line(folder):
    (folder / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(InputError, match=r"config\.json cannot be used"):
        check_model(flags(folder), "model_name_or_path")


def test_vocabulary_larger_than_embedding(folder, tiny_tokenizer):
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vocab_size -= 1
    with pytest.raises(InputError, match="the tokenizer has"):
        load_matching_tokenizer(flags(folder), str(folder), [config])
    config.vocab_size += 1
    assert (
        len(load_matching_tokenizer(flags(folder, add_eot_token=True), str(folder), [config]))
        == len(tiny_tokenizer) + 1
    )


def test_positions_are_checked(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    check_length(config, 256, "--max_seq_len")
    with pytest.raises(InputError, match=r"--max_seq_len 257: the model has 256"):
        check_length(config, 257, "--max_seq_len")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_the_config_are_an_error(folder, tiny_tokenizer, change):
    state = load_file(folder / "model.safetensors")
    if change == "missing":
        state.pop("model.layers.1.mlp.up_proj.weight")
    else:
        state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.\d\.mlp\.up_proj\.weight"):
        load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32")


def test_a_language_model_is_not_a_critic(folder, tiny_tokenizer, tmp_path):
    with pytest.raises(InputError, match="not a reward model"):
        check_scalar_model(flags(folder), "model_name_or_path")
    with pytest.raises(InputError, match=r"score\.weight"):
        load_scalar_model(str(folder), tiny_tokenizer, ZERO, dtype="fp32")
    check_scalar_model(flags(save_reward_model(tmp_path / "reward", tiny_tokenizer)), "model_name_or_path")


def test_new_scalar_head_has_the_stated_spread(folder, tiny_tokenizer):
    torch.manual_seed(0)
    weight = load_scalar_model(str(folder), tiny_tokenizer, ZERO, dtype="fp32", new_head=True).model.score.weight
    assert weight.shape == (1, 32)
    assert 0.6 < weight.std().item() * 33**0.5 < 1.4


def test_dropout_reaches_every_probability(tiny_tokenizer, tmp_path):
    folder = save_causal_lm(tmp_path, tiny_tokenizer, "opt")
    model = load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32", dropout=0.0)
    assert model.model.config.dropout == model.model.config.attention_dropout == 0.0
    assert load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32").model.config.dropout == 0.1


def test_added_token_grows_the_embedding_once(folder, tiny_tokenizer):
    config = flags(folder, add_eot_token=True)
    tokenizer = load_matching_tokenizer(config, str(folder), [transformers.AutoConfig.from_pretrained(folder)])
    model = load_causal_lm(str(folder), tokenizer, ZERO, dtype="fp32")
    rows = model.model.get_input_embeddings().num_embeddings
    assert rows >= len(tokenizer) and rows % 8 == 0
    assert model.model.config.eos_token_id == tokenizer.eos_token_id


def test_sampling_defaults_of_the_checkpoint_do_not_leak(folder, tiny_tokenizer):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": True}))
    generation = load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32").model.generation_config
    assert not generation.do_sample and generation.top_p in (None, 1.0) and generation.temperature in (None, 1.0)
