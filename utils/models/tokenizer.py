"""Tokenizers from a Hugging Face folder or from LLaMA's bare sentencepiece `tokenizer.model`."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from utils.errors import InputError
from utils.parallel import distributed

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE_FILE, "vocab.json", "tokenizer_config.json")


def has_tokenizer(path: str | Path) -> bool:
    """True for a sentencepiece file or a folder that holds a tokenizer."""
    path = Path(path)
    return path.suffix == ".model" and path.is_file() or any((path / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(
    path: str | Path, *, add_eot_token: bool = False, eot_token: str = "<|endoftext|>", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of `path`, with a pad token and the token that ends a response as its `eos_token`.

    A folder whose only vocabulary is a sentencepiece `tokenizer.model` (as in LLaMA's original releases), or such a
    file itself, is converted here: `LlamaTokenizer.from_pretrained` of transformers 5 misreads it without an error.
    The pad token is the model's own, else `<unk>`, else `eos`: masks come from lengths, so sharing an id is harmless.

    Args:
        add_eot_token: make `eot_token` the end of a response (added to the vocabulary where it is missing).

    Raises:
        InputError: no tokenizer there, or it has no end-of-sequence token.
    """
    path = Path(path)
    bare = path if path.is_file() else path / SENTENCEPIECE_FILE
    if path.is_file() or (bare.is_file() and not (path / "tokenizer.json").is_file()):
        tokenizer = _from_sentencepiece(bare, _read_special_tokens(bare.parent))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{path}: no usable tokenizer there ({_first_line(error)}); set --tokenizer_name_or_path"
            ) from error
    if add_eot_token:
        if eot_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [eot_token]})
        tokenizer.eos_token = eot_token
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no end-of-sequence token; add --add_eot_token --eot_token TOKEN")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, folder: str | Path, label: str, *, trust_remote_code: bool = False
) -> None:
    """Raise InputError when the model in `folder` was trained with a different tokenizer.

    Every token of its vocabulary must have the same id, and responses must end with the same token. Another chat
    template gets a warning: the model has seen dialogues of another form. A model without tokenizer files, or one on
    the hub, is not checked. `label`, the flag and its value, begins the message.
    """
    if not has_tokenizer(folder):
        return
    other, vocabulary = load_tokenizer(folder, trust_remote_code=trust_remote_code), tokenizer.get_vocab()
    different = [token for token, index in other.get_vocab().items() if vocabulary.get(token) != index]
    if different:
        raise InputError(
            f"{label}: its tokenizer is not the actor's (token {different[0]!r}); train both models with the same one"
        )
    if other.eos_token != tokenizer.eos_token:
        raise InputError(
            f"{label}: it was trained on responses that end with {other.eos_token}, the actor ends them with "
            f"{tokenizer.eos_token}; use --add_eot_token and --chat_template in every step or in none"
        )
    if other.chat_template != tokenizer.chat_template:
        distributed.warn(f"{label}: its tokenizer has another chat template than the one that dialogues are written in")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that JSON files in `folder` define for its sentencepiece model."""
    stated = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
                value = content.get(key)
                stated[key] = value.get("content") if isinstance(value, dict) else value or stated.get(key)
    return {key: value for key, value in stated.items() if value}


def _from_sentencepiece(file: Path, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """LLaMA's tokenizer from its sentencepiece BPE model, giving the same tokens as sentencepiece itself."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers.tokenization_utils_base import generate_merges

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(str(file))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{file}: not a sentencepiece model ({_first_line(error)})") from error
    pieces = [model.IdToPiece(index) for index in range(model.GetPieceSize())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    scores = {piece: model.GetScore(index) for index, piece in enumerate(pieces)}
    unknown, begin, end = model.IdToPiece(model.unk_id()), "<s>", "</s>"
    byte_fallback = any(model.IsByte(index) for index in range(len(pieces)))
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            generate_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    controls = [
        AddedToken(piece, special=True, normalized=False) for piece in (unknown, begin, end) if piece in vocabulary
    ]
    tokenizer.add_special_tokens(controls)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
    )
    tokens = {"unk_token": unknown, "bos_token": begin, "eos_token": end} | special_tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)
