"""From text to token ids, with the exact place where the prompt ends and the response begins.

A prompt's ids are those that the tokenizer gives for the prompt alone: PPO's rollouts continue exactly these. A
response's ids are those of its text as a continuation, so no token straddles the boundary and decoding the two in a row
gives back both texts. The EOS id is appended to a response once, as an id: text never becomes EOS inside a response.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from utils.data.formats.example import Example
from utils.errors import InputError

Ids = list[int]

# Text put in front of a response to tokenise it as a continuation, and cut off again. The first is what most prompts
# end with ("Assistant:"). The others serve responses whose beginning merges with it, such as ")" after ":".
_ANCHORS = (":", "\n", "a", "0")


class Encoder:
    """Token ids of prompts and responses by one tokenizer.

    Attributes:
        prefix: ids that the tokenizer puts in front of every text (BOS, for LLaMA), maybe none.
        eos_id: id that ends a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no EOS token, which ends every response; set eos_token in its folder")
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self.prefix: Ids = whole[:start]
        self._suffix_length = len(whole) - start - len(plain)

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each prompt alone: the prefix, then its tokens; special tokens written in it count as such.

        The prefix appears once, also where the text begins with it ("<s> [INST] ..."). What a tokenizer appends to
        every text (an EOS, for some) is removed: the response follows.
        """
        encoded = self._encode(texts, add_special_tokens=True, split_special_tokens=False)
        return [self._with_one_prefix(ids[: len(ids) - self._suffix_length]) for ids in encoded]

    def _with_one_prefix(self, ids: Ids) -> Ids:
        length = len(self.prefix)
        while length and ids[length : 2 * length] == self.prefix:
            ids = ids[length:]
        return ids

    def responses(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text as a continuation, then EOS. Markup such as "</s>" in the text stays text.

        An end marker that the text already carries is taken off first: EOS comes once.
        """
        texts = [self.without_end_marker(text) for text in texts]
        result: list[Ids | None] = [None] * len(texts)
        for anchor in _ANCHORS:
            waiting = [i for i, ids in enumerate(result) if ids is None]
            if not waiting:
                break
            head = self._encode([anchor])[0]
            for i, ids in zip(waiting, self._encode([anchor + texts[i] for i in waiting]), strict=True):
                if ids[: len(head)] == head:
                    result[i] = ids[len(head) :]
        rest = [i for i, ids in enumerate(result) if ids is None]
        for i, ids in zip(rest, self._encode([texts[i] for i in rest]), strict=True):
            result[i] = ids
        return [[*ids, self.eos_id] for ids in result if ids is not None]

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each whole text without the prefix, then EOS."""
        return [[*ids, self.eos_id] for ids in self._encode([self.without_end_marker(text) for text in texts])]

    def spans(self, examples: Sequence[Example]) -> list[tuple[Ids, Ids]]:
        """(prompt ids, ids of `chosen` with EOS) of each example; the prompt of plain text is the prefix alone."""
        plain = iter(self.texts([example.chosen or "" for example in examples if not example.prompt]))
        asked = [example for example in examples if example.prompt]
        prompts = iter(self.prompts([example.prompt for example in asked]))
        responses = iter(self.responses([example.chosen or "" for example in asked]))
        return [
            (next(prompts), next(responses)) if example.prompt else (list(self.prefix), next(plain))
            for example in examples
        ]

    def _encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = False, split_special_tokens: bool = True
    ) -> list[Ids]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def without_end_marker(self, text: str) -> str:
        """`text` without the EOS markup that its author wrote at its end."""
        marker = self.tokenizer.eos_token
        while text.rstrip().endswith(marker):
            text = text.rstrip().removesuffix(marker)
        return text


def truncate_prompt(prompt: Ids, length: int, prefix_length: int) -> Ids:
    """At most `length` ids: the prefix (BOS) and the prompt's end, where the question and the answer marker are."""
    if len(prompt) <= length:
        return prompt
    tail = max(length - prefix_length, 0)
    return prompt[:prefix_length] + (prompt[-tail:] if tail else [])


def fit(prompt: Ids, responses: Sequence[Ids], max_seq_len: int, prefix_length: int) -> tuple[Ids, list[Ids]]:
    """Make the prompt and each response fit into `max_seq_len` ids together.

    The prompt is cut first, on its left, down to half the length; then a response that is still too long is cut on
    its right and so ends without EOS. Two responses to one prompt get the same prompt.
    """
    longest = max(map(len, responses))
    prompt = truncate_prompt(prompt, max(max_seq_len - longest, max_seq_len // 2), prefix_length)
    return prompt, [response[: max_seq_len - len(prompt)] for response in responses]


def chunk_text(prefix: Ids, ids: Ids, max_seq_len: int) -> Iterator[tuple[Ids, Ids]]:
    """(prefix, ids) rows of at most `max_seq_len` that cover a text of any length; EOS, its last id, stays last."""
    size = max_seq_len - len(prefix)
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        if len(chunk) > 1 or start == 0:
            yield list(prefix), chunk


def pack_blocks(spans: Iterable[tuple[Ids, Ids]], block_size: int) -> Iterator[Ids]:
    """Texts one after another, each with prefix and EOS, cut into blocks of `block_size`; the last may be shorter."""
    buffer: Ids = []
    for prompt, response in spans:
        buffer += prompt + response
        while len(buffer) >= block_size:
            yield buffer[:block_size]
            del buffer[:block_size]
    if len(buffer) > 1:
        yield buffer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes whenever the ids of some text may: vocabulary, merges, normalisation, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # State left behind by the last call, not part of the tokenizer itself.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    content["eos_token_id"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
