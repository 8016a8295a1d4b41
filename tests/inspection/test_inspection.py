"""The inspection of a step's data: figures worked out by hand, rows in colours and without, the picture, the script."""

import importlib.util
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from utils.data import TokenDataset
from utils.errors import InputError
from utils.inspection.measures import Duplicates, Inspection, inspect
from utils.inspection.shown import rows_as_text, token_texts

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "inspect_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("inspect_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inspection(lengths, labels=None, max_len=10) -> Inspection:
    arrays = {name: np.array(values) for name, values in lengths.items()}
    labels = None if labels is None else np.array(labels)
    nothing = Duplicates(0, 0, None, None)
    return Inspection(
        "",
        max_len,
        "--max_seq_len",
        TokenDataset(datasets.Dataset.from_dict({}), "", ""),
        None,
        arrays,
        labels,
        nothing,
    )


def test_figures_by_hand():
    pairs = inspection({"prompt": [2, 5, 1, 3], "chosen": [8, 6, 2, 4], "rejected": [7, 6, 3, 1]})
    assert pairs.totals.tolist() == [10, 11, 4, 7]
    assert (pairs.share_cut(10), pairs.share_cut(3), pairs.share_cut(11)) == (0.25, 1.0, 0.0)
    assert pairs.length_bias() == {"longer": (1 + 0.5 + 0 + 1) / 4, "mean_difference": (1 + 0 - 1 + 3) / 4}
    # Desirable ones have 4 and 2 tokens, undesirable ones 2, 3 and 1: of six pairs 3 + 1 are longer and one is equal.
    labelled = inspection({"prompt": [1] * 5, "response": [4, 2, 2, 3, 1]}, [True, False, True, False, False])
    assert labelled.length_bias() == {"longer": (3 + 1 + 0.5) / 6, "mean_difference": 3 - 2}
    assert inspection({"prompt": [3], "response": [2]}).length_bias() is None
    assert inspection({"prompt": [3, 12]}).totals.tolist() == [3, 12]


def test_tokens_are_shown_as_they_are_read(tiny_tokenizer):
    text = " Human: what colour is 日本語 \U0001f600 ?\n Assistant:"
    ids = tiny_tokenizer(text).input_ids
    shown = token_texts(ids, tiny_tokenizer)
    assert "".join(shown) == "<s>" + text.replace("\n", "\\n") and len(shown) <= len(ids)
    assert "\ufffd" not in "".join(shown)
    assert token_texts(tiny_tokenizer("a\x1b[31mb").input_ids[1:], tiny_tokenizer) == [
        "a",
        "·",
        "[",
        "3",
        "1",
        "m",
        "b",
    ]


def test_prompt_and_trained_tokens_are_told_apart(tiny_tokenizer):
    prompt, chosen = tiny_tokenizer("Hi:").input_ids, tiny_tokenizer(" yes", add_special_tokens=False).input_ids + [2]
    row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": chosen[-1:]}
    plain = rows_as_text([row], tiny_tokenizer, colour=False)
    lines = plain.splitlines()
    assert lines[2] == f"row 1, chosen: {len(prompt)} tokens of prompt, {len(chosen)} trained"
    assert lines[3].replace("|", "") == "<s>Hi:[[ yes</s>]]" and "\x1b" not in plain
    assert lines[6].replace("|", "") == "<s>Hi:[[</s>]]"
    coloured = rows_as_text([row], tiny_tokenizer, colour=True).splitlines()[3]
    trained = "".join(re.findall(r"\x1b\[[39]2m([^\x1b]*)", coloured))
    assert trained == " yes</s>" and "[[" not in coloured and coloured.endswith("\x1b[0m")
    ids = prompt + chosen + prompt[1:] + chosen
    edges = [len(prompt), len(prompt + chosen), len(ids) - len(chosen), len(ids)]
    row = {"input_ids": ids, "response_start": edges[2], "target_spans": edges}
    several = rows_as_text([row], tiny_tokenizer, colour=False).splitlines()
    assert several[2] == f"row 1, response: {len(ids)} tokens, {2 * len(chosen)} of them trained, in 2 responses"
    assert several[3].replace("|", "") == "<s>Hi:[[ yes</s>]]Hi:[[ yes</s>]]"
    alone = rows_as_text([{"prompt_ids": prompt}], tiny_tokenizer, colour=False)
    assert f"row 1, prompt: {len(prompt)} tokens\n" in alone and "<s>|" in alone
    long = rows_as_text([{"prompt_ids": prompt * 100}], tiny_tokenizer, colour=False)
    assert f" ... {100 * len(prompt) - 200} more ... " in long


STEPS = [("step1", "1,0,0"), ("step2", "0,1,0"), ("dpo", "0,1,0"), ("step3", "0,0,1")]


@pytest.mark.parametrize(("step", "data_split"), STEPS)
def test_the_script_shows_what_the_step_trains_on(script, world, tmp_path, capsys, step, data_split):
    flags = [
        "--step",
        step,
        "--data_path",
        world["data"],
        "--model_name_or_path",
        world["model"],
        "--max_seq_len",
        "24",
    ]
    flags += ["--data_split", data_split, "--data_output_path", world["cache"], "--output_dir", str(tmp_path / "out")]
    script.main([*flags, "--show", "2"])
    printed = capsys.readouterr().out
    assert "row 2, " in printed and "row 3, " not in printed and "\x1b" not in printed
    limit = "--max_prompt_seq_len" if step == "step3" else "--max_seq_len"
    assert f"too long for {limit} 24: " in printed and "57 training rows and 3 held-out rows" in printed
    report = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert report["data"]["training_rows"] == 57 and report["data"]["longest_row"] == 24
    assert ("length_bias: " in printed or "length bias: " in printed) == (step in ("step2", "dpo"))
    assert report["tokens_before_cutting"]["total"]["longest"] > 24 or step == "step3"
    assert (tmp_path / "out" / "inspect.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_what_is_trained_on(script, world, tmp_path, tiny_tokenizer, write_rows):
    rows = [
        {
            "prompt": f" Human: thing {letter} ? Assistant:",
            "completion": f" {letter} it is {letter}",
            "label": i % 2 == 0,
        }
        for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")
    ]
    path = write_rows([*rows, *rows])
    flags = ["--step", "dpo", "--loss", "kto", "--data_path", path, "--model_name_or_path", world["model"]]
    flags += ["--data_split", "0,1,0", "--data_output_path", world["cache"], "--output_dir", str(tmp_path)]
    _, config = script.parse_options(flags)
    measured = inspect(config, tiny_tokenizer)
    assert measured.labels.sum() + (~measured.labels).sum() == len(measured.train) == len(measured.totals)
    assert measured.duplicates.exact_in_training == len(measured.train) // 2
    assert measured.duplicates.exact_of_held_out == 0  # rows with the same prompt go together
    assert measured.share_cut(config.max_seq_len) == 0
    script.main(flags)
    assert (tmp_path / "inspect.png").exists()
    _, config = script.parse_options([*flags, "--deduplicate", "exact"])
    assert inspect(config, tiny_tokenizer).duplicates.exact_in_training == 0


@pytest.fixture
def write_rows(tmp_path):
    def write(rows) -> str:
        path = tmp_path / "set" / "rows.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_bad_input_is_refused(script, world, tmp_path):
    flags = ["--data_path", world["data"], "--model_name_or_path", world["model"]]
    with pytest.raises(InputError, match="--show must be at least 0, got -1"):
        script.parse_options([*flags, "--show", "-1"])
    with pytest.raises(InputError, match="--streaming: .*leave it out to inspect them"):
        script.parse_options([*flags, "--streaming", "--max_steps", "9"])
    with pytest.raises(InputError, match="lies in the data folder"):
        script.main(
            [
                "--data_path",
                str(Path(world["data"]).parent),
                *flags[2:],
                "--output_dir",
                str(Path(world["data"]).parent / "x"),
            ]
        )
    with pytest.raises(InputError, match="no such file or folder"):
        script.main(["--data_path", "nothing.jsonl", *flags[2:], "--output_dir", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
