"""Rows as the model sees them, token by token, in colours or with markers, and the figures in words."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.data.rows.encoding import Span
from utils.errors import counted
from utils.inspection.measures import Inspection, sequences
from utils.output.tables import format_table, printable

MOST_TOKENS = 200  # of a prompt and of a response, shown; the middle of a longer one is left out
PROMPT, TRAINED, RESET = ("\x1b[36m", "\x1b[96m"), ("\x1b[32m", "\x1b[92m"), "\x1b[0m"


def rows_as_text(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> str:
    """The rows, one paragraph for each of their sequences.

    In colour a prompt is cyan and what is trained on is green, in two shades by turns, so that each token can be told.
    Without, tokens stand between bars, and those that are trained on between double brackets.
    """
    key = (
        f"{PROMPT[0]}prompt{RESET}, {TRAINED[0]}trained{RESET}, a token in each shade"
        if colour
        else "prompt, [[trained]], tokens|between|bars"
    )
    lines = [f"rows as the model sees them ({key})"]
    for number, row in enumerate(rows, 1):
        for name, (ids, spans) in sequences(row).items():
            label = {True: ", desirable", False: ", undesirable"}.get(row.get("label"), "")
            lines += ["", f"row {number}, {name}{label}: {_counts(ids, spans)}"]
            lines.append(_sequence(ids, spans, tokenizer, colour))
    return "\n".join(lines)


def figures_as_text(inspection: Inspection) -> str:
    """Counts, lengths, the share that is cut, length bias and duplicates."""
    report = inspection.report()
    names = ("mean", "p5", "p50", "p95", "p99", "longest")
    rows = [
        (name, *(f"{values[column]:.0f}" for column in names))
        for name, values in report["tokens_before_cutting"].items()
    ]
    paragraphs = [
        inspection.train.description,
        format_table("tokens of the training rows before anything is cut", rows, ("part", *names)),
        _cut(inspection),
    ]
    if bias := inspection.length_bias():
        what = (
            "the chosen response is the longer one" if inspection.labels is None else "a desirable response is longer"
        )
        paragraphs.append(
            f"length bias: in {bias['longer']:.1%} of the pairs {what} (50% is no bias), "
            f"by {bias['mean_difference']:+.1f} tokens on average"
        )
    found = inspection.duplicates
    near = "unknown (pip install rensa)" if found.near_in_training is None else f"{found.near_in_training}"
    near_held_out = "unknown" if found.near_of_held_out is None else f"{found.near_of_held_out}"
    paragraphs.append(
        f"duplicates: {found.exact_in_training} training rows repeat another one word for word, {near} nearly so; "
        f"{found.exact_of_held_out} repeat a held-out row word for word, {near_held_out} nearly so"
    )
    return "\n\n".join(paragraphs)


def _cut(inspection: Inspection) -> str:
    limit = inspection.max_len
    others = ", ".join(f"{inspection.share_cut(n):.1%} at {n}" for n in (limit // 2, 2 * limit, 4 * limit) if n)
    return f"too long for {inspection.length_flag} {limit}: {inspection.share_cut(limit):.1%} of the rows ({others})"


def _counts(ids: list[int], spans: list[Span]) -> str:
    trained = sum(end - start for start, end in spans)
    if len(spans) > 1:
        return f"{counted(len(ids), 'token')}, {trained} of them trained, in {len(spans)} responses"
    return f"{len(ids) - trained} tokens of prompt, {trained} trained" if spans else counted(len(ids), "token")


def _sequence(ids: list[int], spans: list[Span], tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    edges = [0, *(place for span in spans for place in span), len(ids)]
    parts = [_shortened(token_texts(ids[start:end], tokenizer)) for start, end in itertools.pairwise(edges)]
    if colour:
        shaded = zip(itertools.cycle((PROMPT, TRAINED)), parts)
        return "".join(shades[place % 2] + text for shades, part in shaded for place, text in enumerate(part)) + RESET
    texts = ("|".join(part) for part in parts)
    return "".join(f"[[{text}]]" if place % 2 else text for place, text in enumerate(texts))


def _shortened(texts: list[str]) -> list[str]:
    excess, half = len(texts) - MOST_TOKENS, MOST_TOKENS // 2
    return texts if excess <= 0 else [*texts[:half], f" ... {excess} more ... ", *texts[half + excess :]]


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, with line ends and control characters as escapes.

    Tokens that hold parts of one character are shown together as that character.
    """
    return [printable(text.replace("\n", "\\n").replace("\t", "\\t")) for text in _pieces(ids, tokenizer)]


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    waiting: list[int] = []
    for index, token in enumerate(ids):
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(waiting) < 4 and index + 1 < len(ids):
            continue
        if len(waiting) == 1 and (name := str(tokenizer.convert_ids_to_tokens(token))).startswith("▁"):
            text = name.replace("▁", " ")  # sentencepiece: decoding one token alone drops its leading space
        yield text
        waiting = []
