"""Token ids of examples in the form that their tokenizer asks for: its chat template, or the text form without one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from transformers import PreTrainedTokenizerBase

from utils.chat_templates.rendering import (
    ChatTemplate,
    TemplateProblem,
    hide_special,
    shown,
    special_pattern,
    special_tokens,
)
from utils.chat_templates.tokens import TemplateTokenizer
from utils.data.formats.dialogue import DEFAULT_FORM, FORMS, as_turns, earlier_answers, rendered, with_system
from utils.data.formats.example import Example
from utils.data.rows.tokenization import Encoder, Ids
from utils.errors import InputError

ANSWERS = ("chosen", "rejected")
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A prompt and its answers as token ids.

    Attributes:
        text: what the prompt's ids mean.
        prefix: how many ids at the beginning of the prompt stay when it is cut (BOS).
        answers: the ids of each answer that was asked for, with the token that ends it.
        earlier: where the assistant's earlier answers lie in the prompt, each (start, end); only if they are trained.
        form: what the prompt is: "template" or "turns", a dialogue in a chat template or in the text form; "text", a
            finished prompt; "plain", the prefix alone in front of a text to be learned as a whole.
    """

    text: str
    prompt: Ids
    prefix: int
    answers: dict[str, Ids]
    earlier: list[Span] = field(default_factory=list)
    form: Literal["template", "turns", "text", "plain"] = "text"

    @property
    def is_dialogue(self) -> bool:
        """Whether the prompt was given as turns."""
        return self.form in ("template", "turns")


class CannotRender(Exception):
    """A dialogue of a published set that the chat template cannot write. The message is the reason, without the row."""


class ExampleEncoder:
    """Encodes examples, whose prompts are dialogues or text.

    Args:
        system_prompt: for dialogues without one. train_on: "all" also finds the assistant's earlier answers.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str | None = None, train_on: str = "last"
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = Encoder(tokenizer)
        self.template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        self.system_prompt, self._finds_earlier = system_prompt, train_on == "all"

    @property
    def prefix(self) -> Ids:
        """Ids that the tokenizer puts in front of every text."""
        return self.texts.prefix

    @property
    def eos_id(self) -> int:
        """The id at which generation stops."""
        return self.texts.eos_id

    @cached_property
    def special_ids(self) -> set[int]:
        """The ids of special tokens."""
        return set(special_tokens(self.tokenizer).values())

    def __call__(self, examples: Sequence[Example], names: Sequence[str] = ("chosen",)) -> list[Encoded | CannotRender]:
        """Each example with those of its answers `names` that it has, in order.

        For a dialogue of a published set that the chat template cannot write, the result is the reason.

        Raises:
            InputError: another dialogue that the template cannot write, or whose answers cannot be found in what it
                writes. The message names the row and the turn.
        """
        if self.template is None:
            settled = [with_system(example, self.system_prompt) for example in examples]
        else:
            settled = [as_turns(example, self.system_prompt) for example in examples]
        as_dialogues = [
            i for i, example in enumerate(settled) if self.template is not None and not isinstance(example.prompt, str)
        ]
        as_text = sorted(set(range(len(settled))) - set(as_dialogues))
        found: dict[int, Encoded | CannotRender] = {}
        found |= zip(as_text, self._encode_texts([settled[i] for i in as_text], names), strict=True)
        if as_dialogues:
            found |= zip(as_dialogues, self._encode_dialogues([settled[i] for i in as_dialogues], names), strict=True)
        return [found[i] for i in range(len(settled))]

    def _encode_texts(self, examples: Sequence[Example], names: Sequence[str]) -> list[Encoded]:
        texts = [rendered(example, FORMS[DEFAULT_FORM]) for example in examples]
        asked = [example for example in texts if example.prompt]
        prompts = iter(self.texts.prompts([example.prompt for example in asked]))
        given = {name: [text for example in asked if (text := getattr(example, name)) is not None] for name in names}
        answers = {name: iter(self.texts.responses(given[name])) for name in names}
        plain = iter(self.texts.texts([example.chosen or "" for example in texts if not example.prompt]))
        result, kept = [], len(self.prefix)
        for example, text in zip(examples, texts, strict=True):
            if not text.prompt:
                result.append(Encoded("", list(self.prefix), kept, {"chosen": next(plain)}, form="plain"))
                continue
            prompt = next(prompts)
            own = {name: next(answers[name]) for name in names if getattr(text, name) is not None}
            earlier = self._spans(text.prompt, prompt, earlier_answers(example)) if self._finds_earlier else []
            form = "text" if isinstance(example.prompt, str) else "turns"
            result.append(Encoded(text.prompt, prompt, kept, own, earlier, form))
        return result

    def _spans(self, text: str, ids: Ids, places: Sequence[Span]) -> list[Span]:
        """The tokens of `ids`, those of the prompt `text`, that lie within each of the (start, end) characters."""
        if not places:
            return []
        tokens = TemplateTokenizer(self.tokenizer)([text], [{}])[0]
        if len(tokens.ids) > len(ids) or ids[len(ids) - len(tokens.ids) :] != tokens.ids:
            return []  # BOS was written in the text, and stands in front of it already
        before = len(ids) - len(tokens.ids)
        spans = (tokens.within(start, end) for start, end in places)
        return [(before + start, before + end) for start, end in spans]

    def _encode_dialogues(self, examples: Sequence[Example], names: Sequence[str]) -> list[Encoded | CannotRender]:
        layouts = [self._layout(example, names) for example in examples]
        texts, tables = [], []
        for layout in layouts:
            if isinstance(layout, _Layout):
                texts += [layout.prompt, *(layout.prompt + text for text, _ in layout.answers.values())]
                tables += [layout.table] * (1 + len(layout.answers))
        tokens = iter(self._tokenize(texts, tables))
        result: list[Encoded | CannotRender] = []
        for layout in layouts:
            if isinstance(layout, CannotRender):
                result.append(layout)
                continue
            prompt, answers = next(tokens), {}
            for name, (text, has_end) in layout.answers.items():
                whole, length = next(tokens), len(prompt.ids)
                begins_alike = whole.ids[:length] == prompt.ids and (
                    length == len(whole.ids) or whole.starts[length] >= len(layout.prompt)
                )
                # A token that would hold the end of the prompt and the beginning of the answer is not made: a rollout
                # continues the ids of the prompt alone.
                ids = whole.ids[length:] if begins_alike else self._tokenize.continued(text, layout.table)
                answers[name] = ids if has_end else [*ids, self.eos_id]
            earlier = [prompt.within(start, end) for start, end in layout.earlier]
            text = shown(layout.prompt, layout.table)
            kept = self._kept(prompt.ids)
            result.append(Encoded(text, prompt.ids, kept, answers, earlier, "template"))
        return result

    def _layout(self, example: Example, names: Sequence[str]) -> "_Layout | CannotRender":
        given = {name: text for name in names if (text := getattr(example, name)) is not None}
        own = {name: self.texts.without_end_marker(text) for name, text in given.items()}
        texts = [*(text for _, text in example.prompt), *own.values()]
        hidden, table = hide_special(texts, self._special, self._special_names)
        turns = [(speaker, text) for (speaker, _), text in zip(example.prompt, hidden)]
        try:
            prompt = self.template.render(turns, asks=True)
            answers = {}
            for name, text in zip(own, hidden[len(turns) :], strict=True):
                answer = self.template.answer(turns, text, prompt)
                answers[name] = (answer.text, answer.has_end)
            earlier = self.template.earlier_answers(turns, prompt) if self._finds_earlier else []
        except TemplateProblem as problem:
            if example.published:
                return CannotRender(str(problem))
            where = f"{example.where}: " if example.where else ""
            raise InputError(f"{where}the chat template does not suit this dialogue: {problem}") from problem
        return _Layout(prompt, answers, earlier, table)

    def _kept(self, ids: Ids) -> int:
        bos = self.tokenizer.bos_token_id
        return 1 if ids and bos is not None and ids[0] == bos else 0

    @cached_property
    def _special(self) -> re.Pattern:
        return special_pattern(self.tokenizer)

    @cached_property
    def _special_names(self) -> list[str]:
        return list(special_tokens(self.tokenizer))

    @cached_property
    def _tokenize(self) -> TemplateTokenizer:
        return TemplateTokenizer(self.tokenizer)


@dataclass(frozen=True)
class _Layout:
    """A dialogue as the template writes it: the answers' continuations, and where earlier answers lie, in characters.

    `table`: what the stand-in characters of the texts mean.
    """

    prompt: str
    answers: dict[str, tuple[str, bool]]
    earlier: list[Span]
    table: dict[str, str]
