import pytest

from utils.data.formats.dialogue import FORMS, form_of, rendered, settled
from utils.data.formats.example import DroppedRow, Example, NoResponseError, RowError
from utils.data.formats.registry import find_format

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Help\n\nAssistant:"
HH_PROMPT = " Human: Hi Assistant: Hello. Human: Help Assistant:"


def convert(row, purpose="sft"):
    """The example of `row`, with its prompt form decided as in a data set of such rows."""
    example = find_format(row, purpose).convert(row)
    return settled(example, form_of([example.prompt])) if example.is_undecided else example


def as_text(row, purpose="sft"):
    """The example of `row` with its dialogue as the text that a model reads."""
    return rendered(convert(row, purpose), FORMS["human_assistant"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " x", "chosen": " Yes", "rejected": " No"},
            Example("\n\nHuman: Hi\n\nAssistant:", " Yes", " No"),
        ),
        ({"prompt": "Hi?", "chosen": "Yes", "rejected": "No"}, Example(" Human: Hi? Assistant:", " Yes", " No")),
        ({"chosen": HH + " Sure.", "rejected": HH + " Go away."}, Example(HH_PROMPT, " Sure.", " Go away.")),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            Example(" Human: Add.\n1 2 Assistant:", " 3"),
        ),
        ({"instruction": "Add.", "input": "", "output": "3"}, Example(" Human: Add. Assistant:", " 3")),
        ({"instruction": "Add.", "output": "3"}, Example(" Human: Add. Assistant:", " 3")),
        (
            {"instruction": "Human: a Assistant: b Human: c Assistant:", "output": "d"},
            Example("Human: a Assistant: b Human: c Assistant:", " d"),
        ),
        (
            {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 2, "generator_1": "m"},
            Example(" Human: Q Assistant:", " b", " a"),
        ),
        (
            {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 1.0},
            Example(" Human: Q Assistant:", " a", " b"),
        ),
        (
            {
                "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Yes"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            Example(" System: S Human: Hi Assistant:", " Yes", " No"),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}], "chosen": "Yes", "rejected": "No"},
            Example(" Human: Hi Assistant:", " Yes", " No"),
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
            },
            Example(" Human: Hi Assistant:", " Yes", " No"),
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}],
                "chosen": [{"role": "assistant", "content": "Yes"}],
                "rejected": [{"role": "assistant", "content": "No"}],
            },
            Example(" Human: Hi Assistant:", " Yes", " No"),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
            Example(" Human: Hi Assistant:", " Yes"),
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
            Example(" Human: Hi Assistant:", " Yes"),
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], "label": False},
            Example(" Human: Hi Assistant:", None, " Yes", label=False),
        ),
        ({"messages": [{"role": "user", "content": "Hi"}]}, Example(" Human: Hi Assistant:")),
        ({"prompt": "Hi", "completion": "Yes", "label": True}, Example(" Human: Hi Assistant:", " Yes", label=True)),
        (
            {"prompt": "Hi", "completion": "No", "label": "false"},
            Example(" Human: Hi Assistant:", None, " No", label=False),
        ),
        ({"prompt": "TL;DR:", "chosen": " milk is white ."}, Example("TL;DR:", " milk is white .")),
        ({"prompt": "Hi", "response": "Yes"}, Example(" Human: Hi Assistant:", " Yes")),
        ({"text": " Any text.\n"}, Example("", " Any text.\n")),
    ],
)
def test_each_format_by_its_columns(row, expected):
    assert as_text(row) == expected


HI = (("Human", "Hi"),)
QUESTION, YES = {"role": "user", "content": "Hi "}, {"role": "assistant", "content": " Yes\n"}
NO = {"role": "assistant", "content": "No "}
CHAT = [QUESTION, YES]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT}, Example(HI, "Yes")),
        ({"messages": [*CHAT, QUESTION]}, Example((*HI, ("Assistant", "Yes"), *HI))),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, Example(HI, "Yes")),
        (
            {"conversations": [{"from": "system", "value": "S"}, QUESTION], "chosen": YES, "rejected": NO},
            Example((("System", "S"), *HI), "Yes", "No"),
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, QUESTION], "chosen": " Yes", "rejected": "No"},
            Example((("System", "S"), *HI), "Yes", "No"),
        ),
        ({"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]}, Example(HI, "Yes", "No")),
        ({"prompt": [QUESTION], "completion": [YES], "label": 0}, Example(HI, None, "Yes", label=False)),
        (
            {"chosen": HH + " Sure.", "rejected": HH + " Go away."},
            Example((*HI, ("Assistant", "Hello."), ("Human", "Help")), "Sure.", "Go away."),
        ),
        ({"instruction": "Add.", "input": "1 2", "output": " 3"}, Example((("Human", "Add.\n1 2"),), "3")),
        ({"prompt": "Hi", "response": " Yes"}, Example(HI, "Yes")),
    ],
)
def test_dialogues_and_questions_stay_turns_with_bare_answers(row, expected):
    assert convert(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": HH, "chosen": " Sure.", "rejected": "No."}, Example(HH, " Sure.", " No.")),
        ({"prompt": "TL;DR:", "completion": " Short.\n", "label": 1}, Example("TL;DR:", " Short.\n", label=True)),
        ({"instruction": HH_PROMPT, "output": "Sure."}, Example(HH_PROMPT, " Sure.")),
        ({"text": " Any text.\n"}, Example("", " Any text.\n")),
    ],
)
def test_finished_text_stays_text_whose_continuations_bring_their_white_space(row, expected):
    assert convert(row) == expected == as_text(row)


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), ("true", True), ("True", True), (1, True), ("1", True)]
    + [(False, False), ("false", False), ("FALSE", False), (0, False), ("0", False)],
)
def test_a_label_says_whether_the_only_answer_was_wanted(value, label):
    for row in ({"prompt": "Hi", "completion": "Yes"}, {"messages": CHAT}):
        assert convert(row).label is None
        example = convert({**row, "label": value})
        assert example.label is label
        assert (example.chosen, example.rejected) == (("Yes", None) if label else (None, "Yes"))


def test_prompts_need_no_response():
    assert as_text({"prompt": " Human: Hi Assistant:"}, "prompts") == Example(" Human: Hi Assistant:")
    assert as_text({"prompt": [{"role": "user", "content": "Hi"}]}, "prompts") == Example(" Human: Hi Assistant:")
    assert convert({"prompt": " Human: Hi Assistant:"}, "prompts").prompt == " Human: Hi Assistant:"
    assert convert({"prompt": [{"role": "user", "content": "Hi"}]}, "prompts").prompt == HI


def test_a_format_must_serve_the_purpose():
    assert find_format({"instruction", "output"}, "preference") is None
    assert find_format({"prompt", "chosen"}, "preference") is None
    assert find_format({"text"}, "prompts") is None
    assert find_format({"prompt"}, "sft") is None
    assert find_format({"foo"}, "sft") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Q", "output": ["a", "b"]}, "`output` must be text, found list"),
        ({"instruction": "Q", "input": 3, "output": "a"}, "`input` must be text, found int"),
        ({"instruction": "  ", "output": "a"}, "`instruction` is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "`prompt` must be text, found null"),
        ({"prompt": "Q", "chosen": 5, "rejected": "b"}, "`chosen` must be text, found int '5'"),
        ({"prompt": "Q", "completion": "a", "label": "maybe"}, "`label` must be true or false"),
        ({"messages": "Hi"}, "`messages` must hold turns with role and content"),
        ({"messages": []}, "`messages` has no turns"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "3"}]},
            "`messages` has a turn of role 'tool': messages of tools are not supported",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a turn of role 'function_call'"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "a turn with a call to a tool",
        ),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'; known: system, human"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be text, found null"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "has no human turn"),
        ({"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 7}, "`preference` must be 1 or 2"),
        ({"text": 3}, "`text` must be text, found int"),
    ],
)
def test_a_row_that_is_not_what_its_format_promises(row, message):
    with pytest.raises(RowError, match=message.replace("(", r"\(")):
        convert(row)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "output": ""},
        {"instruction": "Q", "output": None},
        {"prompt": "Q", "chosen": " ", "rejected": "b"},
        {"prompt": "Q", "chosen": "a", "rejected": None},
        {"chosen": "\n\nHuman: only a question", "rejected": "\n\nHuman: only a question"},
        {"chosen": "no turns at all", "rejected": "none here"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": ""},
            "rejected": {"from": "gpt", "value": "No"},
        },
    ],
)
def test_a_row_without_a_response(row):
    with pytest.raises(NoResponseError, match="has no response"):
        convert(row)


def test_rows_that_a_format_is_known_to_hold_are_dropped():
    with pytest.raises(DroppedRow, match="with an empty last turn"):
        convert({"chosen": HH + " ", "rejected": HH + " x"})
    with pytest.raises(DroppedRow, match="differ before the last turn"):
        convert({"chosen": HH + " a", "rejected": "\n\nHuman: Hi\n\nAssistant: Hello."})
    with pytest.raises(DroppedRow, match="with a tie"):
        convert({"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 1.5})
    with pytest.raises(DroppedRow, match="with blank text"):
        convert({"text": "  \n"})


BLANK = {"role": "assistant", "content": "  "}


@pytest.mark.parametrize(
    "row",
    [{"prompt": [QUESTION], "response": [BLANK]}, {"messages": [QUESTION, BLANK]}],
)
def test_blank_answers_of_chat_turns_are_no_responses(row):
    with pytest.raises(NoResponseError, match="the last turn of `.*` is empty"):
        convert(row)


@pytest.mark.parametrize("answers", [{"output": "c"}, {"output_1": "c", "output_2": "d", "preference": 1}])
def test_an_input_beside_a_whole_dialogue_is_refused(answers):
    row = {"instruction": "Human: a Assistant:", "input": "", **answers}
    assert convert(row).chosen == " c"
    with pytest.raises(RowError, match="`input` must be empty"):
        convert(row | {"input": "b"})


def test_a_prompt_of_chat_turns_ends_with_the_human():
    convert({"prompt": [QUESTION]}, "prompts")
    with pytest.raises(RowError, match="must end with a turn of the human's"):
        convert({"prompt": CHAT}, "prompts")
