"""From examples to the rows of token ids that each purpose trains on."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from utils.data.formats.example import Example, Purpose
from utils.data.rows.encoding import CannotRender, Encoded, ExampleEncoder
from utils.data.rows.filters import Filters
from utils.data.rows.report import Tally
from utils.data.rows.tokenization import Ids, chunk_text, fit, pack_blocks, truncate_prompt

TokenRow = dict[str, Any]
LEFT_OUT = "dialogues left out that the chat template cannot write"
WITHOUT_SYSTEM = "prompts that are text and get no --system_prompt"
NO_FILTERS = Filters()
Tallies = Sequence[Tally] | Mapping[int, Tally]  # of each source


def token_rows(
    purpose: Purpose,
    encoder: ExampleEncoder,
    batches: Iterable[Sequence[Example]],
    max_len: int,
    tallies: Tallies,
    filters: Filters,
) -> Iterator[tuple[int, TokenRow]]:
    """The rows of `purpose` (keys as in `utils.data.build_datasets`) from batches of examples, each with its source.

    A block of purpose "pretrain" may hold text of several sources, and has the number 0.

    Args:
        tallies: count what was cut ("prompts cut", "responses cut") or left out because of `max_len`, what the filters
            left out, and what the form of dialogues left out or did not reach.
    """
    if purpose == "pretrain":
        encoded = (pair[1] for batch in batches for pair in _encoded(encoder, batch, ("chosen",), tallies))
        spans = ((each.prompt, each.answers["chosen"]) for each in encoded)
        yield from ((0, {"input_ids": block, "response_start": 0}) for block in pack_blocks(spans, max_len))
        return
    for batch in batches:
        rows = rows_of(purpose, encoder, batch, max_len, filters, tallies)
        yield from ((example.source, row) for example, _, row in rows)


def rows_of(
    purpose: Purpose,
    encoder: ExampleEncoder,
    batch: Sequence[Example],
    max_len: int,
    filters: Filters = NO_FILTERS,
    tallies: Tallies | None = None,
) -> Iterator[tuple[Example, Encoded, TokenRow]]:
    """The rows of each example, and the ids that they were made of; not for purpose "pretrain"."""
    tallies = defaultdict(Tally) if tallies is None else tallies
    make, names = {
        "sft": (_sft_rows, ("chosen",)),
        "preference": (_preference_rows, ("chosen", "rejected")),
        "labelled": (_labelled_rows, ("chosen", "rejected")),
        "prompts": (_prompt_rows, ()),
    }[purpose]
    for example, encoded in _encoded(encoder, batch, names, tallies):
        tally = tallies[example.source]
        if reason := _reason_to_drop(encoded, max_len, filters):
            tally.filtered[reason] += 1
            continue
        yield from ((example, encoded, row) for row in make(example, encoded, max_len, tally))


def rows_of_each(
    purpose: Purpose,
    encoder: ExampleEncoder,
    batch: Sequence[Example],
    max_len: int,
    filters: Filters = NO_FILTERS,
    tallies: Tallies | None = None,
) -> list[list[TokenRow]]:
    """The rows of each example of `batch`, in order: usually one, none where nothing is left; see `rows_of`."""
    rows: dict[int, list[TokenRow]] = {id(example): [] for example in batch}  # examples of equal content are not one
    for example, _, row in rows_of(purpose, encoder, batch, max_len, filters, tallies):
        rows[id(example)].append(row)
    return [rows[id(example)] for example in batch]


def _encoded(
    encoder: ExampleEncoder, batch: Sequence[Example], names: Sequence[str], tallies: Tallies
) -> Iterator[tuple[Example, Encoded]]:
    """Each example with its ids; dialogues of published sets that the chat template cannot write are left out."""
    for example, encoded in zip(batch, encoder(batch, names), strict=True):
        if isinstance(encoded, CannotRender):
            tallies[example.source].form[f"{LEFT_OUT} ({encoded})"] += 1
            continue
        if encoder.system_prompt and not (encoded.is_dialogue or encoded.form == "plain"):
            tallies[example.source].form[WITHOUT_SYSTEM] += 1
        yield example, encoded


def _reason_to_drop(encoded: Encoded, max_len: int, filters: Filters) -> str:
    """See `Filters.reason_to_drop`. The answers that have been encoded are those that the purpose reads."""
    lengths = [len(ids) for ids in encoded.answers.values()]
    return filters.reason_to_drop(len(encoded.prompt), lengths, None if encoded.form == "plain" else max_len)


def _sft_rows(example: Example, encoded: Encoded, max_len: int, tally: Tally) -> Iterator[TokenRow]:
    if encoded.form == "plain":
        for start, ids in chunk_text(encoded.prompt, encoded.answers["chosen"], max_len):
            yield {"input_ids": start + ids, "response_start": len(start)}
        return
    prompt, (response,) = _fit(encoded, ("chosen",), max_len, tally)
    row = {"input_ids": prompt + response, "response_start": len(prompt)}
    cut, first = len(encoded.prompt) - len(prompt), max(encoded.prefix, 1)  # the first token has no predecessor
    kept = [(start - cut, end - cut) for start, end in encoded.earlier if start - cut >= first and start < end]
    if kept:
        row["target_spans"] = [place for span in (*kept, (len(prompt), len(row["input_ids"]))) for place in span]
    yield row


def _preference_rows(example: Example, encoded: Encoded, max_len: int, tally: Tally) -> Iterator[TokenRow]:
    prompt, (wanted, unwanted) = _fit(encoded, ("chosen", "rejected"), max_len, tally)
    if wanted == unwanted:
        tally.cut["pairs left out that differ only beyond it"] += 1
        return
    row = {"prompt_ids": prompt, "chosen_ids": wanted, "rejected_ids": unwanted}
    yield row | {"source": example.source, **example.numbers}


def _labelled_rows(example: Example, encoded: Encoded, max_len: int, tally: Tally) -> Iterator[TokenRow]:
    prompt, (response,) = _fit(encoded, ("chosen",) if example.label else ("rejected",), max_len, tally)
    yield {"prompt_ids": prompt, "response_ids": response, "label": example.label}


def _prompt_rows(example: Example, encoded: Encoded, max_len: int, tally: Tally) -> Iterator[TokenRow]:
    tally.cut["prompts cut"] += len(encoded.prompt) > max_len
    yield {
        "prompt_ids": _bos_once(encoded, truncate_prompt(encoded.prompt, max_len, encoded.prefix)),
        "prompt": encoded.text,
        "reference": _reference(example),
        "columns": json.dumps(dict(example.columns)),
    }


def _reference(example: Example) -> str | None:
    """The reference answer that a reward may compare with: the row's own, else its chosen response."""
    if example.reference is not None or example.chosen is None:
        return example.reference
    return example.chosen.strip()  # without the space that separates it from the prompt


def _fit(encoded: Encoded, names: Sequence[str], max_len: int, tally: Tally) -> tuple[Ids, list[Ids]]:
    responses = [encoded.answers[name] for name in names]
    prompt, short = fit(encoded.prompt, responses, max_len, encoded.prefix)
    prompt = _bos_once(encoded, prompt)
    tally.cut["prompts cut"] += len(prompt) < len(encoded.prompt)
    tally.cut["responses cut"] += sum(kept != whole for kept, whole in zip(short, responses, strict=True))
    return prompt, short


def _bos_once(encoded: Encoded, prompt: Ids) -> Ids:
    """`prompt` without the BOS that was kept in front of a cut, where what follows begins with BOS.

    Templates that begin every turn with it need this.
    """
    is_doubled = encoded.form == "template" and encoded.prefix > 0 and prompt[:1] == prompt[1:2]
    return prompt[1:] if is_doubled and len(prompt) < len(encoded.prompt) else prompt
