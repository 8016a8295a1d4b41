"""Dialogues as turns, and the one place where they are rendered as text.

The text form is `" Human: " + question + " Assistant:"`, answered by `" " + answer`. A chat template, where the
tokenizer has one, takes its place when rows are tokenised (`utils.data.rows.encoding`).
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from utils.data.formats.example import Example, PromptForm, Turn

SPEAKERS = {
    "system": "System",
    "human": "Human",
    "user": "Human",
    "prompter": "Human",
    "gpt": "Assistant",
    "assistant": "Assistant",
    "bot": "Assistant",
    "chatgpt": "Assistant",
    "model": "Assistant",
}

# Answer markers, with which a prompt ends when its author has already put one there: "... Assistant:", "TL;DR:",
# "[/INST]", "<|assistant|>", "<|im_start|>assistant". Ordinary questions may have such endings too.
_MARKER = re.compile(r"(?::|\]|>\s*(?:assistant|model)?)\s*\Z", re.IGNORECASE)
_CERTAIN_MARKER = re.compile(
    r"(?:\b(?:assistant|answer|response|summary|tl;dr):|\[/INST\]"
    r"|<\|?[\w ]*assistant[\w ]*\|?>|>\s*(?:assistant|model))\s*\Z",
    re.IGNORECASE,
)
_OWN_MARKER = "Assistant:"
LEAST_ALIKE = 5  # prompts that must end alike for their ending to count as a marker
_MARKER_AFTER_BLANK_LINE = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_MARKER_ANYWHERE = re.compile(r"(?:\A|\s)(Human|Assistant):")


class DialogueForm(Protocol):
    """How turns become the text that a model reads."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The turns so far, up to where the assistant's next answer begins."""
        ...

    def response(self, answer: str) -> str:
        """The assistant's answer as it follows the prompt."""
        ...


class HumanAssistant:
    """`" Human: question Assistant:"`, then `" answer"`: DeepSpeed-Chat's form, in which all its data sets are."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        return "".join(f" {speaker}: {text.strip()}" for speaker, text in turns) + " Assistant:"

    def response(self, answer: str) -> str:
        return " " + answer.strip()


FORMS: dict[str, DialogueForm] = {"human_assistant": HumanAssistant()}
DEFAULT_FORM = "human_assistant"


def rendered(example: Example, form: DialogueForm) -> Example:
    """`example` with its prompt and answers as the text that the model reads; unchanged if its prompt is text."""
    if isinstance(example.prompt, str):
        return example
    answers = {
        name: form.response(answer) for name in ("chosen", "rejected") if (answer := getattr(example, name)) is not None
    }
    return replace(example, prompt=form.prompt(example.prompt), **answers)


def earlier_answers(example: Example) -> list[tuple[int, int]]:
    """Where the assistant's earlier answers lie in the text form of the prompt: (start, end) characters.

    An answer begins behind the colon of its "Assistant:" and ends with its text: this form has no end token.
    """
    is_text = isinstance(example.prompt, str)
    turns = (example.parsed or ()) if is_text else example.prompt
    text = example.prompt if is_text else FORMS[DEFAULT_FORM].prompt(turns)
    spans, place, was_asked = [], 0, False
    for speaker, content in turns:
        content = content.strip()
        start = text.find(content, place)
        if start < 0:  # turns of one speaker that `turns_of` joined
            return []
        place = start + len(content)
        if speaker == "Assistant" and was_asked and content:
            spans.append((text.rfind(":", 0, start) + 1, place))
        was_asked = was_asked or speaker == "Human"
    return spans


def prompt_number(example: Example) -> int:
    """An int64 that is equal for equal prompts, in whichever format; for plain text, for equal texts."""
    prompt = rendered(example, FORMS[DEFAULT_FORM]).prompt.strip()
    text = f"prompt {prompt}" if prompt else f"text {example.chosen}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def asked(question: str, chosen: str | None = None, rejected: str | None = None) -> Example:
    """A dialogue of one question, with answers."""
    return answered([("Human", question)], chosen, rejected)


def answered(turns: Sequence[Turn], chosen: str | None = None, rejected: str | None = None) -> Example:
    """A dialogue with answers to its last turn."""
    answers = (None if text is None else text.strip() for text in (chosen, rejected))
    return Example(tuple((speaker, text.strip()) for speaker, text in turns), *answers)


def raw(prompt: str, chosen: str | None = None, rejected: str | None = None) -> Example:
    """The text of a prompt that already ends with an answer marker, and its continuations.

    They are used unchanged, except that a space is inserted after a colon if the continuation does not begin with white
    space, so that "Assistant:" is never followed directly by "Yes".
    """
    apart = prompt.endswith(":")
    answers = (
        " " + text if text is not None and apart and not text[:1].isspace() else text for text in (chosen, rejected)
    )
    return Example(prompt, *answers)


def undecided(prompt: str, chosen: str | None = None, rejected: str | None = None) -> Example:
    """The text of a prompt, with answers: its data set decides if it is a bare question or a finished prompt."""
    return Example(prompt, chosen, rejected, is_undecided=True)


def settled(example: Example, form: PromptForm) -> Example:
    """`example`, if it is undecided, as "dialogue" or "raw" text."""
    if not example.is_undecided:
        return example
    make = raw if form == "raw" else asked
    made = make(example.prompt, example.chosen, example.rejected)
    parsed = turns_of(example.prompt) if form == "dialogue" and has_own_marker(example.prompt) else None
    ranked = tuple((make(example.prompt, text).chosen, score) for text, score in example.ranked)
    answers = {"chosen": made.chosen, "rejected": made.rejected, "ranked": ranked}
    return replace(example, prompt=made.prompt, is_undecided=False, parsed=parsed, **answers)


def form_of(prompts: Sequence[str]) -> PromptForm:
    """What the first prompts of a data set are: "raw" text if all end with an answer marker.

    That is an unambiguous one ("Assistant:", "[/INST]", ...), or an ending such as "Q:" or "]" that all prompts share.
    Otherwise they are questions, whatever some of them end with ("Sort the list [3,1,2]").
    """
    if not prompts:
        return "dialogue"
    if all(_CERTAIN_MARKER.search(prompt) for prompt in prompts):
        return "raw"
    endings = {prompt.split()[-1] for prompt in prompts}
    alike = len(endings) == 1 and len(prompts) >= LEAST_ALIKE
    return "raw" if alike and _MARKER.search(prompts[0]) else "dialogue"


def has_own_marker(prompt: str) -> bool:
    """Whether the text ends with "Assistant:", as a prompt in the project's text form does."""
    return prompt.rstrip().endswith(_OWN_MARKER)


def turns_of(prompt: str) -> tuple[Turn, ...] | None:
    """The turns of a prompt that is the text of a dialogue up to its last "Assistant:"; None if it is no such text.

    Turns of one speaker that follow each other are one turn: a marker inside a turn looks like the next one's.
    """
    turns = parse_dialogue(prompt)
    if not turns or turns[-1] != ("Assistant", "") or not any(speaker == "Human" for speaker, _ in turns):
        return None
    joined: list[Turn] = []
    for speaker, text in turns[:-1]:
        if joined and joined[-1][0] == speaker:
            text = f"{joined.pop()[1]}\n\n{text}"
        joined.append((speaker, text))
    return tuple(joined)


def with_turns(example: Example) -> Example:
    """`example`, whose prompt is the text of a dialogue as a published set writes it, with its turns as well."""
    assert isinstance(example.prompt, str)
    return replace(example, parsed=turns_of(example.prompt) or (("Human", example.prompt.strip()),))


def as_turns(example: Example, system_prompt: str | None = None) -> Example:
    """`example` as a chat template reads it: its dialogue as turns, with the system prompt if they have none.

    A prompt that is text and no dialogue stays as it is.
    """
    if example.parsed is not None:
        chosen, rejected = (None if text is None else text.strip() for text in (example.chosen, example.rejected))
        example = replace(example, prompt=example.parsed, chosen=chosen, rejected=rejected, parsed=None)
    return with_system(example, system_prompt)


def with_system(example: Example, system_prompt: str | None) -> Example:
    """`example` with `system_prompt` in front of a dialogue that has no system turn."""
    if (
        not system_prompt
        or isinstance(example.prompt, str)
        or any(speaker == "System" for speaker, _ in example.prompt)
    ):
        return example
    return replace(example, prompt=(("System", system_prompt.strip()), *example.prompt))


def parse_dialogue(text: str) -> list[Turn]:
    """Split "\\n\\nHuman: ...\\n\\nAssistant: ..." (hh-rlhf) or " Human: ... Assistant: ..." into turns.

    Text in front of the first marker becomes a "System" turn. Without a marker the list is empty.
    """
    marker = _MARKER_AFTER_BLANK_LINE
    if len(marker.findall(text)) < 2:
        marker = _MARKER_ANYWHERE
    preamble, *pieces = marker.split(text)
    if not pieces:
        return []
    turns = [(pieces[i], pieces[i + 1].strip()) for i in range(0, len(pieces), 2)]
    return [("System", preamble.strip()), *turns] if preamble.strip() else turns
