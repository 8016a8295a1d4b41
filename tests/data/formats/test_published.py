"""Rows written by hand in each published data set's real schema."""

import pytest

from utils.data.formats.dialogue import FORMS, rendered
from utils.data.formats.example import DroppedRow, Example, NoResponseError
from utils.data.formats.registry import ALIASES, DATASETS, find_dataset, find_format

QA = Example(" Human: Why? Assistant:", " Because.")
PAIR = Example(" Human: Why? Assistant:", " Because.", " Dunno.")
HH = "\n\nHuman: Why?\n\nAssistant:"


def as_text(example: Example) -> Example:
    return rendered(example, FORMS["human_assistant"])


ROWS = {
    "Dahoas/rm-static": (
        {"prompt": HH, "response": " Because.", "chosen": " Because.", "rejected": " Dunno."},
        Example(HH, " Because.", " Dunno."),
    ),
    "Dahoas/full-hh-rlhf": (
        {"prompt": HH, "response": " Because.", "chosen": " Because.", "rejected": "  Dunno.\n"},
        Example(HH, " Because.", "  Dunno.\n"),
    ),
    "Dahoas/static-hh": (
        {"prompt": HH, "response": " Because.", "chosen": " Because.", "rejected": " Dunno."},
        Example(HH, " Because.", " Dunno."),
    ),
    "Dahoas/synthetic-instruct-gptj-pairwise": ({"prompt": "Why?", "chosen": "Because.", "rejected": "Dunno."}, PAIR),
    "yitingxie/rlhf-reward-datasets": (
        {"prompt": "\n\nHuman: Why?\n\n", "chosen": "Assistant: Because.", "rejected": "Assistant: Dunno."},
        Example(HH, " Because.", " Dunno."),
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
            "quotes_0": {"title": [], "extract": []},
            "answer_0": "Dunno.",
            "tokens_0": {"prefix": [], "completion": []},
            "score_0": -0.5,
            "quotes_1": {"title": [], "extract": []},
            "answer_1": "Because [1, 2].",
            "tokens_1": {"prefix": [], "completion": []},
            "score_1": 0.5,
        },
        PAIR,
    ),
    "stanfordnlp/SHP": (
        {
            "post_id": "a",
            "domain": "askphysics_train",
            "history": "Why?",
            "human_ref_A": "Dunno.",
            "human_ref_B": "Because.",
            "labels": 0,
            "score_ratio": 2.0,
        },
        PAIR,
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        {"prompt": "USER: Why? ASSISTANT:", "label": "Because."},
        Example("Human: Why? Assistant:", " Because."),
    ),
    "wangrui6/Zhihu-KOL": (
        {"INSTRUCTION": "Why?", "RESPONSE": "Because.", "SOURCE": "Zhihu", "METADATA": "{}"},
        QA,
    ),
    "Cohere/miracl-zh-queries-22-12": (
        {
            "query_id": "1",
            "query": "Why?",
            "positive_passages": [{"docid": "1#0", "title": "t", "text": "Because."}],
            "negative_passages": [{"docid": "2#0", "title": "t", "text": "Dunno."}],
            "emb": [0.1],
        },
        PAIR,
    ),
    "Cohere/miracl-ja-queries-22-12": (
        {"query": "Why?", "positive_passages": [{"text": "Because."}], "negative_passages": []},
        QA,
    ),
    "Hello-SimpleAI/HC3-Chinese": (
        {"id": "0", "question": "Why?", "human_answers": ["Because.", "So."], "chatgpt_answers": ["As a model"]},
        QA,
    ),
    "mkqa-Chinese": (
        {
            "example_id": 1,
            "queries": {"zh_cn": "Why?", "ja": "naze"},
            "query": "why",
            "answers": {"zh_cn": [{"type": 0, "entity": "", "text": "Because.", "aliases": []}], "ja": []},
        },
        QA,
    ),
    "mkqa-Japanese": (
        {"queries": {"zh_cn": "x", "ja": "Why?"}, "answers": {"zh_cn": [], "ja": [{"text": "Because."}]}},
        QA,
    ),
    "lmqg/qg_jaquad": (
        {
            "answer": "b",
            "paragraph_question": "p",
            "question": "Why?",
            "sentence": "Because.",
            "paragraph": "Because. So.",
            "paragraph_id": "1",
        },
        QA,
    ),
    "lmqg/qag_jaquad": (
        {
            "answers": ["b"],
            "questions": ["Why?", "How?"],
            "paragraph": "Because.",
            "paragraph_id": "1",
            "questions_answers": "question: Why?, answer: b",
        },
        QA,
    ),
    "Anthropic/hh-rlhf": ({"chosen": HH + " Because.", "rejected": HH + " Dunno."}, PAIR),
    "tatsu-lab/alpaca": (
        {"instruction": "Why?", "input": "", "output": "Because.", "text": "Below is an instruction ..."},
        QA,
    ),
    "alpaca_gpt4": ({"instruction": "Why?", "input": "", "output": "Because.", "text": "Below is ..."}, QA),
    "CarperAI/openai_summarize_comparisons": (
        {"prompt": "SUBREDDIT: r/x\nPOST: Story. ", "chosen": "TL;DR:  Short.", "rejected": "TL;DR: Long."},
        Example(" Human: SUBREDDIT: r/x\nPOST: Story.\nTL;DR: Assistant:", " Short.", " Long."),
    ),
    "MultiTurnAlpaca": (
        {"instruction": " Human: Hi Assistant: Yo Human: Why? Assistant:", "output": " Because."},
        Example(" Human: Hi Assistant: Yo Human: Why? Assistant:", " Because."),
    ),
    "GPT-4-LLM": ({"instruction": "Why?", "input": "", "output": "Because."}, QA),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_known_set(name):
    row, expected = ROWS[name]
    known = DATASETS[name].format
    assert as_text(known.convert(row)) == expected
    assert set(known.columns) <= set(row)


def test_every_known_set_is_tested_and_every_alias_leads_to_one():
    assert set(DATASETS) - set(ROWS) == {"OpenAssistant/oasst1", "wikitext"}  # below, and plain text
    assert all(find_dataset(alias) is DATASETS[name] for alias, name in ALIASES.items())


def test_the_sets_of_the_data_contract_are_known():
    for name in ("Cohere/miracl-zh", "Cohere/miracl-ja", "mkqa-Chinese", "Anthropic/hh-rlhf", "OpenAssistant/oasst1"):
        assert find_dataset(name) is not None


@pytest.mark.parametrize("name", ["openai/webgpt_comparisons", "stanfordnlp/SHP", "lmqg/qg_jaquad"])
def test_a_local_copy_is_recognised_by_columns_of_its_own(name):
    row, expected = ROWS[name]
    assert as_text(find_format(row, "sft").convert(row)) == expected


def test_gpt4_comparisons_take_the_best_against_the_worst():
    row = {
        "user_input": "Why?",
        "responses_and_scores": [
            {"response": "So.", "source": "text-davinci-003", "score": 7.0},
            {"response": "Dunno.", "source": "OPT-IML", "score": 2.0},
            {"response": "Because.", "source": "gpt4", "score": 9.0},
        ],
    }
    assert as_text(find_format(row, "preference").convert(row)) == PAIR
    row["responses_and_scores"] = row["responses_and_scores"][:1]
    with pytest.raises(DroppedRow, match="with a tie"):
        find_format(row, "preference").convert(row)


def test_rows_known_to_hold_nothing():
    webgpt, _ = ROWS["openai/webgpt_comparisons"]
    with pytest.raises(DroppedRow):
        DATASETS["openai/webgpt_comparisons"].format.convert({**webgpt, "score_0": 0.0, "score_1": 0.0})
    unanswerable = {"queries": {"ja": "Why?"}, "answers": {"ja": [{"text": None}]}}
    with pytest.raises(NoResponseError):
        DATASETS["mkqa-Japanese"].format.convert(unanswerable)
    with pytest.raises(NoResponseError):
        DATASETS["Hello-SimpleAI/HC3-Chinese"].format.convert({"question": "Why?", "human_answers": []})


def test_message_trees_become_ranked_pairs_with_their_history():
    def message(name, parent, role, text, rank=None, deleted=False):
        return {
            "message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "deleted": deleted,
            "lang": "en", "message_tree_id": "a",
        }  # fmt: skip

    rows = [
        message("a", None, "prompter", "Hi"),
        message("b1", "a", "assistant", "worse", rank=1),
        message("b0", "a", "assistant", "best", rank=0),
        message("b2", "a", "assistant", "worst", rank=2),
        message("c", "b1", "prompter", "And?"),
        message("d", "c", "assistant", "That."),
        message("x", None, "prompter", "gone", deleted=True),
        message("y", "x", "assistant", "orphan"),
    ]
    known = DATASETS["OpenAssistant/oasst1"].format
    examples = list(known.assemble((f"row {i}", row) for i, row in enumerate(rows)))
    assert examples[1][1] == Example((("Human", "Hi"), ("Assistant", "worse"), ("Human", "And?")), "That.")
    assert [(where, as_text(example)) for where, example in examples] == [
        ("row 0", Example(" Human: Hi Assistant:", " best", " worst")),
        ("row 4", Example(" Human: Hi Assistant: worse Human: And? Assistant:", " That.")),
    ]
