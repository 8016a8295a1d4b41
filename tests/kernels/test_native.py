"""The compiled library: where it is kept, when it is rebuilt, and what happens on machines that cannot build it."""

import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from processes import run_ranks

from utils.kernels import native

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="this machine has no C++ compiler")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where PyTorch keeps compiled extensions, empty; nothing is compiled or remembered yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    native.library.cache_clear()
    yield tmp_path / "rlhf_cpu_kernels"
    native.library.cache_clear()


def unavailable(capsys) -> str:
    assert native.library() is None and native.library() is None
    assert not native.usable(torch.zeros(1))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1, "said once"
    return printed[0]


def test_it_is_compiled_once_into_a_folder_of_the_users_own(folder):
    assert native.library() is not None
    (made,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = made.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [path.name for path in folder.iterdir()] == [made.name] and made.stat().st_mtime_ns == before


def test_it_is_compiled_anew_for_other_sources_and_other_flags(folder, monkeypatch, tmp_path):
    native.library()
    source = tmp_path / "decode.cpp"
    source.write_text(native.SOURCES[0].read_text() + "// changed\n")
    for header in native.HEADERS:
        shutil.copy(header, tmp_path)
    monkeypatch.setattr(native, "SOURCES", [source])
    native.library.cache_clear()
    native.library()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O1"))
    native.library.cache_clear()
    native.library()
    assert len(list(folder.iterdir())) == 3


def test_the_compiler_may_come_with_arguments(folder, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -DNOTHING")
    assert native.library() is not None


def test_a_folder_that_others_can_write_is_not_trusted(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert native.library() is not None
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_done_without(folder):
    folder.parent.rmdir()
    folder.parent.write_text("a file")
    assert native.library() is not None


def test_it_can_be_turned_off(folder, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library() is None and not folder.exists()


def test_without_a_compiler_pytorch_computes_and_one_line_says_so(folder, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "install g++" in unavailable(capsys)


def test_a_compiler_that_fails_is_named_with_its_first_error(folder, monkeypatch, capsys, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return undeclared_name; }\n")
    monkeypatch.setattr(native, "SOURCES", [broken])
    line = unavailable(capsys)
    assert "g++ failed" in line and "undeclared_name" in line
    assert not list(folder.iterdir()), "nothing half-written"


def test_a_compiler_that_hangs_is_left(folder, monkeypatch, capsys, tmp_path):
    compiler = tmp_path / "slow"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || sleep 60\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "COMPILE_SECONDS", 0.2)
    started = time.monotonic()
    assert "more than 0.2 seconds" in unavailable(capsys)
    assert time.monotonic() - started < 30


def compile_in(folder: str) -> bool:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    native.library.cache_clear()
    return native.library() is not None


def test_processes_may_race_for_it(tmp_path):
    assert run_ranks(compile_in, 2, str(tmp_path)) == [True, True]
    assert len(list((tmp_path / "rlhf_cpu_kernels").iterdir())) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_other_number_formats_are_left_to_pytorch(dtype):
    assert not native.usable(torch.zeros(1, dtype=dtype))
    assert not native.usable(torch.zeros(1, device="meta"))
