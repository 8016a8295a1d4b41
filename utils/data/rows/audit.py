"""The audit at the start of a run: the first rows of the user's own data, as the loss and a rollout will see them.

A template that ends answers with a token outside the mask, or with another one than generation stops at, trains without
any error and answers without an end. Each check below finds one such mistake in rows that were prepared already, and
shows the row with its trained tokens marked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from utils.chat_templates.rendering import ROLES, special_pattern
from utils.data.batches.collate import collate_sft
from utils.data.formats.dialogue import as_turns, with_system
from utils.data.formats.example import Example, Purpose
from utils.data.rows.encoding import CannotRender, Encoded, ExampleEncoder, Span
from utils.data.rows.filters import Filters
from utils.data.rows.token_rows import NO_FILTERS, TokenRow, rows_of
from utils.data.rows.tokenization import Ids, truncate_prompt
from utils.errors import InputError, counted

AUDITED = 200  # examples
LONGEST_SHOWN = 2000  # characters of a row in a message
_ANSWERS = ("chosen_ids", "rejected_ids", "response_ids")
BEGIN, END = "⟦", "⟧"  # around trained tokens


@dataclass(frozen=True)
class Case:
    """A sequence of a row, with what it was made of.

    Attributes:
        ids: prompt and answers. spans: the tokens of each trained answer, (start, end).
        is_cut: the last answer lost its end to fit into the row.
    """

    encoder: ExampleEncoder
    example: Example
    encoded: Encoded
    ids: Ids
    spans: list[Span]
    is_cut: bool

    @property
    def ended(self) -> list[tuple[int, Ids]]:
        """Number and tokens of each answer that must end with the end token.

        That is the last one, unless it was cut; the earlier ones only in a template that writes an end token.
        """
        template = self.encoder.template
        writes_end = template is not None and template.end_token is not None
        answers = [(number, self.ids[start:end]) for number, (start, end) in enumerate(self.spans, 1)]
        return (answers[:-1] if writes_end else []) + ([] if self.is_cut else answers[-1:])


def audit(
    purpose: Purpose,
    encoder: ExampleEncoder,
    examples: Sequence[Example],
    prepared: Sequence[TokenRow],
    max_len: int,
    filters: Filters = NO_FILTERS,
) -> str:
    """Check the rows of the first `examples`, which begin the `prepared` rows, and return a line for the log.

    Examples that the `filters` leave out have no row.

    Raises:
        InputError: names the row and the problem, and shows the row.
    """
    rows = answers = cut = 0
    for example in examples:
        for _, encoded, row in rows_of(purpose, encoder, [example], max_len, filters):
            if rows < len(prepared) and {**row, **prepared[rows]} != {**prepared[rows], **row}:
                raise InputError(
                    f"{example.where}: the prepared rows are not those that are made of it now. Its chat template must "
                    "not depend on the time or on anything outside the dialogue; if the code that prepares rows was "
                    "edited, remove the cache (--data_output_path)"
                )
            rows += 1
            if encoded.form == "plain":
                continue
            if purpose == "prompts" and example.chosen is not None:
                (encoded,) = encoder([example], ("chosen",))
                if isinstance(encoded, CannotRender):
                    continue
            for case in _cases(purpose, encoder, example, encoded, row):
                answers, cut = answers + len(case.spans), cut + case.is_cut
                if problem := next((problem for check in CHECKS for problem in check(case)), None):
                    raise InputError(
                        f"{example.where}: {problem}. The row, with its trained tokens in {BEGIN}{END}: "
                        f"{marked(encoder.tokenizer, case.ids, case.spans)}"
                    )
    if not answers:
        return f"audit: {counted(rows, 'prompt')} checked" if rows else ""
    end = encoder.tokenizer.convert_ids_to_tokens(encoder.eos_id)
    remark = f", except {cut} that were cut" if cut else ""
    return f"audit: {counted(answers, 'answer')} of {counted(rows, 'row')} checked, which end with {end}{remark}"


def marked(tokenizer: PreTrainedTokenizerBase, ids: Ids, spans: Sequence[Span]) -> str:
    """The text of `ids` in one line, with the tokens of each span between marks; of a long one, its end."""
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    marks = [(start, BEGIN) for start, _ in spans] + [(end, END) for _, end in spans]
    for place, mark in sorted(marks, reverse=True):
        before = tokenizer.decode(ids[:place], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = whole[: len(before)] + mark + whole[len(before) :]
    line = whole.replace("\n", "\\n")
    return line if len(line) <= LONGEST_SHOWN else "..." + line[-LONGEST_SHOWN:]


def _cases(
    purpose: Purpose, encoder: ExampleEncoder, example: Example, encoded: Encoded, row: TokenRow
) -> Iterator[Case]:
    def case(ids: Ids, spans: list[Span], is_cut: bool) -> Case:
        return Case(encoder, example, encoded, ids, spans, is_cut)

    if "input_ids" in row:
        spans = _runs(collate_sft([row], pad_id=0)["target_mask"][0].tolist())
        answer = row["input_ids"][spans[-1][0] :] if spans else []
        yield case(row["input_ids"], spans, is_cut=answer != encoded.answers["chosen"])
        return
    prompt = row["prompt_ids"]
    # The answer to a prompt of step 3 is not trained, but has the form in which the actor learned to answer.
    named = encoded.answers if purpose == "prompts" else {name: ids for name, ids in row.items() if name in _ANSWERS}
    if not named:
        yield case(prompt, [], is_cut=False)
    for ids in named.values():
        is_cut = ids not in encoded.answers.values()
        yield case(prompt + ids, [(len(prompt), len(prompt) + len(ids))], is_cut)


def _runs(mask: Sequence[bool]) -> list[Span]:
    """The stretches of `mask` that are true, as (start, end)."""
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def bos_stands_once(case: Case) -> Iterator[str]:
    """BOS stands once, at the beginning."""
    bos, bos_id = case.encoder.tokenizer.bos_token, case.encoder.tokenizer.bos_token_id
    if bos_id is None:
        return
    if case.ids[:2] == [bos_id, bos_id]:
        yield f"it begins with {bos} twice; write {bos} once in the template"
    elif case.encoded.form == "template" and bos_id in case.ids and case.ids[0] != bos_id != case.encoder.eos_id:
        yield f"{bos} stands inside it and not at its beginning; begin the template with {bos}"


def no_answer_is_empty(case: Case) -> Iterator[str]:
    """Something is trained, and each answer has text."""
    if not case.spans and case.encoded.answers:
        yield "none of its tokens is trained"
    for number, (start, end) in enumerate(case.spans, 1):
        ids = [index for index in case.ids[start:end] if index not in case.encoder.special_ids]
        if not case.encoder.tokenizer.decode(ids).strip():
            yield f"answer {number} is empty; correct the template, or remove the row"


def the_end_is_trained(case: Case) -> Iterator[str]:
    """The token that ends an answer is inside the mask."""
    for number, ids in case.ended:
        if ids[-1] not in case.encoder.special_ids:
            yield (
                f"no token that ends answer {number} is trained, so the model would not learn to stop; write the end "
                "token directly behind the text of every answer, or use --train_on last"
            )


def generation_stops_there(case: Case) -> Iterator[str]:
    """The token that ends an answer is the one at which generation stops."""
    tokenizer = case.encoder.tokenizer
    for number, ids in case.ended:
        if ids[-1] in case.encoder.special_ids and ids[-1] != case.encoder.eos_id:
            yield (
                f"answer {number} ends with {tokenizer.convert_ids_to_tokens(ids[-1])}, but generation stops at "
                f"{tokenizer.eos_token}; end every answer with the same token"
            )


def prompts_are_those_of_rollouts(case: Case) -> Iterator[str]:
    """The ids in front of each answer are those of a rollout, which asks for that answer."""
    encoder, example = case.encoder, case.example
    if not case.encoded.is_dialogue:
        return
    settle = as_turns if encoder.template else with_system
    turns = settle(example, encoder.system_prompt).prompt
    asked = [turns[:i] for i, (speaker, _) in enumerate(turns) if speaker == "Assistant"]
    prompts = [*(turns for turns in asked if any(speaker == "Human" for speaker, _ in turns)), turns]
    places = [start for start, _ in case.spans] or [len(case.ids)]
    for place, turns in zip(reversed(places), reversed(prompts)):
        rollout = _rollout_prompt(encoder, example, turns)
        if case.ids[:place] != truncate_prompt(rollout, place, case.encoded.prefix):
            yield (
                f"the tokens in front of the answer to turn {len(turns)} are not those of a rollout's prompt, which "
                f"are {encoder.tokenizer.convert_ids_to_tokens(rollout[-5:])} at its end: a token holds the end of the "
                "prompt and the beginning of the answer; let the template write no white space there, or use "
                "--train_on last"
            )


CHECKS = (
    bos_stands_once,
    no_answer_is_empty,
    the_end_is_trained,
    generation_stops_there,
    prompts_are_those_of_rollouts,
)


def _rollout_prompt(encoder: ExampleEncoder, example: Example, turns: Sequence[tuple[str, str]]) -> Ids:
    """The ids of the prompt `turns`: those of `apply_chat_template` itself, unless a user wrote a special token."""
    special = special_pattern(encoder.tokenizer)
    if encoder.template is not None and not any(special.search(text) for _, text in turns):
        messages = [{"role": ROLES[speaker], "content": text} for speaker, text in turns]
        return list(
            encoder.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    (encoded,) = encoder([replace(example, prompt=tuple(turns), parsed=None)], ())
    return [] if isinstance(encoded, CannotRender) else encoded.prompt
