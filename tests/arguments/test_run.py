"""Command lines and YAML: what is accepted, what it means, and the one line that refuses the rest."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from step_scripts import REPOSITORY

from utils.arguments import Arguments, flag, parse_config, run, save_config
from utils.errors import DivergenceError, InputError, RankError


@dataclasses.dataclass(kw_only=True)
class Fruit(Arguments):
    """Fruit: what the basket holds."""

    name: str = flag(help="the fruit's name")
    weight: float = flag(0.5, "in kg, 50% water", above=0, at_most=100)
    count: int = flag(3, "how many", at_least=1, aliases=["number"])
    ripeness: Literal["green", "ripe"] = flag("ripe", "when to eat")
    grade: Literal[1, 2, 3] = flag(1, "commercial grade")
    peeled: bool = flag(False, "without peel")
    washed: bool = flag(True, "with water")
    from_where: str = flag("a shop", "shop, market or garden")
    places: list[str] = flag(["Spain", "Italy"], "where from")
    price: float | None = flag(None, "in euros", at_least=0)
    note: str | None = flag(None, "text on the box")

    def check(self) -> None:
        if self.peeled and not self.washed:
            raise InputError("--peeled needs --washed")


@dataclasses.dataclass(kw_only=True)
class Basket(Fruit):
    """Basket."""

    weight: float = 2.0
    handle: bool = flag(False, "with a handle")


def parse(*argv: str) -> Basket:
    return parse_config(Basket, ["--name", "apple", *argv])


def refusal(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The line on stderr with which `argv` is refused."""
    with pytest.raises(SystemExit) as stop:
        parse_config(Basket, list(argv))
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").rstrip()


def write_yaml(folder: Path, text: str, name: str = "flags.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- values and precedence -------------------------------------------------------------------------------------------


def test_defaults_and_narrowed_default():
    config = parse()
    assert (config.count, config.weight, config.places, config.washed) == (3, 2.0, ["Spain", "Italy"], True)


def test_list_defaults_are_not_shared():
    parse().places.append("France")
    assert parse().places == ["Spain", "Italy"]


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--weight", "5e-5"], "weight", 5e-5),
        (["--weight=1"], "weight", 1.0),
        (["--weight", "7."], "weight", 7.0),
        (["--count", "1e3"], "count", 1000),
        (["--number", "7"], "count", 7),
        (["--grade", "2"], "grade", 2),
        (["--peeled"], "peeled", True),
        (["--peeled", "false"], "peeled", False),
        (["--no_washed"], "washed", False),
        (["--places", "a", "b", "c"], "places", ["a", "b", "c"]),
        (["--from-where", "garden"], "from_where", "garden"),
        (["--ripeness", "green"], "ripeness", "green"),
        (["--price", "3"], "price", 3.0),
        (["--count", "1", "--count", "2"], "count", 2),
    ],
)
def test_values(argv, name, value):
    parsed = getattr(parse(*argv), name)
    assert parsed == value and type(parsed) is type(value)


def test_yaml_and_precedence(tmp_path):
    path = write_yaml(
        tmp_path,
        "name: pear\nweight: 5e-5\ncount: 1e1\npeeled: yes\nplaces: [x, y]\ngrade: 3\nprice: null\nnote: '007'\n",
    )
    config = parse_config(Basket, ["--config", path, "--grade", "2"])
    assert config == Basket(
        name="pear", weight=5e-5, count=10, peeled=True, places=["x", "y"], grade=2, price=None, note="007"
    )
    assert parse_config(Basket, ["--name", "kiwi", "--config", path]).name == "kiwi"


def test_command_line_wins_with_the_default_value(tmp_path):
    path = write_yaml(tmp_path, "name: pear\ncount: 9\nwashed: false\n")
    config = parse_config(Basket, ["--count", "3", "--config", path, "--washed", "true"])
    assert (config.count, config.washed) == (3, True)


def test_later_files_win_over_earlier_ones_and_the_command_line_over_all(tmp_path):
    first = write_yaml(tmp_path, "name: pear\ncount: 9\nweight: 7\nplaces: [x, y]\nnote: first\n", "first.yaml")
    second = write_yaml(tmp_path, "number: 8\nweight: 6\nplaces: [z]\n", "second.yaml")
    config = parse_config(Basket, ["--weight", "5", "--config", first, second])
    assert config == Basket(name="pear", count=8, weight=5.0, places=["z"], note="first")
    config = parse_config(Basket, ["--config", second, first, "--weight", "5"])
    assert config == Basket(name="pear", count=9, weight=5.0, places=["x", "y"], note="first")


def test_a_later_file_may_leave_out_what_an_earlier_one_gave(tmp_path):
    first = write_yaml(tmp_path, "name: pear\nnote: first\nprice: 3\n", "first.yaml")
    second = write_yaml(tmp_path, "note: null\nprice: null\n", "second.yaml")
    config = parse_config(Basket, ["--config", first, second])
    assert (config.note, config.price) == (None, None)


def test_an_error_in_one_of_several_files_names_that_file(tmp_path, capsys):
    good = write_yaml(tmp_path, "name: pear\n", "good.yaml")
    bad = write_yaml(tmp_path, "cuont: 9\n", "bad.yaml")
    for paths in ((good, bad), (bad, good)):
        assert refusal(capsys, "--config", *paths) == f"--config {bad}: unknown key 'cuont'; did you mean count?"


def test_yaml_alias_and_one_text_for_a_list(tmp_path):
    config = parse_config(Basket, ["--config", write_yaml(tmp_path, "name: fig\nnumber: 4\nplaces: Chile\n")])
    assert (config.count, config.places) == (4, ["Chile"])


def test_empty_yaml_changes_nothing(tmp_path):
    assert parse("--config", write_yaml(tmp_path, "# nothing\n")) == parse()


def test_saved_configuration_reads_back(tmp_path):
    config = parse("--weight", "1e-05", "--places", "Köln", "--note", "yes", "--no_washed")
    save_config(config, tmp_path / "run_config.yaml")
    assert parse_config(Basket, ["--config", str(tmp_path / "run_config.yaml")]) == config
    assert (tmp_path / "run_config.yaml").read_text(encoding="utf-8").startswith("# Fruit: what the basket holds\n")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nmae", "x"], "unknown flag --nmae; did you mean --name?"),
        (["--wieght=3"], "unknown flag --wieght; did you mean --weight?"),
        (["--xyzzy"], "unknown flag --xyzzy; --help lists all flags"),
        (["--coun", "3"], "unknown flag --coun; did you mean --count?"),
        ([], "--name is required: the fruit's name"),
        (["--name"], "--name: expected one argument"),
        (["--name", "a", "b"], "unrecognized arguments: b"),
        (["--name", "a", "--count", "many"], "--count: expected a whole number, got 'many'"),
        (["--name", "a", "--count", "1.5"], "--count: expected a whole number, got '1.5'"),
        (["--name", "a", "--count", "inf"], "--count: expected a whole number, got 'inf'"),
        (["--name", "a", "--weight", "1,5"], "--weight: expected a number, got '1,5'"),
        (["--name", "a", "--weight", "nan"], "--weight must be a finite number, got nan"),
        (["--name", "a", "--weight", "inf"], "--weight must be a finite number, got inf"),
        (["--name", "a", "--peeled", "maybe"], "--peeled: expected true or false, got 'maybe'"),
        (
            ["--name", "a", "--ripeness", "rip"],
            "--ripeness: unknown choice 'rip'; choose from green, ripe; did you mean ripe?",
        ),
        (["--name", "a", "--grade", "4"], "--grade: unknown choice '4'; choose from 1, 2, 3"),
        (["--name", "a", "--count", "0"], "--count must be at least 1, got 0"),
        (["--name", "a", "--count", "-4"], "--count must be at least 1, got -4"),
        (["--name", "a", "--weight", "0"], "--weight must be above 0, got 0.0"),
        (["--name", "a", "--weight", "-1e-5"], "--weight must be above 0, got -1e-05"),
        (["--name", "a", "--weight", "-.5E2"], "--weight must be above 0, got -50.0"),
        (["--name", "a", "--weight", "101"], "--weight must be at most 100, got 101.0"),
        (["--name", "a", "--price", "-1"], "--price must be at least 0, got -1.0"),
        (["--name", "a", "--peeled", "--no_washed"], "--peeled needs --washed"),
        (["--name", "a", "--places"], "--places: expected at least one argument"),
    ],
)
def test_refused_command_lines(argv, message, capsys):
    assert refusal(capsys, *argv) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: x", "unknown key 'nmae'; did you mean name?"),
        ("name: x\nripeness: rope", "ripeness: unknown choice 'rope'; choose from green, ripe; did you mean ripe?"),
        ("name: x\ncount: 2.5", "count: expected a whole number, got '2.5'"),
        ("name: x\ncount: true", "count: expected a whole number, got 'True'"),
        ("name: x\nweight: [1, 2]", "weight: expected a single value, got a list"),
        ("name: {a: 1}", "name: expected a single value, got a dict"),
        ("name: x\ncount:", "count: expected a single value, got nothing"),
        ("name: yes", "name: expected text, got True; put it in quotes"),
        ("count: 3\nnumber: 4", "'number' sets --count, which the file has set already"),
        ("- name", "expected lines like 'learning_rate: 1e-5', found a list"),
        ("config: other.yaml", "unknown key 'config'"),
        ("no_washed: true", "unknown key 'no_washed'; did you mean washed?"),
        ("3: x", "unknown key '3'"),
    ],
)
def test_refused_yaml(text, message, tmp_path, capsys):
    path = write_yaml(tmp_path, text)
    assert refusal(capsys, "--config", path) == f"--config {path}: {message}"


def test_broken_yaml_names_the_line(tmp_path, capsys):
    path = write_yaml(tmp_path, "name: x\nplaces: [a, b\ncount: 1\n")
    assert refusal(capsys, "--config", path).startswith(f"--config {path}, line 3: not valid YAML: ")


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("name: x\ncount: 1\ncount: 2\n", 3, "count"),
        ("name: x\ncount: 1\nname: x\n", 3, "name"),
        ("count: {a: 1, b: 2,\n a: 3}\nname: x\n", 2, "a"),
    ],
)
def test_a_key_that_comes_twice_is_refused_with_its_line(text, line, key, tmp_path, capsys):
    path = write_yaml(tmp_path, text)
    assert refusal(capsys, "--config", path) == f"--config {path}, line {line}: not valid YAML: {key!r} appears twice"


def test_unreadable_yaml(tmp_path, capsys):
    missing = str(tmp_path / "none.yaml")
    assert refusal(capsys, "--config", missing) == f"--config {missing}: cannot be read: No such file or directory"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in refusal(capsys, "--config", str(tmp_path / "binary.yaml"))


def test_yaml_errors_in_values_name_the_flag(tmp_path, capsys):
    assert (
        refusal(capsys, "--config", write_yaml(tmp_path, "name: x\ncount: -2")) == "--count must be at least 1, got -2"
    )


def test_python_callers_are_checked_too():
    for wrong in ({"ripeness": "rope"}, {"count": 0}, {"weight": float("nan")}, {"places": "Spain"}):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
            Basket(name="x", **wrong)


def test_other_processes_of_a_machine_stay_silent(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse_config(Basket, [])
    assert stop.value.code == 2 and capsys.readouterr().err == ""


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_is_grouped_and_says_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Basket, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Fruit: what the basket holds:" in text
    assert "in kg, 50% water (default: 2.0)" in text
    assert "--name TEXT the fruit's name (required)" in text
    assert "--count, --number INT how many (default: 3)" in text
    assert "--no_washed turn --washed off" in text
    assert "Basket: --handle with a handle" in text
    assert "(default: Spain Italy)" in text


# --- the entry point -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no data\nat all"), 2, "error: no data at all\n"),
        (RankError("a run of one process"), 2, "error: a run of one process\n"),
        (DivergenceError("step 3: loss is nan"), 3, "error: step 3: loss is nan\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_run_turns_errors_into_exit_codes(error, code, line, capsys):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, Basket, ["--name", "x"])
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_run_passes_the_configuration_and_other_errors_on():
    seen = []
    run(seen.append, Basket, ["--name", "x"])
    assert seen == [Basket(name="x")]

    def main(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, Basket, ["--name", "x"])


def test_run_destroys_the_process_group(monkeypatch):
    destroyed = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(True))

    def main(config):
        raise InputError("after the group exists")

    with pytest.raises(SystemExit):
        run(main, Basket, ["--name", "x"])
    assert destroyed == [True]


ONE_RANK_FAILS = '''
import dataclasses, sys, time, torch
from pathlib import Path
from utils.parallel import distributed
from utils.checkpoints.shards import open_shard
from utils.arguments import Arguments, flag, run

@dataclasses.dataclass(kw_only=True)
class Config(Arguments):
    """Nothing."""
    file: str = flag(help="one of DeepSpeed's files")

def main(config):
    distributed.init_distributed()
    torch.distributed.destroy_process_group = lambda: time.sleep(10_000)  # as it may where others are waiting
    if distributed.rank() == 1:
        open_shard(Path(config.file))
    distributed.barrier()

run(main, Config)
'''


def test_an_error_of_one_rank_is_told_by_that_rank_which_waits_for_nobody(tmp_path):
    torch.save(Path("an object, not plain data"), tmp_path / "shard.pt")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29643"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_RANK_FAILS, "--file", str(tmp_path / "shard.pt")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = ranks[1].communicate(timeout=60)[1]
        assert ranks[1].returncode == 2
        assert f"error: rank 1: {tmp_path / 'shard.pt'}: holds code" in errors and errors.count("error:") == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_interrupted_process_exits_with_130(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses, time\n"
        "from utils.arguments import Arguments, run\n"
        "@dataclasses.dataclass(kw_only=True)\n"
        "class Config(Arguments):\n    '''Nothing.'''\n"
        "def main(config):\n    print('started', flush=True)\n    time.sleep(60)\n"
        "run(main, Config)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "error: interrupted\n"
    assert process.returncode == 130
