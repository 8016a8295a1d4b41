"""What the pages say can be done: their rows are read, their commands parse, their flags, paths and links exist."""

import ast
import importlib.util
import json
import re
import shlex
import sys
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml
from step_scripts import REPOSITORY

from utils.arguments import parse_config, refuse_unavailable
from utils.arguments.parser import build_parser, flag_actions
from utils.arguments.steps import CONFIGS, STEPS
from utils.data.sources.reading import open_source, read_examples

README, CONTRIBUTING = REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
STEP_PAGES = sorted((REPOSITORY / "training").glob("*/README.md"))
PAGES = [README, CONTRIBUTING, REPOSITORY / "CHANGELOG.md", *DOCS, *STEP_PAGES]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
SITE = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
SITE_SOURCES = {page.name: f"docs/{page.name}" for page in DOCS} | SITE["extra"]["pages"]  # by page of the site
DATA, METHODS, GENERATION = (REPOSITORY / "docs" / name for name in ("data.md", "methods.md", "generation.md"))
PURPOSES = {"1": "sft", "2": "preference", "3": "prompts"}
# Flags of other programs and of scripts with a parser of their own. None is listed that no page names.
OTHER_FLAGS = {
    "--num_gpus", "--nproc_per_node", "--debug_host", "--debug_port", "--debug_rank", "--help", "--repo-type",
    "--local-dir", "--include", "--world_size", "--device_memory", "--rows", "--stop_on_failure", "--method",
    "--methods", "--step", "--show",
}  # fmt: skip
# Placeholders for any name in the path of a command.
PLACEHOLDERS = {"MODEL": "*", "stepK": "step[123]"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`([^`\n]+)`")


def by_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


site_pages = load_script(REPOSITORY / "scripts" / "site_pages.py")
estimate_memory = load_script(REPOSITORY / "scripts" / "estimate_memory.py")
inspect_data = load_script(REPOSITORY / "scripts" / "inspect_data.py")


def blocks(text: str, language: str) -> list[str]:
    return [block for kind, block in FENCE.findall(text) if kind == language]


def prose(text: str) -> str:
    """Without blocks of code, and with nothing between the back ticks of inline code."""
    return INLINE_CODE.sub("``", FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Targets of links and pictures, without those of other sites."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if ":" not in target]


def command_lines(text: str) -> list[list[str]]:
    """The words of the commands in a page, without commands that are abbreviated with `...`."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if "..." not in line]


ALL_COMMANDS = [words for text in TEXTS.values() for words in command_lines(text) if words]
STEP_COMMANDS = [words for words in ALL_COMMANDS if any(word.endswith("main.py") for word in words)]
INSPECTIONS = [words for words in ALL_COMMANDS if "scripts/inspect_data.py" in words]
ESTIMATES = [words for words in ALL_COMMANDS if "scripts/estimate_memory.py" in words]


def github_slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_slug(heading: str) -> str:
    """That of Python-Markdown, with which mkdocs makes its pages."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def anchors(text: str, slug, separator: str) -> set[str]:
    """Of the headings of a page; one that comes again gets a number."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        name = first = slug(plain.strip())
        number = 0
        while name in found:
            number += 1
            name = f"{first}{separator}{number}"
        found.add(name)
    return found


def on_github(page: Path) -> set[str]:
    return anchors(TEXTS[page], github_slug, "-")


def on_the_site(page: Path) -> set[str]:
    return anchors(TEXTS[page], site_slug, "_")


def example_rows() -> list[tuple[str, str]]:
    """(row, steps) of the table of data formats."""
    return re.findall(r"^\|[^|]+\| `(\{.*\})` \|([^|]+)\|$", TEXTS[DATA], flags=re.MULTILINE)


def test_the_table_of_formats_and_the_commands_are_found():
    assert len(example_rows()) >= 11 and len(STEP_COMMANDS) >= 5 and len(ESTIMATES) >= 1
    assert INSPECTIONS


def test_the_readme_stays_short():
    assert len(TEXTS[README].splitlines()) <= 200


@pytest.mark.parametrize(("row", "steps"), example_rows())
def test_rows_of_the_data_formats_are_read(row, steps, tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{row}\n", encoding="utf-8")
    assert json.loads(row)
    numbers = re.findall(r"\b[123]\b", steps)
    assert numbers
    for step in numbers:
        dropped = Counter()
        source = open_source(str(tmp_path / "data.jsonl"))
        ((_, example),) = read_examples(source, "train", PURPOSES[step], dropped)
        assert example is not None and not dropped


@pytest.mark.parametrize("words", STEP_COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_commands_parse_and_are_not_refused(words):
    script = next(index for index, word in enumerate(words) if word.endswith("main.py"))
    refuse_unavailable(parse_config(CONFIGS[Path(words[script]).parent.name], words[script + 1 :]))


@pytest.mark.parametrize("words", ESTIMATES, ids=lambda words: " ".join(words)[:60])
def test_commands_of_the_memory_estimate_parse(words):
    options, flags = estimate_memory.parse_options(words[words.index("scripts/estimate_memory.py") + 1 :])
    refuse_unavailable(parse_config(STEPS[options.step].config, flags))


@pytest.mark.parametrize("words", INSPECTIONS, ids=lambda words: " ".join(words)[:60])
def test_commands_of_the_inspection_of_data_parse(words):
    inspect_data.parse_options(words[words.index("scripts/inspect_data.py") + 1 :])


@cache
def known_flags() -> set[str]:
    return OTHER_FLAGS.union(*(flag_actions(build_parser(config)) for config in CONFIGS.values()))


def named_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_flags_exist(page):
    assert named_flags(TEXTS[page]) <= known_flags()


def test_no_flag_of_another_program_is_listed_in_vain():
    assert set().union(*map(named_flags, TEXTS.values())) >= OTHER_FLAGS


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_to_files_and_headings(page):
    """By GitHub's rule for the names of headings."""
    for target in links(TEXTS[page]):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in on_github(file), target


@pytest.mark.parametrize("name", sorted(SITE_SOURCES))
def test_links_lead_to_pages_and_headings_of_the_site(name):
    """By mkdocs' rule for the names of headings, and after the hook has rewritten the links."""
    text = site_pages.rewritten(TEXTS[REPOSITORY / SITE_SOURCES[name]], name, SITE_SOURCES, None)
    for target in links(text):
        path, _, anchor = target.partition("#")
        if path and path not in SITE_SOURCES:
            assert (REPOSITORY / "docs" / path).is_file() and not path.endswith(".md"), target
        elif anchor:
            assert anchor in on_the_site(REPOSITORY / SITE_SOURCES[path or name]), target


def test_links_are_rewritten_for_the_site():
    sources = {"data.md": "docs/data.md", "step1.md": "training/step1/README.md"}
    text = "[a](data.md#b) [`c`](../../utils/c.py) ![d](d.png) `[e](f)` [g](../../README.md) [h](https://h.org)"
    without = "[a](data.md#b) `c` ![d](d.png) `[e](f)` [g](index.md) [h](https://h.org)"
    assert site_pages.rewritten(text.replace("(data.md", "(../../docs/data.md"), "step1.md", sources, None) == without
    linked = site_pages.rewritten("[`c`](../utils/c.py) [i](#i)", "data.md", sources, "https://host/owner/name/")
    assert linked == "[`c`](https://host/owner/name/blob/main/utils/c.py) [i](#i)"


def pages_in(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)]


def test_every_page_is_in_the_navigation_once():
    assert sorted(pages_in(SITE["nav"])) == sorted(SITE_SOURCES)
    assert set(SITE["extra"]["pages"].values()) == {by_name(page) for page in PAGES if page not in DOCS} - {"README.md"}


def named_paths(text: str) -> set[str]:
    """Paths in the repository that inline code and commands name."""
    code = "\n".join([*INLINE_CODE.findall(FENCE.sub("", text)), *blocks(text, "bash")])
    paths = re.findall(r"(?<![\w./-])((?:scripts|training|utils|tests|docs|\.run)/[\w./-]*)", code)
    modules = re.findall(r"python -m ((?:scripts|utils)\.[\w.]+)", code)
    return {path for path in paths if "..." not in path} | {f"{module.replace('.', '/')}.py" for module in modules}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_named_paths_exist(page):
    for path in named_paths(TEXTS[page]):
        pattern = path.rstrip("/")
        for placeholder, anything in PLACEHOLDERS.items():
            pattern = pattern.replace(placeholder, anything)
        assert list(REPOSITORY.glob(pattern)), path


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_inline_code_ends_in_its_line(page):
    """Otherwise the tests above do not see what it names."""
    for line in FENCE.sub("", TEXTS[page]).splitlines():
        assert line.count("`") % 2 == 0, line


def test_the_paths_of_commands_are_found():
    assert {"scripts/quickstart.sh", "scripts/configs/MODEL/stepK.yaml"} <= named_paths(TEXTS[README])
    assert "scripts/benchmarks/toy_seeds.py" in named_paths(TEXTS[REPOSITORY / "docs" / "index.md"])


def test_the_readme_names_every_preset():
    presets = {folder.name for folder in (REPOSITORY / "scripts" / "configs").iterdir() if folder.is_dir()}
    assert presets and presets <= set(INLINE_CODE.findall(TEXTS[README]))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_metrics_exist(page):
    sources = [path for folder in ("utils", "training") for path in (REPOSITORY / folder).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for name in re.findall(r"`(?:train|eval|ppo)/(\w+)`", TEXTS[page]):
        assert re.search(rf"\b{name}\b", code), name


def test_functions_are_where_the_methods_say():
    rows = re.findall(r"^\|[^|]+\|([^|]+)\| `(utils/[\w/]+\.py)` \|$", TEXTS[METHODS], flags=re.MULTILINE)
    named = [(name, file) for names, file in rows for name in INLINE_CODE.findall(names)]
    named += re.findall(r"`(\w+)`\s+in\s+`(utils/[\w/]+\.py)`", TEXTS[METHODS])
    assert len(rows) >= 6 and len(named) >= 20
    for name, file in named:
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (name, file)


def formulae(text: str) -> list[str]:
    text = prose(text)
    shown = re.findall(r"^\$\$\n(.*?)\n\$\$$", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"\$([^$]+)\$", re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.DOTALL | re.MULTILINE))
    return shown + inline


@pytest.mark.parametrize("page", [page for page in PAGES if formulae(TEXTS[page])], ids=by_name)
def test_formulae_hold_nothing_that_markdown_takes_away(page):
    """GitHub reads them as Markdown first: it would drop a backslash, or make emphasis or a tag of a part."""
    for formula in formulae(TEXTS[page]):
        assert "\n" not in formula, formula
        assert not re.search(r"\\[^A-Za-z]|[<*]|[})\]]_", formula), formula
        assert formula.count("{") == formula.count("}"), formula


def test_formulae_are_found():
    assert len(formulae(TEXTS[METHODS])) > 100


def test_the_example_of_the_scheduler_runs(world, tmp_path, monkeypatch, capsys):
    (example,) = blocks(TEXTS[GENERATION], "python")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "sft").symlink_to(world["model"])
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/generation.md", "exec"), {})
    printed = capsys.readouterr().out
    assert all(question in printed for question in ("Name a river in Asia.", "What is the capital of Peru?"))
