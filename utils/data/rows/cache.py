"""Folders of prepared data, named by a hash of all that went into them: written once, whole, by one process.

The cache is private to its user, so that nobody else can put data there. Entries hold Arrow files and JSON, which are
pure data. One process builds an entry under a lock and renames it into place; the others poll for it rather than wait
in a collective, whose timeout a long tokenisation would exceed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.errors import InputError, RankError
from utils.files import atomic_path

_NAME = "threestep-rlhf"
# The format of prepared rows. Raise it with every change of this package that changes which rows are prepared from the
# same data, or their ids: the cache then prepares them again, and a checkpoint of a run on other rows is refused.
ROW_FORMAT = 2
WAIT_SECONDS = 7200.0  # for another process to prepare the data


def private_folder(parent: str | os.PathLike | None) -> Path:
    """The user's own folder (mode 0700) below `parent`, or in the user's cache folder; made if missing.

    Raises InputError if it cannot be made or belongs to someone else.
    """
    if parent is None or str(parent) == "":
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / _NAME
    else:
        folder = Path(parent).expanduser() / f"{_NAME}-{os.getuid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if folder.is_symlink() or status.st_uid != os.getuid():
            raise InputError(f"--data_output_path: {folder} is not the user's own folder; choose another place")
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise InputError(f"--data_output_path: cannot use {folder} ({error.strerror}); choose another place") from error
    return folder


def key_of(content: dict[str, Any]) -> str:
    """A name for what `content` (JSON values) describes, in the current row format."""
    numbered = {"format": ROW_FORMAT, **content}
    return hashlib.sha256(json.dumps(numbered, sort_keys=True).encode()).hexdigest()[:32]


def cached_folder(
    cache: Path, key: str, build: Callable[[Path], None], *, is_writer: bool, timeout_s: float = WAIT_SECONDS
) -> Path:
    """The folder `cache/key`, filled by `build(folder)` if it is not there yet.

    A writer takes the entry's lock, so that of several writers one builds and the others find its result; a writer that
    fails leaves nothing. A process that is not a writer waits up to `timeout_s` seconds for the folder.
    Raises RankError if it does not appear in time, InputError if the writer stops without having made it.
    """
    folder = cache / key
    if is_writer and not folder.is_dir():
        with _lock(cache / f"{key}.lock"):
            if not folder.is_dir():
                with atomic_path(folder) as temporary:
                    temporary.mkdir(mode=0o700)
                    build(temporary)
    elif not folder.is_dir():
        _wait_for(folder, cache / f"{key}.lock", timeout_s)
    return folder


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on `file`; the system releases it if the process ends in any way.

    The file is removed on success only: whoever waits for the lock then finds the entry, and two never build at once.
    """
    with open(file, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            # A file system without locks: two writers would build the same entry, and one would replace the other's.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
        file.unlink(missing_ok=True)


def _is_locked(file: Path) -> bool:
    try:
        with open(file) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False  # no lock file yet, or a file system without locks


def _wait_for(folder: Path, lock: Path, timeout_s: float) -> None:
    deadline, pause, writer_seen = time.monotonic() + timeout_s, 0.02, False
    while not folder.is_dir():
        if _is_locked(lock):
            writer_seen = True
        elif writer_seen and not folder.is_dir():
            raise InputError(
                f"the process that prepares the data stopped before {folder} was complete; see its message"
            )
        if time.monotonic() > deadline:
            raise RankError(
                f"waited {timeout_s:.0f} s for another process to prepare the data in {folder}; if it runs on another "
                "machine, --data_output_path must be a folder that both share"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)
