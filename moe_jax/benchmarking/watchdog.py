"""Ends the process when something takes too long: a kernel that waits for ever can't be interrupted."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

HUNG, TIME_OVER = 3, 4
"""The process's exit status then: one step took far too long, or all steps together took longer than they were given."""


@contextlib.contextmanager
def watch(what: str, seconds: float, last_words: Callable[[str], None], status: int = HUNG) -> Iterator[None]:
    """Give the block so many seconds; then, in another thread, call `last_words` with what hung and end the process."""

    def give_up() -> None:
        try:
            last_words(f"{what}: not done after {seconds:.3g} s")
        finally:
            os._exit(status)

    timer = threading.Timer(max(seconds, 0), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
