"""A dialogue as the text that a chat template writes, and where the assistant's answers lie in it.

    messages[:k] with the generation prompt    <|user|>Hi<|end|><|assistant|>
    messages[:k + 1]                           <|user|>Hi<|end|><|assistant|>Hello.<|end|>\\n
                                                                             answer: Hello.<|end|>

The first must be the beginning of the second; what follows is the answer. It ends with the first special token behind
its text, at which generation stops. If the template writes none, the answer ends with its text.

A template sees the special tokens that a user wrote ("</s>") as stand-in characters (see `hide_special`), so that in
its result every special token is one that the template wrote.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from utils.errors import InputError

ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}
# What a template raises: jinja's own errors, and those of the operations in it.
RENDERING_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
Turn = tuple[str, str]  # (speaker, text), speaker a key of ROLES
_FIRST_STAND_IN, _STAND_INS = 0xF0000, 0xFFFE  # characters for private use, which no text has in practice
_PROBE: tuple[Turn, ...] = (("Human", "question"), ("Assistant", "answer"))


class TemplateProblem(ValueError):
    """A dialogue that a template cannot write, or whose answers cannot be found. The message names the turn."""


@dataclass(frozen=True)
class Answer:
    """How an answer continues its prompt.

    Attributes:
        text: the continuation, through its end token where the template writes one.
        has_end: whether the template writes one.
    """

    text: str
    has_end: bool


class ChatTemplate:
    """The chat template of a tokenizer, applied to turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
        self._special = special_pattern(tokenizer)

    def render(self, turns: Sequence[Turn], *, asks: bool = False) -> str:
        """The text of `turns`; with `asks`, up to where the assistant's next answer begins.

        Raises:
            TemplateProblem: the template fails; names the first turn at which it does.
        """
        try:
            return self._render(turns, asks)
        except RENDERING_ERRORS as error:
            number = len(turns)
            while number > 1 and self._fails(turns[: number - 1]):
                number -= 1
            reason = " ".join(str(error).split()) or type(error).__name__
            speaker = ROLES[turns[number - 1][0]] if turns else "no"
            raise TemplateProblem(f"turn {number} ({speaker}) cannot be rendered: {reason}") from error

    def _render(self, turns: Sequence[Turn], asks: bool) -> str:
        messages = [{"role": ROLES[speaker], "content": text} for speaker, text in turns]
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self.source, tokenize=False, add_generation_prompt=asks
        )

    def _fails(self, turns: Sequence[Turn]) -> bool:
        try:
            self._render(turns, False)
        except RENDERING_ERRORS:
            return True
        return False

    def answer(self, turns: Sequence[Turn], text: str, prompt: str | None = None) -> Answer:
        """How the answer `text` continues `prompt`, the rendering of `turns` with the generation prompt.

        Raises:
            TemplateProblem: the template fails, or the text with the answer does not begin with the prompt.
        """
        prompt = self.render(turns, asks=True) if prompt is None else prompt
        whole = self.render([*turns, ("Assistant", text)])
        if not whole.startswith(prompt):
            raise TemplateProblem(
                f"the answer of turn {len(turns) + 1} cannot be found: without it the template writes "
                f"{_where_they_part(prompt, whole)}"
            )
        continuation = whole[len(prompt) :]
        place = continuation.find(text.strip())
        behind = place + len(text.strip()) if place >= 0 else 0
        if end := self._special.search(continuation, behind):
            return Answer(continuation[: end.end()], has_end=True)
        return Answer(continuation[:behind] if place >= 0 else continuation.rstrip(), has_end=False)

    def earlier_answers(self, turns: Sequence[Turn], prompt: str) -> list[tuple[int, int]]:
        """Where the assistant's answers among `turns` lie in `prompt`, their rendering: (start, end) characters.

        An assistant's turn that nobody asked for, at the beginning of a dialogue, is no answer.

        Raises:
            TemplateProblem: an answer cannot be found, because the template writes earlier turns in another way than
                last ones.
        """
        spans = []
        for index, (speaker, text) in enumerate(turns):
            if speaker != "Assistant" or not any(before == "Human" for before, _ in turns[:index]):
                continue
            start = self.render(turns[:index], asks=True)
            answer = self.answer(turns[:index], text, start)
            if not prompt.startswith(start + answer.text):
                raise TemplateProblem(
                    f"the answer of turn {index + 1} cannot be found: as an earlier turn the template writes it as "
                    f"{_where_they_part(prompt, start + answer.text)}"
                )
            spans.append((len(start), len(start) + len(answer.text)))
        return spans

    @cached_property
    def end_token(self) -> str | None:
        """The special token with which an answer ends; None if the template writes none."""
        text = self.answer(_PROBE[:1], _PROBE[1][1]).text
        ends = [match for match in self._special.finditer(text) if match.end() == len(text)]
        return ends[0].group() if ends else None

    @cached_property
    def head(self) -> str:
        """What the template writes between the generation prompt and the text of an answer."""
        text = self.answer(_PROBE[:1], _PROBE[1][1]).text
        return text[: max(text.find(_PROBE[1][1]), 0)]

    @cached_property
    def tail(self) -> str:
        """All that the template writes behind an answer."""
        whole = self.render(_PROBE)
        return whole[whole.rfind(_PROBE[1][1]) + len(_PROBE[1][1]) :]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that have a meaning of their own, with their ids."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return named | added


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Matches a special token in a text, the longest where several do."""
    tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def hide_special(
    texts: Sequence[str], special: re.Pattern, names: Sequence[str]
) -> tuple[list[str], Mapping[str, str]]:
    """`texts` with a stand-in character for each special token that they hold, and what each character stands for.

    Raises:
        InputError: the texts hold the characters for private use that are needed.
    """
    if not any(special.search(text) for text in texts):
        return list(texts), {}
    used = {character for text in texts for character in text}
    free = (chr(_FIRST_STAND_IN + i) for i in range(_STAND_INS) if chr(_FIRST_STAND_IN + i) not in used)
    try:
        stand_ins = {name: next(free) for name in names}
    except StopIteration:
        raise InputError("a dialogue uses up the characters of Unicode's private plane 15") from None
    hidden = [special.sub(lambda match: stand_ins[match.group()], text) for text in texts]
    return hidden, {character: name for name, character in stand_ins.items()}


def shown(text: str, table: Mapping[str, str]) -> str:
    """`text` with the special tokens of the user that `hide_special` replaced."""
    return text.translate(str.maketrans(dict(table))) if table else text


def _where_they_part(first: str, second: str) -> str:
    """The place at which two texts begin to differ, in both."""
    place = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    start = max(place - 20, 0)
    return f"{first[start : place + 20]!r}, with it {second[start : place + 20]!r}"
