"""The Hugging Face hub: a quick check whether it can be reached, which a library takes half a minute to find out."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit


def is_reachable(timeout_s: float = 3.0) -> bool:
    """Whether the hub can be reached: HF_HUB_OFFLINE does not forbid it, and its host answers or a proxy is set."""
    if is_switched_off():
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("ALL_PROXY"):
        return True
    endpoint = _endpoint()
    try:
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        with socket.create_connection((host(), port), timeout=timeout_s):
            return True
    except OSError:
        return False


def is_switched_off() -> bool:
    """Whether HF_HUB_OFFLINE forbids connections."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def host() -> str:
    """Host name of the hub's endpoint."""
    return _endpoint().hostname or ""


def _endpoint():
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Make `datasets` and `huggingface_hub` look in their caches only, as HF_HUB_OFFLINE=1 at start would."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def looks_local(name: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a name that is not an existing path was meant as one: names on the hub have at most one, inner slash.

    Args:
        suffixes: file name endings that mark a name as a path.
    """
    in_existing_folder = "/" in name and Path(name).expanduser().parent.is_dir()
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return is_path or in_existing_folder or (bool(suffixes) and name.endswith(suffixes))
