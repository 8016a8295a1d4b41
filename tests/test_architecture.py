"""The shape of the house, read off the syntax trees: imports point one way, and names say what modules hold."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
UTILS = REPOSITORY / "utils"
SOURCES = sorted(path for folder in ("utils", "training", "scripts") for path in (REPOSITORY / folder).rglob("*.py"))

# What the modules under a name must not import: kernels <- algorithms <- data, models <- rlhf <- preflight <- training,
# scripts. The modules directly in utils lie beneath the packages, except that every package may use the algorithms.
FORBIDDEN_IMPORTS = {
    "utils": ["training", "scripts", "tests"],
    "utils.algorithms": [
        *("utils.data", "utils.models", "utils.rlhf", "utils.preflight", "utils.toy"),
        *("utils.config", "utils.arguments"),
        *("utils.distributed", "utils.zero", "utils.metrics", "transformers", "datasets", "peft"),
    ],
    "utils.kernels": [
        *("utils.algorithms", "utils.data", "utils.models", "utils.rlhf", "utils.preflight", "utils.toy"),
        *("utils.config", "utils.arguments", "utils.distributed", "transformers"),
    ],
    "utils.data": ["utils.models", "utils.rlhf", "utils.preflight", "utils.toy"],
    "utils.models": ["utils.data", "utils.rlhf", "utils.preflight", "utils.toy"],
    "utils.rlhf": ["utils.preflight", "utils.toy"],
    "utils.preflight": ["utils.toy"],
    "utils.toy": ["utils.models", "utils.rlhf", "utils.preflight"],
    "utils.arguments": ["torch", "utils.config", "utils.data", "utils.models", "utils.rlhf", "utils.preflight"],
    "training": ["training", "scripts", "tests"],
}
MAY_IMPORT_DEEPSPEED = ("utils.distributed", "utils.zero", "utils.models", "utils.rlhf", "scripts.debug_deepspeed")
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "functions"}
FORBIDDEN_CALLS = {"eval", "exec", "breakpoint"}
FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "shelve")
HARMLESS_IMPORT = "from pickle import UnpicklingError"  # what torch raises for a file that brings code


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Full names of imported modules, wherever in the file; for `from a import b` both `a` and `a.b`."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and ast.unparse(node) != HARMLESS_IMPORT:
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            modules.update([source, *(f"{source}.{alias.name}" for alias in node.names)])
    return modules


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def by_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", SOURCES, ids=by_name)
def test_imports_point_one_way(path):
    name = module_name(path)
    for package, forbidden in FORBIDDEN_IMPORTS.items():
        if within(name, package):
            wrong = {module for module in imported_modules(path) if any(within(module, other) for other in forbidden)}
            assert not wrong, f"{package} must not import {sorted(wrong)}"


def test_modules_beneath_the_packages_do_not_import_them():
    for path in UTILS.glob("*.py"):
        wrong = {
            module
            for module in imported_modules(path)
            if any(within(module, f"utils.{package}") for package in ("data", "models", "rlhf", "preflight", "toy"))
        }
        assert not wrong, f"{path.name} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=by_name)
def test_only_engines_import_deepspeed(path):
    uses_deepspeed = any(within(module, "deepspeed") for module in imported_modules(path))
    allowed = any(within(module_name(path), module) for module in MAY_IMPORT_DEEPSPEED)
    assert allowed or not uses_deepspeed


@pytest.mark.parametrize("step", sorted((REPOSITORY / "training").glob("step*/main.py")), ids=by_name)
def test_steps_do_not_know_each_other(step):
    own = step.parent.name
    others = {folder.name for folder in (REPOSITORY / "training").glob("step*")} - {own}
    modules = imported_modules(step)
    assert not any(other in module for other in others for module in modules)
    names = {node.id for node in ast.walk(ast.parse(step.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"runpy", "importlib"}


def test_module_names_say_what_they_hold():
    names = {path.stem for path in SOURCES} | {
        path.name for path in UTILS.rglob("*") if path.is_dir() and path.name != "__pycache__"
    }
    assert not names & FORBIDDEN_NAMES


def test_files_stay_short():
    limits = {"step1_supervised_finetuning": 200, "step2_reward_model_finetuning": 220, "step3_rlhf_finetuning": 260}
    for folder, limit in limits.items():
        lines = (REPOSITORY / "training" / folder / "main.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= limit, folder


@pytest.mark.parametrize("path", SOURCES, ids=by_name)
def test_no_traps(path):
    """No pickle, no shell, no bare except, and no exception swallowed without a word."""
    assert not any(within(module, forbidden) for module in imported_modules(path) for forbidden in FORBIDDEN_MODULES)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            passes = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert caught, f"line {node.lineno}: bare except"
            assert not (passes and caught in ("Exception", "BaseException")), f"line {node.lineno}: swallows everything"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"line {node.lineno}: {called}"
            set_to = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert set_to.get("shell") != "True", f"line {node.lineno}: a shell"
            assert set_to.get("weights_only") != "False", f"line {node.lineno}: reads a pickle"


@pytest.mark.parametrize("path", [path for path in SOURCES if UTILS in path.parents], ids=by_name)
def test_modules_have_docstrings(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
