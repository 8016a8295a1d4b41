"""Run or debug a training script from an IDE, in this process or through DeepSpeed's launcher.

    python scripts/debug_deepspeed.py training/step1_supervised_finetuning/main.py --model_name_or_path ...
    python scripts/debug_deepspeed.py --num_gpus 2 training/step1_supervised_finetuning/main.py ...
    python scripts/debug_deepspeed.py --debug_host 127.0.0.1 --debug_port 5678 training/...

PyCharm's remote interpreter starts this file like any other script, so its "Debug" button stops at breakpoints: in this
process without --num_gpus, and in the launcher's processes with it (PyCharm: "Attach to subprocess automatically").
With --debug_host, the process of --debug_rank connects to a "Python Debug Server" that waits in PyCharm instead.

A run configuration of DeepSpeed-Chat or alpaca-rlhf works as it is: a path that does not exist and ends in the folder
and main.py of a step, such as step2_reward_model_finetuning/main.py, is replaced by the step of that name here.
"""

import argparse
import importlib.util
import os
import re
import runpy
import socket
import sys
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINING = REPOSITORY / "training"


def main(argv: list[str] | None = None) -> None:
    """Start the script that `argv` names. Exits with the script's or the launcher's exit code; 2 for a wrong flag."""
    options = _parse(argv)
    _prepare_environment()
    script = _find(options.script)
    if options.debug_host and importlib.util.find_spec("pydevd_pycharm") is None:
        _stop(
            "--debug_host needs PyCharm's debugger in this interpreter; install the version that the run configuration "
            "'Python Debug Server' shows, such as: pip install pydevd-pycharm~=252.23892"
        )
    if options.num_gpus is not None:
        _refuse_wrong_flags(options, script)
        _launch(options, script)
    else:
        _run_here(options, script)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num_gpus", type=int, help="start DeepSpeed's launcher with this many processes (CPUs too)")
    parser.add_argument("--debug_host", help="machine on which a Python Debug Server waits")
    parser.add_argument("--debug_port", type=int, default=5678, help="its port (default: %(default)s)")
    parser.add_argument("--debug_rank", type=int, default=0, help="the rank that connects (default: %(default)s)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher puts it before all other arguments
    parser.add_argument("script", help="script to run; relative to the working directory or to the repository")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own flags")
    options = parser.parse_args(argv)
    if options.num_gpus is not None and options.num_gpus < 1:
        _stop(f"--num_gpus {options.num_gpus}: give 1 or more, or leave it out to run in this process")
    return options


def _find(name: str) -> Path:
    for path in (Path(name), REPOSITORY / name):
        if path.is_file():
            return path.resolve()
    meant = _steps_named(step[1]) if (step := re.search(r"(?:^|/)(step\d+_\w+)/main\.py$", name)) else []
    if len(meant) == 1:
        print(f"{name} does not exist here; running training/{meant[0]}/main.py instead", file=sys.stderr)
        return TRAINING / meant[0] / "main.py"
    which = f"; training/ has {' and '.join(meant)}: name one of them" if meant else ""
    _stop(f"no such script: {name} (looked in {Path.cwd()} and in {REPOSITORY}){which}")


def _steps_named(folder: str) -> list[str]:
    """The step's folder of that name, else all that begin with the same number ("step2_")."""
    from utils.arguments.steps import CONFIGS

    number = folder.split("_")[0]
    return [folder] if folder in CONFIGS else [name for name in CONFIGS if name.split("_")[0] == number]


def _refuse_wrong_flags(options: argparse.Namespace, script: Path) -> None:
    """Exit with one line for flags that the step rejects; the launcher would bury that line under its own output."""
    from utils.arguments import parse_config
    from utils.arguments.steps import CONFIGS

    if script.parent.parent == TRAINING and script.parent.name in CONFIGS:
        parse_config(CONFIGS[script.parent.name], options.arguments)


def _prepare_environment() -> None:
    """Set the paths that an activated environment and an installed project have; a remote interpreter may lack them."""
    tools = str(Path(sys.executable).parent)  # holds ninja, with which DeepSpeed compiles its extensions
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")]).rstrip(os.pathsep)
    packages = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(package for package in packages if package))
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))


def _launch(options: argparse.Namespace, script: Path) -> None:
    """Run the launcher in this process. With --debug_host its workers run this file again, and one of them connects."""
    command = [str(script), *options.arguments]
    if options.debug_host:
        server = ["--debug_host", options.debug_host, "--debug_port", str(options.debug_port)]
        command = [str(Path(__file__).resolve()), *server, "--debug_rank", str(options.debug_rank), *command]
    from deepspeed.launcher import runner

    runner.main(["--num_gpus", str(options.num_gpus), "--master_port", str(_free_port()), *command])


def _run_here(options: argparse.Namespace, script: Path) -> None:
    if options.debug_host and int(os.environ.get("RANK", "0")) == options.debug_rank:
        import pydevd_pycharm

        pydevd_pycharm.settrace(options.debug_host, port=options.debug_port, suspend=False)
    local_rank = [] if options.local_rank is None else [f"--local_rank={options.local_rank}"]
    sys.argv = [str(script), *local_rank, *options.arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
