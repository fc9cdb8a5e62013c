"""Ctrl-C ends the command wherever it arrives."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
"""The file that Python gives in tracebacks for what runs modules."""
_PAUSE_SECONDS = 0.05


@contextlib.contextmanager
def interrupts_not_lost() -> Iterator[None]:
    """Within it, Ctrl-C arrives again a moment later where its KeyboardInterrupt would not end the command.

    - While modules are imported: an extension that is interrupted raises ImportError or ends the process.
    - In a callback of the garbage collector, as jax has one: Python goes on after any exception in it.
    """
    hook_before, handler_before = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers, and a shell that starts a command in the background has Ctrl-C ignored.
    sets_handler = (
        threading.current_thread() is threading.main_thread() and handler_before is signal.default_int_handler
    )
    pending: list[threading.Timer] = []

    def repeat() -> None:
        if not pending:
            pending.append(threading.Timer(_PAUSE_SECONDS, send))
            pending[0].start()

    def send() -> None:
        pending.clear()
        os.kill(os.getpid(), signal.SIGINT)

    def handler(number: int, frame: FrameType | None) -> None:
        if is_importing(frame):
            repeat()
        else:
            signal.default_int_handler(number, frame)

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            repeat()
        else:
            hook_before(unraisable)

    sys.unraisablehook = hook
    if sets_handler:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        if sets_handler:
            signal.signal(signal.SIGINT, handler_before)
        for timer in pending:
            timer.cancel()


def is_importing(frame: FrameType | None) -> bool:
    """Whether what runs in `frame` was called while a module is imported."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False
