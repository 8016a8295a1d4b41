import multiprocessing
import os
import time
from pathlib import Path

import pytest

from utils.data.rows.cache import ROW_FORMAT, cached_folder, key_of, private_folder
from utils.errors import InputError, RankError


def fill(folder: Path) -> None:
    (folder / "rows").write_text("whole")


def test_the_folder_is_private_even_below_a_public_one(tmp_path):
    tmp_path.chmod(0o777)
    folder = private_folder(tmp_path)
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert private_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    assert tmp_path.stat().st_mode & 0o777 == 0o777  # the user's own folder is not touched


def test_the_default_is_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert private_folder(None) == tmp_path / "cache" / "threestep-rlhf"
    assert private_folder("") == private_folder(None)


def test_a_place_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--data_output_path: cannot use .*file"):
        private_folder(tmp_path / "file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"threestep-rlhf-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is not the user's own folder"):
        private_folder(tmp_path)


def test_keys_follow_content():
    assert key_of({"a": 1, "b": [1.0]}) == key_of({"b": [1.0], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_keys_follow_the_number_of_the_row_format_and_no_source_file(monkeypatch):
    key = key_of({"a": 1})

    def refuse(*args, **__):
        raise AssertionError(f"a file was read: {args}")

    for function in ("builtins.open", "io.open", "os.open", "os.listdir", "os.scandir"):
        monkeypatch.setattr(function, refuse)
    assert key_of({"a": 1}) == key
    monkeypatch.setattr("utils.data.rows.cache.ROW_FORMAT", ROW_FORMAT + 1)
    assert key_of({"a": 1}) != key


def test_an_entry_is_built_once(tmp_path):
    folder = cached_folder(tmp_path, "key", fill, is_writer=True, timeout_s=1)
    assert (folder / "rows").read_text() == "whole"

    def fail(folder: Path) -> None:
        raise AssertionError("built twice")

    for is_writer in (True, False):
        assert cached_folder(tmp_path, "key", fail, is_writer=is_writer, timeout_s=1) == folder
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_a_writer_that_fails_leaves_nothing_half_written(tmp_path):
    def fail(folder: Path) -> None:
        fill(folder)
        raise InputError("a.jsonl, line 3: bad")

    with pytest.raises(InputError, match="line 3"):
        cached_folder(tmp_path, "key", fail, is_writer=True, timeout_s=1)
    assert [file.name for file in tmp_path.iterdir()] == ["key.lock"]
    assert (cached_folder(tmp_path, "key", fill, is_writer=True, timeout_s=1) / "rows").exists()


def test_waiting_ends_with_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(RankError, match=f"waited 0 s .* in {tmp_path / 'key'}; .*--data_output_path"):
        cached_folder(tmp_path, "key", fill, is_writer=False, timeout_s=0.1)


def use_cache(cache: Path, is_writer: bool, fails: bool, seconds: float, outcome: Path) -> None:
    """What one process does: get the entry, which takes so long to build, and write the outcome to a file."""

    def build(folder: Path) -> None:
        with open(cache / "built", "a") as log:
            log.write("once ")
        (folder / "rows").write_text("half")
        time.sleep(seconds)
        if fails:
            raise InputError("bad data")
        fill(folder)

    outcome.with_suffix(".began").touch()
    try:
        folder = cached_folder(cache, "key", build, is_writer=is_writer, timeout_s=60)
        outcome.write_text((folder / "rows").read_text())
    except InputError as error:
        outcome.write_text(f"error: {error}")


@pytest.fixture
def start(tmp_path):
    """Start a process that uses the cache; returns it and the file with its outcome."""
    # Not a fork of this process: what other tests have mapped may be more than the system promises a second time.
    context = multiprocessing.get_context("forkserver")
    started = []

    def call(*, is_writer: bool, fails: bool = False, seconds: float = 2.0):
        outcome = tmp_path / f"outcome-{len(started)}"
        process = context.Process(target=use_cache, args=(tmp_path, is_writer, fails, seconds, outcome))
        process.start()
        started.append(process)
        return process, outcome

    yield call
    for process in started:
        process.kill()


def outcomes(*started) -> list[str]:
    for process, _ in started:
        process.join(timeout=90)
    return [outcome.read_text() for _, outcome in started]


def test_processes_that_wait_and_a_second_writer_get_what_one_writes(tmp_path, start):
    assert outcomes(*(start(is_writer=is_writer) for is_writer in (False, True, True, False))) == ["whole"] * 4
    assert (tmp_path / "built").read_text() == "once "


def test_processes_that_wait_stop_when_the_writer_fails(tmp_path, start):
    written, waited = outcomes(start(is_writer=True, fails=True), start(is_writer=False))
    assert written == "error: bad data"
    assert (
        waited
        == f"error: the process that prepares the data stopped before {tmp_path / 'key'} was complete; see its message"
    )


def test_processes_that_wait_stop_when_the_writer_is_killed(tmp_path, start):
    reader, writer = start(is_writer=False), start(is_writer=True, seconds=60.0)
    while not ((tmp_path / "built").exists() and reader[1].with_suffix(".began").exists()):
        time.sleep(0.01)
    time.sleep(0.5)
    writer[0].kill()
    assert "stopped before" in outcomes(reader)[0]
    # Nothing blocks the next run.
    assert outcomes(start(is_writer=True)) == ["whole"]
