"""The text form of a dialogue: `" Human: " + question + " Assistant:"`, answered by `" " + answer`.

Every data set that is not text already is written in this form, so that sets blend and all three steps see the same
prompts. A turn is `(speaker, text)` with speaker one of "System", "Human", "Assistant".
"""

import re
from collections.abc import Sequence

Turn = tuple[str, str]

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


def render_prompt(turns: Sequence[Turn]) -> str:
    """The turns, then the marker of the assistant's: `" Human: question Assistant:"`."""
    return "".join(f" {speaker}: {text.strip()}" for speaker, text in turns) + " Assistant:"


def render_response(text: str) -> str:
    """The assistant's answer as it follows the prompt: one space, then the text without outer white space."""
    return " " + text.strip()


def is_finished_prompt(prompt: str) -> bool:
    """Whether `prompt` already ends with a marker of the answering side, and so is used as it stands."""
    return _FINISHED.search(prompt) is not None


def complete_prompt(prompt: str) -> str:
    """`prompt` as it stands where it is finished (see `is_finished_prompt`), else set into the text form."""
    return prompt if is_finished_prompt(prompt) else render_prompt([("Human", prompt)])


def complete_response(prompt: str, response: str) -> str:
    """The response that follows the raw `prompt`: as it stands after a finished prompt, else in the text form.

    After a colon a space is put where neither side brings white space, so that "Assistant:" never meets "Yes".
    """
    if not is_finished_prompt(prompt):
        return render_response(response)
    return " " + response if prompt.endswith(":") and not response[:1].isspace() else response


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
