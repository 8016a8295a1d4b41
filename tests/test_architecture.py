"""The structure of the project, read from syntax trees: imports point one way, and names say what modules contain."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
UTILS = REPOSITORY / "utils"
SOURCES = sorted(path for folder in ("utils", "training", "scripts") for path in (REPOSITORY / folder).rglob("*.py"))

# Each may import what stands before it, and nothing else of `utils`.
ORDER = [
    *("errors", "files", "hub", "arguments", "output", "kernels", "algorithms", "parallel"),
    *("chat_templates", "data", "checkpoints"),
    *("models", "runs", "generation", "rewards", "rlhf", "preference", "preflight", "inspection", "toy", "sweeps"),
]
# What a package must not import, although the order above would allow it.
FORBIDDEN_IMPORTS = {
    "utils": ["training", "scripts", "tests"],
    "utils.arguments": ["torch", "transformers", "datasets", "peft", "numpy"],  # `--help` answers immediately
    "utils.kernels": ["utils.arguments", "utils.output", "transformers"],
    "utils.algorithms": ["utils.arguments", "utils.output", "transformers", "datasets", "peft"],
    "utils.data": ["utils.output", "peft"],
    "utils.models": ["utils.data", "utils.checkpoints"],
    "utils.toy": ["utils.models", "utils.generation", "utils.rewards", "utils.rlhf", "utils.preflight"],
    "training": ["training", "scripts", "tests"],
}
MAY_IMPORT_DEEPSPEED = ("utils.parallel", "scripts.debug_deepspeed")
MOST_FILES_IN_A_FOLDER = 18
LINES_OF_THE_STEPS = {
    "step1_supervised_finetuning": 180,
    "step2_reward_model_finetuning": 180,
    "step2_dpo_finetuning": 220,
    "step3_rlhf_finetuning": 220,
}
# The verbs of step 3, in the order in which one iteration of its loop calls them.
VERBS = ["respond", "plan_batches", "reward", "score_tokens", "estimate_advantages", "update"]
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
    modules = imported_modules(path)
    for package, forbidden in FORBIDDEN_IMPORTS.items():
        if within(name, package):
            wrong = {module for module in modules if any(within(module, other) for other in forbidden)}
            assert not wrong, f"{package} must not import {sorted(wrong)}"
    if within(name, "utils") and name != "utils":
        later = ORDER[ORDER.index(name.split(".")[1]) + 1 :]
        wrong = {module for module in modules if any(within(module, f"utils.{other}") for other in later)}
        assert not wrong, f"{name} stands beneath {sorted(wrong)}"


def test_the_order_names_every_package():
    assert {module_name(path).split(".")[1] for path in UTILS.rglob("*.py") if path.parent != UTILS} <= set(ORDER)


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


def test_folders_and_steps_stay_small():
    for folder in {path.parent for path in SOURCES if UTILS in path.parents}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES_IN_A_FOLDER, folder
    for folder, limit in LINES_OF_THE_STEPS.items():
        lines = (REPOSITORY / "training" / folder / "main.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= limit, folder


def test_the_loop_of_step_3_tells_the_algorithm():
    """The six verbs are called in `main` itself, one after the other, at most three levels deep."""
    tree = ast.parse((REPOSITORY / "training" / "step3_rlhf_finetuning" / "main.py").read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    calls = [
        (node.lineno, node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func))
        for node in ast.walk(main)
        if isinstance(node, ast.Call)
    ]
    assert [name for _, name in sorted(calls) if name in VERBS] == VERBS
    assert deepest(main) <= 3


def deepest(node: ast.AST) -> int:
    """Levels of loops, branches and `with` blocks within a function."""
    nests = isinstance(node, ast.For | ast.While | ast.If | ast.With | ast.Try)
    return nests + max((deepest(child) for child in ast.iter_child_nodes(node)), default=0)


@pytest.mark.parametrize("path", SOURCES, ids=by_name)
def test_no_traps(path):
    """No pickle, no shell, no bare except, and no handler that silently swallows every exception."""
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
