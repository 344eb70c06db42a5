"""Ctrl-C and SIGTERM: the first asks for an orderly end, the second Ctrl-C ends at once."""

import os
import signal
import threading
import time


class Interrupt:
    """While entered, `requested` is True once SIGINT or SIGTERM has come.

    A second SIGINT raises KeyboardInterrupt; what arrives within a second of the first counts as the same, because
    torchrun passes on what the terminal has already sent. Outside of the main thread, where Python handles no signals,
    none is noticed.
    """

    def __init__(self, announce: bool):
        self.requested = False
        self._announce, self._since, self._previous = announce, 0.0, {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            if self._announce:  # print() is not re-entrant, and may be what was interrupted
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: finishing this step and saving; Ctrl-C again stops at once\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
