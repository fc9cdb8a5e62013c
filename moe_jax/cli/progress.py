"""Progress bars for operations that count bytes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moe_jax.cli.output import format_bytes, remark, stderr_console

if TYPE_CHECKING:
    from moe_jax.checkpoints import Progress as ByteProgress


@contextlib.contextmanager
def byte_progress(description: str) -> Iterator[Callable[["ByteProgress"], None]]:
    """A callback that shows bytes, rate and time left on standard error; without a terminal there, no bar is drawn.

    An operation that goes on from an interrupted run says so in one line.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = stderr_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(description, total=None)
        started = False

        def show(progress: "ByteProgress") -> None:
            nonlocal started
            if not started and progress.done_bytes:
                done, total = format_bytes(progress.done_bytes), format_bytes(progress.total_bytes)
                remark(f"going on from an interrupted run: {done} of {total} are done")
            started = True
            bars.update(task, completed=progress.done_bytes, total=progress.total_bytes)

        yield show
