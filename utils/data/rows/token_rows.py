"""From examples to the rows of token ids that each purpose trains on."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from utils.data.formats.dialogue import DialogueForm, rendered
from utils.data.formats.example import Example, Purpose
from utils.data.rows.tokenization import Encoder, Ids, chunk_text, fit, pack_blocks, truncate_prompt

TokenRow = dict[str, Any]


def token_rows(
    purpose: Purpose,
    encoder: Encoder,
    form: DialogueForm,
    batches: Iterable[Sequence[Example]],
    max_len: int,
    tally: Counter[str],
) -> Iterator[TokenRow]:
    """The rows of `purpose` (keys as in `utils.data.build_datasets`) from batches of examples.

    Args:
        form: how dialogues become text.
        tally: counts what was cut ("prompts cut", "responses cut") or left out because of `max_len`.
    """
    batches = ([rendered(example, form) for example in batch] for batch in batches)
    if purpose == "pretrain":
        spans = (span for batch in batches for span in encoder.spans(batch))
        yield from ({"input_ids": block, "response_start": 0} for block in pack_blocks(spans, max_len))
        return
    makers = {
        "sft": _sft_rows,
        "preference": _preference_rows,
        "labelled": _labelled_rows,
        "prompts": _prompt_rows,
    }
    make = makers[purpose]
    for batch in batches:
        yield from make(encoder, batch, max_len, tally)


def _sft_rows(encoder: Encoder, batch: Sequence[Example], max_len: int, tally: Counter[str]) -> Iterator[TokenRow]:
    for example, (prompt, response) in zip(batch, encoder.spans(batch), strict=True):
        if example.prompt:
            short_prompt, (short_response,) = _fit(prompt, [response], max_len, encoder, tally)
            pieces = [(short_prompt, short_response)]
        else:
            pieces = list(chunk_text(prompt, response, max_len))
        for start, ids in pieces:
            yield {"input_ids": start + ids, "response_start": len(start)}


def _preference_rows(
    encoder: Encoder, batch: Sequence[Example], max_len: int, tally: Counter[str]
) -> Iterator[TokenRow]:
    prompts = encoder.prompts([example.prompt for example in batch])
    chosen = encoder.responses([example.chosen or "" for example in batch])
    rejected = encoder.responses([example.rejected or "" for example in batch])
    for example, prompt, *responses in zip(batch, prompts, chosen, rejected, strict=True):
        short_prompt, (wanted, unwanted) = _fit(prompt, responses, max_len, encoder, tally)
        if wanted == unwanted:
            tally["pairs left out that differ only beyond it"] += 1
            continue
        yield {"prompt_ids": short_prompt, "chosen_ids": wanted, "rejected_ids": unwanted, **example.numbers}


def _labelled_rows(encoder: Encoder, batch: Sequence[Example], max_len: int, tally: Counter[str]) -> Iterator[TokenRow]:
    prompts = encoder.prompts([example.prompt for example in batch])
    answers = encoder.responses([(example.chosen if example.label else example.rejected) or "" for example in batch])
    for example, prompt, answer in zip(batch, prompts, answers, strict=True):
        short_prompt, (short_answer,) = _fit(prompt, [answer], max_len, encoder, tally)
        yield {"prompt_ids": short_prompt, "response_ids": short_answer, "label": example.label}


def _prompt_rows(encoder: Encoder, batch: Sequence[Example], max_len: int, tally: Counter[str]) -> Iterator[TokenRow]:
    for example, prompt in zip(batch, encoder.prompts([example.prompt for example in batch]), strict=True):
        tally["prompts cut"] += len(prompt) > max_len
        yield {
            "prompt_ids": truncate_prompt(prompt, max_len, len(encoder.prefix)),
            "prompt": example.prompt,
            "reference": _reference(example),
            "columns": json.dumps(dict(example.columns)),
        }


def _reference(example: Example) -> str | None:
    """The reference answer that a reward may compare with: the row's own, else its chosen response."""
    if example.reference is not None or example.chosen is None:
        return example.reference
    return example.chosen.strip()  # without the space that separates it from the prompt


def _fit(
    prompt: Ids, responses: Sequence[Ids], max_len: int, encoder: Encoder, tally: Counter[str]
) -> tuple[Ids, list[Ids]]:
    short_prompt, short_responses = fit(prompt, responses, max_len, len(encoder.prefix))
    tally["prompts cut"] += len(short_prompt) < len(prompt)
    tally["responses cut"] += sum(short != whole for short, whole in zip(short_responses, responses, strict=True))
    return short_prompt, short_responses
