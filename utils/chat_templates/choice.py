"""Which chat template a tokenizer gets: its own, a named one, one from a file, or none.

The tokenizer then carries it: every part of a run reads `tokenizer.chat_template`, and so does whoever opens the saved
model. Its EOS token becomes the token with which the template ends an answer, so that what is trained to end an answer
is what generation stops at.
"""

import re
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from utils.arguments.choices import CHAT_TEMPLATES, TEXT_FORM
from utils.chat_templates.rendering import ChatTemplate, TemplateProblem, special_tokens
from utils.chat_templates.tokens import TemplateTokenizer
from utils.errors import InputError

_FOLDER = Path(__file__).parent
_LOOKS_LIKE_A_TOKEN = re.compile(r"<[^<>\s]+>")
# A template that writes today's date would give other rows tomorrow. Llama 3 itself falls back to this date.
FIXED_DATE = "26 Jul 2024"
_WITHOUT_CLOCK = f"{{%- macro strftime_now(form) -%}}{FIXED_DATE}{{%- endmacro -%}}"


def choose_template(tokenizer: PreTrainedTokenizerBase, chosen: str | None, *, eos_is_given: bool = False) -> str:
    """Give `tokenizer` the template that `--chat_template chosen` asks for, and return a line about it for the log.

    Args:
        chosen: a row of CHAT_TEMPLATES or a file; None keeps the tokenizer's own template, if it has one.
        eos_is_given: `--add_eot_token` has named the token that ends answers.

    Raises:
        InputError: no such file, a template that cannot be used, or one whose end token the tokenizer does not have.
    """
    own = _own_template(tokenizer)
    if chosen == TEXT_FORM or (chosen is None and own is None):
        tokenizer.chat_template = None
        why = f"--chat_template {TEXT_FORM}" if chosen else "the tokenizer has no chat template"
        return f"dialogues: written as ' Human: ... Assistant: ...' ({why})"
    label = f"--chat_template {chosen}" if chosen else "the tokenizer's own chat template"
    source = own if chosen is None else _read(chosen)
    notes = []
    if "strftime_now" in source and not source.startswith(_WITHOUT_CLOCK):
        source = _WITHOUT_CLOCK + source
        notes.append(f"the date that it writes is {FIXED_DATE}, whatever the day")
    tokenizer.chat_template = source
    TemplateTokenizer(tokenizer)  # refuses a slow tokenizer
    begins = _check(tokenizer, label)
    if chosen in CHAT_TEMPLATES and not begins:
        tokenizer.chat_template = "{{- bos_token -}}\n" + source
    elif not begins:
        notes.append(f"it writes no {tokenizer.bos_token}, so neither do the rows")
    if head := ChatTemplate(tokenizer).head.strip():
        notes.append(
            f"it writes {head!r} behind the prompt, which is trained as the beginning of every answer (a template "
            "without add_generation_prompt?)"
        )
    end = ChatTemplate(tokenizer).end_token
    if end is None:
        _refuse_unknown_end(tokenizer, label)
        notes.append(f"it writes no token behind an answer, so {tokenizer.eos_token} is added there")
    elif end != tokenizer.eos_token:
        if eos_is_given:
            raise InputError(
                f"{label} ends answers with {end}, --eot_token with {tokenizer.eos_token}; leave --add_eot_token out"
            )
        notes.append(f"EOS is {end}, with which it ends answers, in place of {tokenizer.eos_token}")
        tokenizer.eos_token = end
    return "; ".join([f"dialogues: written with {label}", *notes])


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that the tokenizer came with; of several the one called "default"."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template or None


def _read(chosen: str) -> str:
    if chosen in CHAT_TEMPLATES:
        return (_FOLDER / f"{chosen}.jinja").read_text(encoding="utf-8")
    try:
        source = Path(chosen).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"--chat_template {chosen}: the file cannot be read ({reason})") from error
    if not source.strip():
        raise InputError(f"--chat_template {chosen}: the file is empty")
    return source


def _check(tokenizer: PreTrainedTokenizerBase, label: str) -> bool:
    """Whether the template writes what the tokenizer puts in front of every text (BOS, for LLaMA).

    Raises:
        InputError: it cannot write a question and an answer.
    """
    try:
        template = ChatTemplate(tokenizer)
        text = template.render([("Human", "question")], asks=True)
        template.answer([("Human", "question")], "answer", text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{label}, line {error.lineno}: {error.message}") from error
    except TemplateProblem as error:
        syntax = error.__cause__
        line = f", line {syntax.lineno}" if isinstance(syntax, jinja2.TemplateSyntaxError) else ""
        raise InputError(f"{label}{line}: a question and an answer: {error}; correct the template") from error
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return not adds_bos or text.startswith(bos)


def _refuse_unknown_end(tokenizer: PreTrainedTokenizerBase, label: str) -> None:
    """Refuse markup behind an answer that is meant to be a token, such as <|im_end|>, and is none here."""
    marker = _LOOKS_LIKE_A_TOKEN.search(ChatTemplate(tokenizer).tail)
    if marker and marker.group() not in special_tokens(tokenizer):
        raise InputError(
            f"{label} ends answers with {marker.group()}, which is no special token of this tokenizer, so generation "
            f"could not stop there; add --add_eot_token --eot_token '{marker.group()}', or choose another template"
        )
