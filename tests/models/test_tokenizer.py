"""Tokenizers against sentencepiece itself, and the tokens that steps hand on."""

import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from utils.errors import InputError
from utils.models.tokenizer import check_same_tokens, load_tokenizer


@pytest.fixture(scope="module")
def texts(shared_data):
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text())[:150]
    odd = [
        "",
        " ",
        "  two  spaces",
        "\n\nHuman: hi\n\nAssistant:",
        "naïve café 日本語 🙂",
        "tab\there",
        "</s> <s> <unk>x",
    ]
    return [row["output"] for row in rows] + [row["instruction"] for row in rows] + odd[:-1]


def test_bare_sentencepiece_file_gives_the_ids_of_sentencepiece(shared_data, texts):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "llama2_tokenizer.model"))
    tokenizer = load_tokenizer(shared_data / "llama2_tokenizer.model")
    different = [text for text in texts if text and tokenizer(text).input_ids != [1, *reference.encode(text)]]
    assert different == []
    assert [tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) for text in texts] == texts


def test_a_saved_tokenizer_is_the_same_tokenizer(shared_data, texts, tmp_path):
    tokenizer = load_tokenizer(shared_data / "llama2_tokenizer.model")
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert [again(text).input_ids for text in texts] == [tokenizer(text).input_ids for text in texts]
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            assert getattr(again, name) == getattr(tokenizer, name)


def test_a_folder_with_only_a_sentencepiece_model_does_not_take_the_wrong_path(shared_data, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((shared_data / "llama2_tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "pad_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer("The milk is white.").input_ids == [1, *reference.encode("The milk is white.")]
    assert tokenizer.pad_token == "</s>"


def test_eot_token_ends_responses_and_survives_saving(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "before")
    tokenizer = load_tokenizer(tmp_path / "before", add_eot_token=True, eot_token="<|end|>")
    assert tokenizer.eos_token == "<|end|>" and tokenizer.eos_token_id == len(tiny_tokenizer)
    tokenizer.save_pretrained(tmp_path / "after")
    assert load_tokenizer(tmp_path / "after").eos_token_id == tokenizer.eos_token_id


def test_actor_and_critic_must_share_their_tokens(tiny_tokenizer, tmp_path):
    plain, ended = tmp_path / "plain", tmp_path / "ended"
    tiny_tokenizer.save_pretrained(plain)
    load_tokenizer(plain, add_eot_token=True, eot_token="<|end|>").save_pretrained(ended)
    check_same_tokens(load_tokenizer(plain), plain, "--critic")
    check_same_tokens(load_tokenizer(ended), ended, "--critic")
    check_same_tokens(load_tokenizer(plain), tmp_path / "without a tokenizer", "--critic")
    with pytest.raises(InputError, match=r"^--critic: its tokenizer is not the actor's \(token '<\|end\|>'\)"):
        check_same_tokens(load_tokenizer(plain), ended, "--critic")
    with pytest.raises(InputError, match=r"responses that end with </s>, the actor ends them with <\|end\|>"):
        check_same_tokens(load_tokenizer(ended), plain, "--critic")


def test_missing_pad_becomes_unk_or_eos(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    backend["padding"] = None  # left over from the last call, which names the pad token too
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    assert load_tokenizer(tmp_path).pad_token == "</s>"


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_broken_sentencepiece_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
