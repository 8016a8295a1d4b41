"""Dialogues as turns, and the one place where they become text.

The text form is `" Human: " + question + " Assistant:"`, answered by `" " + answer`. A form for a model's own chat
template would be another class with the two methods of `HumanAssistant`, and a row of `FORMS`.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from utils.data.formats.example import Example, Turn

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

# What a prompt ends with when its author has already put the marker of the answering side there:
# "... Assistant:", "TL;DR:", "[/INST]", "<|assistant|>", "<|im_start|>assistant".
_FINISHED = re.compile(r"(?::|\]|>\s*(?:assistant|model)?)\s*\Z", re.IGNORECASE)
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
    """`example` with its prompt and its answers as the text that the model reads; one whose prompt is text stays."""
    if isinstance(example.prompt, str):
        return example
    answers = {
        name: form.response(answer) for name in ("chosen", "rejected") if (answer := getattr(example, name)) is not None
    }
    return replace(example, prompt=form.prompt(example.prompt), **answers)


def prompt_number(example: Example) -> int:
    """An int64 that is equal for equal prompts, however their rows wrote them; of plain text, for equal texts."""
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


def continued(prompt: str, chosen: str | None = None, rejected: str | None = None) -> Example:
    """Answers to the text of a prompt: a question, or text that ends with a marker of the answering side.

    Such text is used as it stands, and so are its answers. After a colon a space is put where neither side brings white
    space, so that "Assistant:" never meets "Yes".
    """
    if not is_finished_prompt(prompt):
        return asked(prompt, chosen, rejected)
    apart = prompt.endswith(":")
    answers = (
        " " + text if text is not None and apart and not text[:1].isspace() else text for text in (chosen, rejected)
    )
    return Example(prompt, *answers)


def is_finished_prompt(prompt: str) -> bool:
    """Whether `prompt` already ends with a marker of the answering side, and so is used as it stands."""
    return _FINISHED.search(prompt) is not None


def parse_dialogue(text: str) -> list[Turn]:
    """Split "\\n\\nHuman: ...\\n\\nAssistant: ..." (hh-rlhf) or " Human: ... Assistant: ..." into turns.

    Text in front of the first marker becomes a "System" turn. No marker: an empty list.
    """
    marker = _MARKER_AFTER_BLANK_LINE
    if len(marker.findall(text)) < 2:
        marker = _MARKER_ANYWHERE
    preamble, *pieces = marker.split(text)
    if not pieces:
        return []
    turns = [(pieces[i], pieces[i + 1].strip()) for i in range(0, len(pieces), 2)]
    return [("System", preamble.strip()), *turns] if preamble.strip() else turns
