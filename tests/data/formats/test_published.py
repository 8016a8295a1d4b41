"""Rows written by hand in each published data set's real schema."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from utils.data.formats.dialogue import FORMS, form_of, rendered, settled
from utils.data.formats.example import DroppedRow, Example, NoResponseError, RowError
from utils.data.formats.registry import ALIASES, DATASETS, SPELLINGS, find_dataset, find_format

QA = Example(" Human: Why? Assistant:", " Because.")
PAIR = Example(" Human: Why? Assistant:", " Because.", " Dunno.")
BRIEF_PAIR = Example(" System: Be brief. Human: Why? Assistant:", " Because.", " Dunno.")
ATTRIBUTES = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
HH = "\n\nHuman: Why?\n\nAssistant:"


def as_text(example: Example) -> Example:
    """The text that a model reads; the form of an undecided prompt is that of a set of such prompts."""
    example = settled(example, form_of([example.prompt])) if example.is_undecided else example
    return rendered(example, FORMS["human_assistant"])


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


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
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "Hi", "prompt_id": "f0e37e9f", "messages": chat("Hi", "Hello.", "Why?", "Because.")},
        Example(" Human: Hi Assistant: Hello. Human: Why? Assistant:", " Because."),
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            "prompt": "Why?",
            "prompt_id": "f0e37e9f",
            "chosen": chat("Why?", "Because."),
            "rejected": chat("Why?", "Dunno."),
            "messages": chat("Why?", "Because."),
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        },
        PAIR,
    ),
    "argilla/dpo-mix-7k": (
        {
            "dataset": "argilla/distilabel-capybara-dpo-7k-binarized",
            "chosen": chat("Why?", "Because."),
            "rejected": chat("Why?", "Dunno."),
            "chosen_rating": 5.0,
            "rejected_rating": 2.0,
        },
        PAIR,
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {
            "source": "evol_instruct",
            "prompt": "Why?",
            "chosen": chat("Why?", "Because."),
            "chosen-rating": 5.0,
            "chosen-model": "wizardlm-7b",
            "rejected": chat("Why?", "Dunno."),
            "rejected-rating": 2.0,
            "rejected-model": "pythia-12b",
        },
        PAIR,
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {
            "system": "Be brief.",
            "input": "Why?",
            "chosen": "Because.",
            "rejected": "Dunno.",
            "generations": ["Because.", "Dunno."],
            "order": ["chosen", "rejected"],
            "labelling_model": "gpt-4-1106-preview",
            "labelling_prompt": chat("Rate these"),
            "raw_labelling_response": "9 1",
            "rating": [9.0, 1.0],
            "rationale": "One is better.",
            "status": "unchanged",
            "original_chosen": "Because.",
            "original_rejected": "Dunno.",
            "chosen_score": 9.0,
            "in_gsm8k_train": False,
        },
        BRIEF_PAIR,
    ),
    "argilla/kto-mix-15k": (
        {
            "prompt": "Why?",
            "completion": chat("Why?", "Dunno."),
            "label": False,
            "rating": 2.0,
            "dataset": "argilla/ultrafeedback-binarized-preferences-cleaned",
        },
        Example(" Human: Why? Assistant:", None, " Dunno.", label=False),
    ),
    "trl-lib/kto-mix-14k": (
        {"prompt": chat("Why?"), "completion": chat("", "Because.")[1:], "label": True},
        Example(" Human: Why? Assistant:", " Because.", label=True),
    ),
    "trl-lib/ultrafeedback_binarized": (
        {
            "chosen": chat("Why?", "Because."),
            "rejected": chat("Why?", "Dunno."),
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        },
        PAIR,
    ),
    "openbmb/UltraFeedback": (
        {
            "source": "evol_instruct",
            "instruction": "Why?",
            "models": ["a", "b", "c", "d"],
            "completions": [
                {"response": "Dunno.", "overall_score": 10.0, "fine-grained_score": 1.25, "model": "a"},
                {"response": "Because.", "overall_score": 8.5, "fine-grained_score": 4.75, "model": "b"},
                {"response": "It does.", "overall_score": 4.0, "fine-grained_score": float("nan"), "model": "c"},
                {"response": "No.", "overall_score": 5.0, "fine-grained_score": None, "model": "d"},
                {"response": "", "overall_score": 9.0, "fine-grained_score": 5.0, "model": "e"},
            ],
        },
        replace(PAIR, ranked=(("Dunno.", 1.25), ("Because.", 4.75))),
    ),
    "berkeley-nest/Nectar": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: ",
            "answers": [
                {"answer": "Because.", "model": "a", "rank": 1.0},
                {"answer": "Dunno.", "model": "b", "rank": 7.0},
                {"answer": "It does.", "model": "c", "rank": 2.0},
            ],
            "turns": 2,
            "num_responses": 3,
            "source": ["sharegpt"],
            "good_natured": True,
        },
        Example(
            " Human: Hi Assistant: Hello. Human: Why? Assistant:",
            " Because.",
            " Dunno.",
            ranked=(("Because.", -1.0), ("Dunno.", -7.0), ("It does.", -2.0)),
        ),
    ),
    "nvidia/HelpSteer": ({"prompt": "Why?", "response": "Because.", **ATTRIBUTES}, QA),
    "nvidia/HelpSteer2": (
        {
            "prompt": "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?",
            "response": "Because.",
            **ATTRIBUTES,
        },
        Example(" Human: Hi Assistant: Hello. Human: Why? Assistant:", " Because."),
    ),
    "trl-lib/hh-rlhf-helpful-base": (
        {"prompt": chat("Why?"), "chosen": chat("", "Because.")[1:], "rejected": chat("", "Dunno.")[1:]},
        PAIR,
    ),
    "trl-lib/tldr": (
        {"prompt": "SUBREDDIT: r/x\n\nTITLE: T\n\nPOST: Story.\n\nTL;DR:", "completion": " Short."},
        Example("SUBREDDIT: r/x\n\nTITLE: T\n\nPOST: Story.\n\nTL;DR:", " Short."),
    ),
    "trl-lib/Capybara": ({"source": "Airoboros", "messages": chat("Why?", "Because."), "num_turns": 1}, QA),
    "databricks/databricks-dolly-15k": (
        {"instruction": "Why?", "context": "It rains.", "response": "Because.", "category": "closed_qa"},
        Example(" Human: Why?\nIt rains. Assistant:", " Because."),
    ),
    "Intel/orca_dpo_pairs": (
        {"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "Dunno."},
        BRIEF_PAIR,
    ),
    "Open-Orca/OpenOrca": (
        {"id": "niv.242684", "system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
        Example(" System: Be brief. Human: Why? Assistant:", " Because."),
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        {
            "prompt": "Why?",
            "response_0": "Dunno.",
            "response_1": "Because.",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        PAIR,
    ),
    "OpenRLHF/prompt-collection-v0.1": (
        {
            "dataset": "ultrafeedback",
            "context": "Why?",
            "context_messages": chat("Hi", "Hello.", "Why?"),
            "id": "ultrafeedback_0",
        },
        Example(" Human: Hi Assistant: Hello. Human: Why? Assistant:"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_known_set(name):
    row, expected = ROWS[name]
    known = DATASETS[name].format
    assert as_text(known.convert(row)) == expected
    assert set(known.columns) <= set(row)


def test_every_known_set_is_tested_and_every_alias_leads_to_one():
    # Below, and plain text.
    assert set(DATASETS) - set(ROWS) == {"OpenAssistant/oasst1", "OpenAssistant/oasst2", "wikitext"}
    assert all(find_dataset(alias) is DATASETS[name] for alias, name in ALIASES.items())


def test_every_known_set_is_documented():
    text = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w./-]+", text))
    named = {ALIASES.get(name, name) for name in listed if name in SPELLINGS.values()}
    assert named == set(DATASETS)


def test_names_match_in_whatever_case():
    assert len(SPELLINGS) == len(DATASETS) + len(ALIASES)  # no two differ in case alone
    for name in (*DATASETS, *ALIASES):
        assert find_dataset(name) is find_dataset(name.upper()) is find_dataset(name.lower()) is not None
    assert find_dataset("anthropic/hh-rlhf") is DATASETS["Anthropic/hh-rlhf"]
    assert find_dataset("anthropic/hh_rlhf") is None


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
    ranked = (("So.", 7.0), ("Dunno.", 2.0), ("Because.", 9.0))
    assert as_text(find_format(row, "preference").convert(row)) == replace(PAIR, ranked=ranked)
    row["responses_and_scores"] = row["responses_and_scores"][:1]
    with pytest.raises(DroppedRow, match="with a tie"):
        find_format(row, "preference").convert(row)


def test_what_a_judge_could_not_tell_apart_is_left_out():
    known = DATASETS["argilla/distilabel-intel-orca-dpo-pairs"].format
    with pytest.raises(DroppedRow, match="with a tie"):
        known.convert(ROWS["argilla/distilabel-intel-orca-dpo-pairs"][0] | {"status": "tie"})
    safe = DATASETS["PKU-Alignment/PKU-SafeRLHF"].format
    row, _ = ROWS["PKU-Alignment/PKU-SafeRLHF"]
    assert safe.convert(row | {"better_response_id": 0}).chosen == "Dunno."
    with pytest.raises(RowError, match="`better_response_id` must be 0 or 1, found 2"):
        safe.convert(row | {"better_response_id": 2})


@pytest.mark.parametrize("empty", ["", None])
def test_columns_that_may_be_empty_add_nothing(empty):
    for name, column, expected in (
        ("Intel/orca_dpo_pairs", "system", PAIR),
        ("Open-Orca/OpenOrca", "system_prompt", QA),
        ("databricks/databricks-dolly-15k", "context", QA),
    ):
        assert as_text(DATASETS[name].format.convert(ROWS[name][0] | {column: empty})) == expected


def test_a_judged_completion_repeats_its_prompt_or_follows_it():
    known = DATASETS["argilla/kto-mix-15k"].format
    row = {"prompt": "Why?", "label": True}
    dialogue = chat("Hi", "Hello.", "Why?", "Because.")
    whole = Example(" Human: Hi Assistant: Hello. Human: Why? Assistant:", " Because.", label=True)
    assert as_text(known.convert(row | {"completion": dialogue})) == whole
    alone = Example(" Human: Why? Assistant:", " Because.", label=True)
    assert as_text(known.convert(row | {"completion": dialogue[-1:]})) == alone
    with pytest.raises(NoResponseError, match="`completion` does not end with an assistant turn"):
        known.convert(row | {"completion": dialogue[:-1]})


def test_a_context_that_ends_with_an_answer_is_no_prompt():
    known = DATASETS["OpenRLHF/prompt-collection-v0.1"].format
    with pytest.raises(DroppedRow, match="that end with the assistant's turn"):
        known.convert({"context_messages": chat("Why?", "Because.")})


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
    assert DATASETS["OpenAssistant/oasst2"].format is known
    examples = list(known.assemble((f"row {i}", row) for i, row in enumerate(rows)))
    assert examples[1][1] == Example((("Human", "Hi"), ("Assistant", "worse"), ("Human", "And?")), "That.")
    ranked = (("best", 0.0), ("worse", -1.0), ("worst", -2.0))
    assert [(where, as_text(example)) for where, example in examples] == [
        ("row 0", Example(" Human: Hi Assistant:", " best", " worst", ranked=ranked)),
        ("row 4", Example(" Human: Hi Assistant: worse Human: And? Assistant:", " That.")),
    ]
