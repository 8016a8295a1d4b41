"""Token ids of rendered dialogues: those of `apply_chat_template(tokenize=True)`, but what a user wrote stays text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from utils.chat_templates.rendering import shown, special_tokens
from utils.errors import InputError

_ANCHORS = (":", "\n", "a", "0")  # in front of a text that is tokenised as a continuation


@dataclass(frozen=True)
class Tokens:
    """The ids of a text, and the character at which each begins."""

    ids: list[int]
    starts: list[int]

    def within(self, start: int, end: int) -> tuple[int, int]:
        """The first token of the characters from `start` to `end`, and the first behind them."""
        first = next((i for i, place in enumerate(self.starts) if place >= start), len(self.ids))
        return first, next((i for i, place in enumerate(self.starts) if i >= first and place >= end), len(self.ids))


class TemplateTokenizer:
    """Tokenises texts that a template wrote, in which stand-ins (`hide_special`) replace a user's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                "a chat template needs a fast tokenizer (tokenizer.json), which says where each token begins; convert "
                "the tokenizer, or use --chat_template human_assistant"
            )
        self._tokenizer = tokenizer
        self._special = set(special_tokens(tokenizer).values())

    def __call__(self, texts: Sequence[str], tables: Sequence[Mapping[str, str]]) -> list[Tokens]:
        """The tokens of each text, whose stand-ins mean what its table says."""
        whole = self._encode(texts, split_special=False)
        return [
            self._with_plain_text(tokens, text, table) if any(character in text for character in table) else tokens
            for tokens, text, table in zip(whole, texts, tables, strict=True)
        ]

    def continued(self, text: str, table: Mapping[str, str]) -> list[int]:
        """The ids of `text` as the continuation of another text."""
        for anchor in _ANCHORS:
            (head,) = self._encode([anchor], split_special=False)
            (both,) = self([anchor + text], [table])
            if both.ids[: len(head.ids)] == head.ids and (both.starts + [1])[len(head.ids)] >= len(anchor):
                return both.ids[len(head.ids) :]
        return self([text], [table])[0].ids

    def _with_plain_text(self, tokens: Tokens, text: str, table: Mapping[str, str]) -> Tokens:
        """`tokens`, with those of each stretch between special tokens that has stand-ins replaced by its own text's."""
        ids: list[int] = []
        starts: list[int] = []
        place, bounds = 0, [*tokens.starts, len(text)]
        for is_special, group in groupby(range(len(tokens.ids)), lambda i: tokens.ids[i] in self._special):
            run = list(group)
            if is_special:
                ids += [tokens.ids[i] for i in run]
                starts += [tokens.starts[i] for i in run]
                continue
            place, end = bounds[run[0]], bounds[run[-1] + 1]
            stretch, own = text[place:end], [tokens.ids[i] for i in run]
            if not any(character in stretch for character in table):
                ids += own
                starts += [tokens.starts[i] for i in run]
                continue
            alone = self._encode([stretch], split_special=True)[0].ids == own
            real = shown(stretch, table)
            places = [i for i, character in enumerate(stretch) for _ in table.get(character, character)]
            replaced = self._alone(real) if alone else self._behind(real)
            ids += replaced.ids
            starts += [place + (places[start] if start < len(places) else len(stretch)) for start in replaced.starts]
        return Tokens(ids, starts)

    def _alone(self, text: str) -> Tokens:
        return self._encode([text], split_special=True)[0]

    def _behind(self, text: str) -> Tokens:
        """The tokens of `text` behind another text, of plain text only."""
        for anchor in _ANCHORS:
            head, both = self._encode([anchor, anchor + text], split_special=True)
            if both.ids[: len(head.ids)] == head.ids:
                rest = len(head.ids)
                return Tokens(both.ids[rest:], [start - len(anchor) for start in both.starts[rest:]])
        return self._alone(text)

    def _encode(self, texts: Sequence[str], *, split_special: bool) -> list[Tokens]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_special,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            Tokens(ids, [start for start, _ in offsets])
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
