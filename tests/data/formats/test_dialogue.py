import pytest

from utils.data.formats.dialogue import DEFAULT_FORM, FORMS, asked, continued, parse_dialogue, rendered
from utils.data.formats.example import Example

FORM = FORMS["human_assistant"]


def test_the_default_form_is_a_row_of_the_table():
    assert FORMS[DEFAULT_FORM] is FORM


def test_the_text_form_is_the_documented_one():
    turns = [("System", "Be kind."), ("Human", "Hi "), ("Assistant", "Hello."), ("Human", "How are you?")]
    assert FORM.prompt(turns[1:2]) == " Human: Hi Assistant:"
    assert FORM.prompt(turns) == " System: Be kind. Human: Hi Assistant: Hello. Human: How are you? Assistant:"
    assert FORM.response("\nWell. ") == " Well."


@pytest.mark.parametrize(
    "prompt",
    [
        "\n\nHuman: Hi\n\nAssistant:",
        "POST: long story\nTL;DR:",
        "[INST] Hi [/INST]",
        "<|user|>Hi<|assistant|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Note: ",
    ],
)
def test_a_finished_prompt_is_used_as_it_stands(prompt):
    assert continued(prompt) == Example(prompt)
    assert rendered(continued(prompt), FORM).prompt == prompt


@pytest.mark.parametrize("question", ["What is 2+2?", "Explain (a) and (b)", "Who is my assistant", "x > y"])
def test_a_bare_question_is_set_into_the_text_form(question):
    assert continued(question) == asked(question) == Example((("Human", question),))
    assert rendered(continued(question), FORM).prompt == f" Human: {question} Assistant:"
    assert continued(question, "\nfour ", " five").chosen == "four"
    assert rendered(continued(question, "\nfour ", " five"), FORM).chosen == " four"
    assert rendered(continued(question, "\nfour ", " five"), FORM).rejected == " five"


def test_a_response_to_a_finished_prompt_keeps_its_white_space_and_never_meets_the_colon():
    def response(prompt: str, answer: str) -> str | None:
        return rendered(continued(prompt, answer), FORM).chosen

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
