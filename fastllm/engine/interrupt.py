"""Ctrl-C between steps instead of within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class InterruptGuard:
    """While entered, the first Ctrl-C waits: KeyboardInterrupt is raised when the block is left.

    A step is short, and most of it is compiled code that could not be interrupted anyway; what surrounds
    that must happen as a whole, or tokens would be lost. A second Ctrl-C within the block is raised at once.
    The block may be entered again from within. Does nothing outside the main thread (Python delivers no
    signals there), nor where the program has installed a handler of its own.
    """

    __slots__ = ("_depth", "_installed", "_pending")

    def __init__(self) -> None:
        self._depth = 0
        self._installed = False
        self._pending = False

    def __enter__(self) -> None:
        if (
            self._depth == 0
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._note)  # an interrupt until here leaves all as it was
            self._installed = True
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth or not self._installed:
            return
        self._installed = False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending:
            signal.default_int_handler(number, frame)
        self._pending = True
