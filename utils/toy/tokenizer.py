"""A SentencePiece tokenizer like LLaMA's, trained on the small world's text."""

import io
import os
from collections.abc import Iterable

import sentencepiece

from utils.files import atomic_path

VOCAB_SIZE = 768  # 3 control pieces, 256 bytes, and enough for every word of the world to be one piece


def train_tokenizer(texts: Iterable[str], path: str | os.PathLike, vocab_size: int = VOCAB_SIZE) -> None:
    """Train a BPE model on `texts` and write a bare `tokenizer.model` to `path`; equal texts give equal files.

    The settings are LLaMA's: BPE with byte fallback, a dummy space prefix, spaces kept as they are, no pad piece.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.getvalue())
