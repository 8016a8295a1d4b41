"""A command line is read, and refused, before the libraries are imported that take seconds."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from step_scripts import REPOSITORY, STEPS, required_models

HEAVY = ("torch", "transformers", "deepspeed")


def run_python(*argv: str, first: Path | None = None) -> subprocess.CompletedProcess:
    """Run the interpreter on `argv`; modules in the folder `first` hide those that are installed."""
    folders = [str(folder) for folder in (first, REPOSITORY) if folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "COLUMNS": "120"}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=120, env=environment)


def stand_ins(folder: Path, code: str) -> Path:
    """Modules in `folder` that execute `code` when they are imported, in the place of each heavy library."""
    for name in HEAVY:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code, encoding="utf-8")
    return folder


@pytest.fixture
def refusing(tmp_path) -> Path:
    # Not an ImportError, which code with a fallback for a missing library would catch.
    return stand_ins(tmp_path, "raise RuntimeError(f'{__name__} is imported')\n")


def test_the_package_of_flags_imports_no_heavy_library():
    code = f"import sys, utils.arguments; print(sorted(set({HEAVY}) & set(sys.modules)))"
    result = run_python("-c", code)
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize("step", STEPS)
def test_help_and_misspelt_flags_are_answered_without_heavy_libraries(step, refusing):
    result = run_python(str(STEPS[step]), "--help", first=refusing)
    assert (result.returncode, result.stderr) == (0, "")
    title = ast.get_docstring(ast.parse(STEPS[step].read_text(encoding="utf-8"))).splitlines()[0]
    assert title.startswith("Step ") and title in result.stdout and "--output_dir" in result.stdout

    result = run_python(str(STEPS[step]), *required_models(step), "--ouput_dir", "x", first=refusing)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown flag --ouput_dir; did you mean --output_dir?\n"

    result = run_python(str(STEPS[step]), first=refusing)
    assert result.returncode == 2 and "_name_or_path is required: " in result.stderr

    # A valid command line does import the libraries: the stand-ins are in effect.
    result = run_python(str(STEPS[step]), *required_models(step), first=refusing)
    assert result.returncode == 1 and " is imported" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("step", STEPS)
def test_an_interruption_of_the_imports_is_one_line(step, tmp_path):
    code = f"import os, time\nos.kill(os.getpid(), {int(signal.SIGINT)})\ntime.sleep(60)\n"
    result = run_python(str(STEPS[step]), *required_models(step), first=stand_ins(tmp_path, code))
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")
