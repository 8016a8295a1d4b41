from dataclasses import replace

import pytest

from utils.data.formats.dialogue import (
    DEFAULT_FORM,
    FORMS,
    asked,
    form_of,
    parse_dialogue,
    raw,
    rendered,
    settled,
    undecided,
)
from utils.data.formats.example import Example

FORM = FORMS["human_assistant"]


def test_the_default_form_is_a_row_of_the_table():
    assert FORMS[DEFAULT_FORM] is FORM


def test_the_text_form_is_the_documented_one():
    turns = [("System", "Be kind."), ("Human", "Hi "), ("Assistant", "Hello."), ("Human", "How are you?")]
    assert FORM.prompt(turns[1:2]) == " Human: Hi Assistant:"
    assert FORM.prompt(turns) == " System: Be kind. Human: Hi Assistant: Hello. Human: How are you? Assistant:"
    assert FORM.response("\nWell. ") == " Well."


FINISHED = [
    "\n\nHuman: Hi\n\nAssistant:",
    "POST: long story\nTL;DR:",
    "[INST] Hi [/INST]",
    "<|user|>Hi<|assistant|>\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>model\n",
    "### Instruction: Hi\n\n### Response:",
]
QUESTIONS = [
    "What is 2+2?",
    "Sort the list [3,1,2]",
    "Explain this tag: <div>",
    "Translate the following:",
    "Who is my assistant",
    "x > y",
]


@pytest.mark.parametrize("prompt", FINISHED)
def test_prompts_that_all_end_with_a_marker_are_raw(prompt):
    assert form_of([prompt]) == form_of([prompt] * 9) == form_of([prompt, FINISHED[0]]) == "raw"
    assert form_of([prompt, "What is 2+2?"]) == "dialogue"
    example = settled(undecided(prompt), "raw")
    assert example == raw(prompt) == Example(prompt) and rendered(example, FORM).prompt == prompt


@pytest.mark.parametrize("question", QUESTIONS)
def test_ordinary_prompts_are_questions_whatever_they_end_with(question):
    assert form_of([question]) == form_of(QUESTIONS) == form_of([]) == "dialogue"
    example = settled(undecided(question, "\nfour ", " five"), "dialogue")
    assert example == asked(question, "four", "five")
    assert rendered(example, FORM) == Example(f" Human: {question} Assistant:", " four", " five")


def test_an_ending_that_all_prompts_of_a_set_share_is_a_marker():
    prompts = [f"Thing {i} A:" for i in range(5)]
    assert form_of(prompts) == "raw" and form_of(prompts[:4]) == form_of([*prompts, "Thing B:"]) == "dialogue"
    assert form_of([f"Thing {i} please" for i in range(5)]) == "dialogue"


def test_settling_keeps_what_the_row_says_besides():
    example = replace(undecided("Hi", "a"), label=True, score=0.5, reference="r", columns={"id": 1})
    for form in ("raw", "dialogue"):
        found = settled(example, form)
        assert (found.label, found.score, found.reference, found.columns) == (True, 0.5, "r", {"id": 1})
        assert settled(found, "raw") == found, "what is decided stays"


def test_a_response_to_a_finished_prompt_keeps_its_white_space_and_never_meets_the_colon():
    def response(prompt: str, answer: str) -> str | None:
        return rendered(raw(prompt, answer), FORM).chosen

    assert response("Human: Hi Assistant:", "Yes") == " Yes"
    assert response("Human: Hi Assistant:", "  Yes\n") == "  Yes\n"
    assert response("Human: Hi Assistant: ", "Yes") == "Yes"
    assert response("<|assistant|>", "Yes") == "Yes"


def test_dialogues_are_split_at_their_markers():
    assert parse_dialogue("\n\nHuman: Hi\n\nAssistant: Hello: you.\n\nHuman: Bye\n\nAssistant:") == [
        ("Human", "Hi"),
        ("Assistant", "Hello: you."),
        ("Human", "Bye"),
        ("Assistant", ""),
    ]
    assert parse_dialogue(" Human: Hi Assistant: Hello.") == [("Human", "Hi"), ("Assistant", "Hello.")]
    # A marker inside a turn of a dialogue that uses blank lines belongs to the turn.
    assert parse_dialogue("\n\nHuman: say Assistant: x\nHuman: y\n\nAssistant: ok") == [
        ("Human", "say Assistant: x\nHuman: y"),
        ("Assistant", "ok"),
    ]
    assert parse_dialogue("Be brief.\n\nHuman: Hi\n\nAssistant: Yo")[0] == ("System", "Be brief.")
    assert parse_dialogue("no markers here") == []
