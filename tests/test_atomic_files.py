"""Files that appear whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest
from step_scripts import REPOSITORY

from utils.files import atomic_files, atomic_path

KILLED_WHILE_WRITING = """
import os, signal, sys
from utils.files import atomic_files

with atomic_files(sys.argv[1], replacing=[]) as temporary:
    (temporary / "model").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_files_of_an_earlier_run_that_match_are_removed_and_others_stay(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors", "notes.txt"):
        (tmp_path / name).write_text("old")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").touch()
    with atomic_files(tmp_path, replacing=["model*", "adapter"]) as temporary:
        (temporary / "model-1.safetensors").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-1.safetensors", "notes.txt"]
    assert (tmp_path / "model-1.safetensors").read_text() == "new"


def test_files_that_a_killed_process_left_are_removed_by_the_next(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, tmp_path], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("model"))) == 1
    with atomic_files(tmp_path, replacing=[]) as temporary:
        (temporary / "other").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_written_files_have_the_mode_that_the_umask_gives(tmp_path):
    previous = os.umask(0o027)
    try:
        with atomic_files(tmp_path, replacing=[]) as temporary:
            os.close(os.open(temporary / "private", os.O_CREAT, 0o600))
            (temporary / "folder").mkdir(mode=0o700)
    finally:
        os.umask(previous)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
