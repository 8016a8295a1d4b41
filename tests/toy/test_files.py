"""The world on disk: the same bytes for the same seed, readable by the ordinary loaders, a model that loads."""

import json

import pytest
import sentencepiece
from transformers import AutoModelForCausalLM

from utils.data import Corpus, build_datasets
from utils.models.tokenizer import load_tokenizer
from utils.toy.files import WorldSizes, write_world
from utils.toy.tokenizer import VOCAB_SIZE
from utils.toy.world import make_questions

SIZES = WorldSizes(pretraining=400, sft=400, preference=60, held_out=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), 7, SIZES)


def contents(files):
    folder = files.random_model.parent
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes(world, tmp_path):
    assert contents(write_world(tmp_path / "again", 7, SIZES)) == contents(world)
    other = contents(write_world(tmp_path / "other", 8, SIZES))
    assert all(other[path] != content for path, content in contents(world).items() if path.suffix == ".jsonl")


def test_writing_over_an_older_world(world, tmp_path):
    write_world(tmp_path, 8, SIZES)
    assert contents(write_world(tmp_path, 7, SIZES)) == contents(world)


def test_the_model_is_a_tiny_llama_that_knows_its_vocabulary(world):
    model = AutoModelForCausalLM.from_pretrained(world.random_model)
    assert 850_000 < model.num_parameters() < 950_000
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == VOCAB_SIZE


def test_the_tokenizer_loads_and_agrees_with_sentencepiece(world):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(world.random_model / "tokenizer.model"))
    tokenizer = load_tokenizer(str(world.random_model))
    assert len(pieces) == VOCAB_SIZE and len(tokenizer) <= VOCAB_SIZE
    for name in ("sft", "preference"):
        for line in (getattr(world, name) / "train.jsonl").read_text().splitlines():
            for text in json.loads(line).values():
                assert tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]


@pytest.mark.parametrize(
    ("folder", "purpose", "length"),
    [("pretraining", "sft", 128), ("sft", "sft", 128), ("preference", "preference", 128), ("prompts", "prompts", 64)],
)
def test_the_ordinary_loaders_read_every_row(world, folder, purpose, length, tmp_path):
    phases = {"sft": "1,0,0", "preference": "0,1,0", "prompts": "0,0,1"}
    corpus = Corpus(
        purpose=purpose,
        paths=[str(getattr(world, folder))],
        data_split=phases[purpose],
        max_len=length,
        seed=1,
        cache_dir=str(tmp_path),
    )
    corpus.check()
    train, held_out = build_datasets(corpus, load_tokenizer(str(world.random_model)))
    training, asked_only_at_the_end = make_questions(7)
    prompts = (len(training), len(asked_only_at_the_end))
    expected = prompts if folder == "prompts" else (getattr(SIZES, folder), SIZES.held_out)
    assert (len(train), len(held_out)) == expected
