"""What the READMEs say can be done: their rows are read, their flags exist, their links lead somewhere."""

import json
import re
import shlex
from collections import Counter

import pytest
from step_scripts import REPOSITORY, STEPS, load_step

from utils.arguments import refuse_unavailable
from utils.arguments.parser import build_parser, flag_actions
from utils.arguments.run import parse_config
from utils.data.sources.reading import open_source, read_examples

READMES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "training").glob("*/README.md")])
TEXTS = {path: path.read_text(encoding="utf-8") for path in READMES}
MAIN_TEXT = TEXTS[REPOSITORY / "README.md"]
PURPOSES = {"1": "sft", "2": "preference", "3": "prompts"}
# Flags of other programs and of scripts with a parser of their own.
OTHER_FLAGS = {
    "--num_gpus", "--nproc_per_node", "--debug_host", "--debug_port", "--debug_rank", "--help", "--repo-type",
    "--local-dir", "--include", "--world_size", "--device_memory", "--rows",
}  # fmt: skip


def names(path) -> str:
    return str(path.relative_to(REPOSITORY))


def example_rows() -> list[tuple[str, str]]:
    """(row, steps) of the table of data formats."""
    return re.findall(r"^\|[^|]+\| `(\{.*\})` \|([^|]+)\|$", MAIN_TEXT, flags=re.MULTILINE)


def commands() -> list[list[str]]:
    """The command lines of the three scripts in the main README, without those that leave something out."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", MAIN_TEXT, flags=re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if "main.py" in line and "..." not in line]


def test_the_table_of_formats_and_the_commands_are_found():
    assert len(example_rows()) >= 10 and len(commands()) >= 4


@pytest.mark.parametrize(("row", "steps"), example_rows())
def test_rows_of_the_data_formats_are_read(row, steps, tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{row}\n", encoding="utf-8")
    assert json.loads(row)
    for step in re.findall(r"\b[123]\b", steps):
        dropped = Counter()
        examples = list(read_examples(open_source(str(tmp_path / "data.jsonl")), "train", PURPOSES[step], dropped))
        assert len(examples) == 1 and examples[0] is not None and not dropped


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_parse_and_are_not_refused(words):
    script = next(index for index, word in enumerate(words) if word.endswith("main.py"))
    step = next(step for step, path in STEPS.items() if path.match(f"*/{words[script]}"))
    refuse_unavailable(parse_config(load_step(step).Config, words[script + 1 :]))


@pytest.mark.parametrize("path", READMES, ids=names)
def test_flags_exist(path):
    known = set(OTHER_FLAGS) | {"--output_dir", "--seed"}
    for step in STEPS:
        known |= set(flag_actions(build_parser(load_step(step).Config)))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXTS[path])) <= known


@pytest.mark.parametrize("path", READMES, ids=names)
def test_links_and_folders_exist(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXTS[path]):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:scripts|training|utils|tests)/[\w./-]+)`", TEXTS[path]):
        assert (REPOSITORY / target).exists(), target


def test_headings_that_links_name_exist():
    headings = {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", MAIN_TEXT, flags=re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", MAIN_TEXT)) <= headings
