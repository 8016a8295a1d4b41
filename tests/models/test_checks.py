"""What is refused before any weights are read: folders, heads, lengths and tokenizers, by the flag that gave them."""

import json
from pathlib import Path

import pytest
import transformers
from tiny_models import save_causal_lm, save_reward_model

from utils.arguments import PpoConfig, RewardModelConfig, SftConfig
from utils.errors import InputError
from utils.models.checks import check_models, load_matching_tokenizer
from utils.models.lora import lora_layers
from utils.models.on_meta import build_on_meta
from utils.models.tokenizer import load_tokenizer


def sft(path, **changes) -> SftConfig:
    return SftConfig(model_name_or_path=str(path), **({"max_seq_len": 64} | changes))


def ppo(actor, critic, **changes) -> PpoConfig:
    paths = {"actor_model_name_or_path": str(actor), "critic_model_name_or_path": str(critic)}
    return PpoConfig(**paths, **({"max_prompt_seq_len": 32, "max_answer_seq_len": 32} | changes))


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    return save_causal_lm(tmp_path / "model", tiny_tokenizer)


@pytest.fixture
def critic(tiny_tokenizer, tmp_path):
    return save_reward_model(tmp_path / "critic", tiny_tokenizer)


@pytest.fixture
def reward(tiny_tokenizer, tmp_path):
    """A reward model that is not the one that the critic starts from."""
    return save_reward_model(tmp_path / "reward", tiny_tokenizer, seed=2)


def test_missing_folder_config_weights_tokenizer_are_named(folder):
    with pytest.raises(InputError, match=r"--model_name_or_path .*nowhere.*no such folder"):
        check_models(sft(folder.parent / "nowhere"))
    with pytest.raises(InputError, match=r"^--tokenizer_name_or_path \./nowhere: no such file or folder"):
        check_models(sft(folder, tokenizer_name_or_path="./nowhere"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        check_models(sft(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        check_models(sft(folder))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        check_models(sft(folder))


def test_hub_name_while_offline_says_what_to_do():
    with pytest.raises(InputError, match="download it"):
        check_models(sft("some-org/some-model"))


def test_broken_config_is_one_line(folder):
    (folder / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(InputError, match=r"config\.json cannot be used"):
        check_models(sft(folder))


def test_a_reward_model_is_not_an_actor(critic):
    with pytest.raises(InputError, match=r"--model_name_or_path .*: a reward model \(LlamaForSequenceClassification\)"):
        check_models(sft(critic))
    with pytest.raises(InputError, match=r"^--actor_model_name_or_path .*: a reward model"):
        check_models(ppo(critic, critic))


def test_a_language_model_is_not_a_critic(folder, critic):
    with pytest.raises(InputError, match=r"^--critic_model_name_or_path .*: not a reward model \(LlamaForCausalLM\)"):
        check_models(ppo(folder, folder))
    assert check_models(ppo(folder, critic))["critic"].num_labels == 1


def test_positions_are_checked(folder, critic):
    check_models(sft(folder, max_seq_len=256))
    with pytest.raises(InputError, match=r"--max_seq_len 257: the model has 256"):
        check_models(sft(folder, max_seq_len=257))
    with pytest.raises(InputError, match=r"^--max_prompt_seq_len \+ --max_answer_seq_len 257: the model has 256"):
        check_models(ppo(folder, critic, max_answer_seq_len=225))


def test_adapters_that_match_no_layer_are_refused(folder, critic):
    with pytest.raises(InputError, match="matches no linear layer"):
        check_models(ppo(folder, critic, critic_lora_dim=4, critic_lora_module_name="decoder.layers."))


def test_vocabulary_larger_than_embedding(folder, tiny_tokenizer):
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vocab_size -= 1
    with pytest.raises(InputError, match="the tokenizer has"):
        load_matching_tokenizer(sft(folder), {"model": config})
    config.vocab_size += 1
    tokenizer = load_matching_tokenizer(sft(folder, add_eot_token=True), {"model": config})
    assert len(tokenizer) == len(tiny_tokenizer) + 1


# --- one configuration for each role ---------------------------------------------------------------------------------


def test_every_role_has_the_configuration_of_its_model(folder, critic, reward):
    assert list(check_models(sft(folder))) == ["model"]
    step2 = check_models(RewardModelConfig(model_name_or_path=str(folder), max_seq_len=64))
    assert step2["model"].architectures == ["LlamaForCausalLM"]  # its head is added later
    shared = check_models(ppo(folder, critic))
    assert list(shared) == ["actor", "critic", "reference", "reward"]
    assert shared["actor"] is shared["reference"] and shared["critic"] is shared["reward"]
    own = check_models(ppo(folder, critic, reward_model_name_or_path=str(reward)))
    assert list(own) == list(shared) and own["critic"] is not own["reward"]
    for role, path in (("actor", folder), ("critic", critic), ("reference", folder), ("reward", reward)):
        assert own[role].name_or_path == str(path)
    adapters = ppo(folder, critic, actor_lora_dim=4, only_optimize_lora=True)
    assert list(check_models(adapters)) == ["actor", "critic", "reward"]  # the reference is the actor without them


def test_a_reward_model_of_its_own_is_checked_under_its_own_flag(folder, critic, reward):
    def refused(path: Path) -> str:
        with pytest.raises(InputError) as refusal:
            check_models(ppo(folder, critic, reward_model_name_or_path=str(path)))
        return str(refusal.value)

    flag = "--reward_model_name_or_path"
    assert refused(folder) == (f"{flag} {folder}: not a reward model (LlamaForCausalLM); give step 2's output folder")
    assert refused(folder.parent / "nowhere") == f"{flag} {folder.parent / 'nowhere'}: no such folder"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (reward / name).unlink()
    assert refused(reward).startswith(f"{flag} {reward}: no tokenizer in {reward}")
    (reward / "model.safetensors").unlink()
    assert refused(reward).startswith(f"{flag} {reward}: no weights")


@pytest.mark.parametrize("role", ["critic", "reward"])
def test_the_tokens_of_every_model_are_compared_with_the_actors(role, folder, critic, reward):
    plain, other_end = (
        load_tokenizer(folder, **changes) for changes in ({}, {"add_eot_token": True, "eot_token": "<|end|>"})
    )
    config = ppo(folder, critic, reward_model_name_or_path=str(reward))
    compared = {"critic": critic, "reward": reward}[role]
    models = check_models(config)
    assert len(load_matching_tokenizer(config, models)) == len(plain)
    other_end.save_pretrained(compared)
    with pytest.raises(InputError) as refusal:
        load_matching_tokenizer(config, models)
    assert str(refusal.value).startswith(
        f"--{role}_model_name_or_path {compared}: its tokenizer is not the actor's (token '<|end|>')"
    )
    plain.eos_token = "<s>"
    plain.save_pretrained(compared)
    with pytest.raises(InputError) as refusal:
        load_matching_tokenizer(config, models)
    assert str(refusal.value).startswith(
        f"--{role}_model_name_or_path {compared}: it was trained on responses that end with <s>, the actor"
    )


@pytest.mark.parametrize("role", ["actor", "critic", "reward"])
def test_no_model_may_have_fewer_embeddings_than_the_tokenizer_has_ids(role, folder, critic, reward):
    config = ppo(folder, critic, reward_model_name_or_path=str(reward))
    models = check_models(config)
    models[role].vocab_size -= 1
    with pytest.raises(InputError, match=r"the tokenizer has \d+ tokens but a model embeds"):
        load_matching_tokenizer(config, models)


def with_config(folder, **changes) -> None:
    """The folder with other values in its config.json."""
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 319}, r"lm_head.weight is 320 x 32 in model.safetensors, but 319 x 32 by config"),
        ({"hidden_size": 64}, r".* is .* in model.safetensors, but .* by config.json; the files do not"),
        ({"num_attention_heads": 5}, "config.json (cannot be used|describes no model)"),
        ({"num_attention_heads": 8}, r".*o_proj.weight is 32 x 32 in model.safetensors, but 32 x 64 by config"),
        ({"num_attention_heads": 0}, "config.json (cannot be used|describes no model)"),
        ({"hidden_size": "wide"}, "config.json (cannot be used|describes no model)"),
        ({"num_hidden_layers": "two"}, "config.json (cannot be used|describes no model)"),
        ({"rope_parameters": 7}, "config.json (cannot be used|describes no model)"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights_or_itself_is_one_line(folder, changes, message):
    with_config(folder, **changes)
    with pytest.raises(InputError, match=f"^--model_name_or_path {folder}: {message}") as error:
        check_models(sft(folder))
    assert "\n" not in str(error.value)


def test_models_of_other_kinds_are_named(tmp_path, tiny_tokenizer):
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    t5 = transformers.T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    models = {
        "an encoder-decoder": transformers.T5ForConditionalGeneration(t5),
        "an encoder": transformers.BertForMaskedLM(transformers.BertConfig(intermediate_size=64, **sizes)),
        "not a language model": transformers.ViTForImageClassification(
            transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
        ),
    }
    for number, (kind, model) in enumerate(models.items()):
        path = tmp_path / str(number)
        model.save_pretrained(path), tiny_tokenizer.save_pretrained(path)
        with pytest.raises(InputError, match=rf"^--model_name_or_path .*: {kind} \({type(model).__name__}\); give a"):
            check_models(sft(path))


def test_a_tokenizer_of_far_fewer_tokens_than_the_model(tmp_path, tiny_tokenizer, capsys):
    """Refused where a flag names it; in the model's own folder it may be on purpose."""
    for vocabulary, fits in ((600, True), (700, False)):
        path = save_causal_lm(tmp_path / str(vocabulary), tiny_tokenizer, vocab_size=vocabulary)
        config = sft(path)
        load_matching_tokenizer(config, check_models(config))
        warned = "the tokenizer has 320 tokens but a model embeds 700: is it the one" in capsys.readouterr().err
        assert warned == (not fits)
        config = sft(path, tokenizer_name_or_path=str(path))
        if fits:
            load_matching_tokenizer(config, check_models(config))
            continue
        with pytest.raises(InputError, match="the tokenizer has 320 tokens but a model embeds 700; use the tokenizer"):
            load_matching_tokenizer(config, check_models(config))


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_is_run_if_asked_for_wherever_a_model_is_built(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = save_causal_lm(tmp_path / "remote", tiny_tokenizer)
    stored = json.loads((path / "config.json").read_text()) | {"model_type": "own-llama"}
    stored["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (path / "config.json").write_text(json.dumps(stored))
    (path / "own.py").write_text(REMOTE)
    config = sft(path, trust_remote_code=True, lora_dim=4)
    models = check_models(config)  # looks for layers to adapt
    role = config.roles()["model"]
    assert type(build_on_meta(models["model"], role, "fp32").model).__name__ == "OwnForCausalLM"
    assert list(lora_layers(build_on_meta(models["model"], role, "fp32").model))
    with pytest.raises(InputError, match="contains custom code"):
        check_models(sft(path, lora_dim=4))
