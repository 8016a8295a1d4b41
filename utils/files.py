"""Atomic writes: a file is written beside its destination and renamed into place, so it appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

_UNFINISHED = ".unfinished.tmp"  # a fixed name, so that the next write removes what a killed process left behind


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write a file or a folder to; rename it to `path` if the block succeeds.

    An existing file is replaced; an existing folder is moved aside first and removed once the new one is in place. If
    the block raises, the temporary sibling is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            replaced = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_files(folder: str | os.PathLike, *, replacing: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder; if the block succeeds, rename each of its files into `folder`, beside what is there.

    Entries of `folder` that match one of the glob patterns `replacing` and were not written again belong to the old
    version and are removed. If the block raises, `folder` stays as it was. All files get the usual mode of new files,
    which some writers (safetensors) do not set. Only one process at a time may write into `folder`.
    """
    folder = Path(folder)
    temporary = folder / _UNFINISHED
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _usual_modes(temporary)
        written = sorted(temporary.iterdir())
        for file in written:
            if file.is_dir() and (folder / file.name).exists():
                shutil.rmtree(folder / file.name)
            os.replace(file, folder / file.name)
        stale = {path for pattern in replacing for path in folder.glob(pattern)}
        for path in stale - {folder / file.name for file in written}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(temporary)


def _usual_modes(folder: Path) -> None:
    """Give everything inside `folder` the mode that the process's umask gives to new files and folders."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def try_writing(folder: Path) -> None:
    """Like `make_writable`, but folders that it had to create are removed again. Raises OSError in the same cases."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_writable(folder)
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def make_writable(folder: Path) -> None:
    """Create `folder` if it is missing, and test that files can be created in it. Raises OSError where they cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
