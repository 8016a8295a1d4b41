"""The compiled library: built once for each machine by its own C++ compiler, loaded by ctypes.

PyTorch runs a transformer's small operations one by one, each with a pass over memory and a few microseconds of
overhead; in generation that is most of the time. The sources beside this file fuse them. They are plain C++ without
PyTorch's headers, so they compile in seconds. Without a compiler everything still works, only slower.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

from utils.files import atomic_path

SWITCH = "RLHF_CPU_KERNELS"  # environment variable; 0 turns the library off
SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
COMPILE_SECONDS = 300
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # supported dtypes, and the endings of the operations' names


class _Unavailable(Exception):
    """Why there is no library."""


def usable(tensor: torch.Tensor) -> bool:
    """Whether the operations exist for tensors like this one, and the library for this machine."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, compiled if this machine has not done so yet; None where that fails, which is reported once."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: no compiled CPU operations ({error}); PyTorch's own are used, which are slower", flush=True)
        return None


@functools.cache
def operation(name: str, dtype: torch.dtype, arguments: str):
    """The function `name` for tensors of `dtype`.

    Args:
        arguments: their types, one letter each: p for a pointer, i for an int64, f for a double.
    """
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}
    function = getattr(library(), f"{name}_{DTYPES[dtype]}")
    function.argtypes, function.restype = [types[letter] for letter in arguments], None
    return function


def _compiled() -> Path:
    """Path of the library; compiled beside its destination and renamed into place, so that processes may race."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")  # CXX may be "ccache g++"
    if not compiler or shutil.which(compiler[0]) is None:
        raise _Unavailable("found no C++ compiler: install g++, or set CXX")
    folder = _private_folder()
    path = folder / f"{_fingerprint(compiler)}.so"
    if not path.exists():
        with atomic_path(path) as unfinished:
            _compile([*compiler, *FLAGS, *map(str, SOURCES), "-o", str(unfinished)])
    return path


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _Unavailable(f"{command[0]} took more than {COMPILE_SECONDS} seconds") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise _Unavailable(f"{command[0]} failed: {lines[0].strip()}")


def _fingerprint(compiler: list[str]) -> str:
    """Changes with everything that the library depends on: sources, flags, compiler and processor."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = [version, *compiler, *FLAGS, torch.__version__, _processor()]
    parts += [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """The features of this machine's processor, which `-march=native` compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{os.uname().nodename} {os.uname().machine}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))}))


def _private_folder() -> Path:
    """Where libraries are kept: PyTorch's folder of compiled extensions, or one for this process alone.

    Code that others wrote there would run in this process, so only the user may have write access.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "rlhf_cpu_kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        status = None
    others_may_write = status is None or status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others_may_write or not os.access(folder, os.W_OK):
        return _temporary_folder()
    return folder


@functools.cache
def _temporary_folder() -> Path:
    """Removed when the process ends."""
    kept = tempfile.TemporaryDirectory(prefix="rlhf_cpu_kernels_")
    _temporary_folders.append(kept)
    return Path(kept.name)


_temporary_folders: list[tempfile.TemporaryDirectory] = []
