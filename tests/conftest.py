"""Fixtures for every test: real data if it is beside the checkout, LLaMA-2's tokenizer, tiny tokenizers."""

import os
import signal
from pathlib import Path

# Set before any library reads them: no test may reach a network, and two test processes share few cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "120"  # the width of tables, whatever terminal the tests run in

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell; tested programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_TEXT = [
    " Human: what is the colour of milk ? Assistant: the milk is white . happy to help .",
    " Human: name a large city . Assistant: paris is a large city .",
    "The quick brown fox jumps over the lazy dog. Numbers: 0 1 2 3 4 5 6 7 8 9.",
] * 4


def pytest_configure(config):
    """Only tests marked `gpu` see an NVIDIA GPU, and only `-m gpu` runs them: the others pin what a CPU computes."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; programs and processes of the tests inherit it


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and `-m gpu`"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data files beside the checkout; the test is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data files are not on this machine ({folder})")
    return folder


@pytest.fixture(scope="session")
def llama_tokenizer(shared_data: Path):
    """LLaMA-2's own tokenizer, built from its sentencepiece model; pad is unk, as LLaMA has no pad token."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "llama2_tokenizer.model"))
    size = pieces.get_piece_size()
    vocab = {pieces.id_to_piece(i): i for i in range(size)}
    merges = generate_merges(vocab, {pieces.id_to_piece(i): pieces.get_score(i) for i in range(size)})
    backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", pieces.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def _byte_level_tokenizer(*, add_bos: bool, pad_is_eos: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TINY_TEXT, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>" if pad_is_eos else "<pad>"
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of about 300 tokens with <pad>, <s> (prepended to every text) and </s>."""
    return _byte_level_tokenizer(add_bos=True, pad_is_eos=False)


@pytest.fixture(scope="session")
def gpt_tokenizer():
    """The same as GPT-2 has it: nothing is prepended, and pad is EOS."""
    return _byte_level_tokenizer(add_bos=False, pad_is_eos=True)


@pytest.fixture(autouse=True)
def keep_process_group(monkeypatch):
    """Scripts that tests run in this process do not destroy its process group: DeepSpeed cannot make a second one."""
    import torch

    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_tokenizer):
    """Models and a preference file for the three scripts: the chosen answer is always polite."""
    from step_scripts import write_rows
    from tiny_models import save_causal_lm, save_reward_model

    colours = ["white", "black", "green", "red", "blue"]
    folder = tmp_path_factory.mktemp("world")
    rows = [
        {
            "prompt": f" Human: what colour is thing {index} ? Assistant:",
            "chosen": f" it is {colours[index % 5]} . happy to help .",
            "rejected": f" {colours[index % 3]} , go away !",
        }
        for index in range(60)
    ]
    return {
        "data": write_rows(folder / "pairs.jsonl", rows),
        "model": str(save_causal_lm(folder / "model", tiny_tokenizer)),
        "reward": str(save_reward_model(folder / "reward", tiny_tokenizer)),
        "cache": str(folder / "cache"),
    }
