"""SIGTERM and Ctrl-C: the first asks the run to stop after its step, the second stops it immediately."""

import contextlib
import os
import signal
import threading
import time

# A launcher that is interrupted passes the signal on to processes that may have received it themselves.
SAME_REQUEST_SECONDS = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While active, `name` is the signal that has asked to stop, or empty.

    A second signal, more than `SAME_REQUEST_SECONDS` after the first, ends the process with 128 + its number.
    """

    def __init__(self) -> None:
        self.name = ""
        self._received_at = 0.0
        self._previous: dict[int, object] = {}

    def activate(self) -> None:
        """Install the handlers; only the main thread can, so elsewhere the signals keep their default behaviour."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def deactivate(self) -> None:
        """Restore the former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.name and now - self._received_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        if not self.name:
            self.name, self._received_at = signal.Signals(number).name, now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                with contextlib.suppress(OSError):  # Ctrl-C also ends a program that reads our output
                    os.write(2, f"{self.name}: stopping after this step; a second signal stops immediately\n".encode())
