"""A conversion or export in a process of its own, which is killed at a chosen moment or may not write much.

Processes are forked from a server that has imported everything once: importing takes far longer than converting.
"""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["moe_jax.checkpoints.conversion", "moe_jax.checkpoints.orbax_part", "moe_jax.checkpoints.exporting"]
)


def run_killed_after(seconds: float | None, source: Path, output: Path, options: Mapping[str, Any]) -> int | None:
    """Convert, and kill the process after `seconds` (None: never); its exit code, -9 if it was killed."""
    process = _SERVER.Process(target=_convert, args=(source, output, options, None))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def run_killed_at_rename(
    destination: Path, after: bool, source: Path, output: Path, options: Mapping[str, Any]
) -> int | None:
    """Convert; the process kills itself just before, or just after, something is renamed to `destination`."""
    process = _SERVER.Process(target=_convert, args=(source, output, options, (destination, after)))
    process.start()
    process.join()
    return process.exitcode


def run_with_small_files(command: str, largest_file: int, source: Path, output: Path) -> str | None:
    """Run "convert" or "export" where files may not grow beyond that; the message of its CheckpointError, or None."""
    receiving, sending = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_write_small_files, args=(command, largest_file, source, output, sending))
    process.start()
    sending.close()
    process.join()
    return receiving.recv()


def _write_small_files(command: str, largest_file: int, source: Path, output: Path, sending: Any) -> None:
    from moe_jax import checkpoints

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        getattr(checkpoints, command)(source, output)
    except checkpoints.CheckpointError as error:
        sending.send(str(error))
    else:
        sending.send(None)


def _convert(source: Path, output: Path, options: Mapping[str, Any], kill: tuple[Path, bool] | None) -> None:
    from moe_jax.checkpoints import convert

    if kill is not None:
        for name in ("rename", "replace"):
            setattr(os, name, _killing(getattr(os, name), *kill))
    convert(source, output, **options)


def _killing(rename: Callable[..., None], destination: Path, after: bool) -> Callable[..., None]:
    def wrapper(old: Any, new: Any, **kwargs: Any) -> None:
        chosen = Path(new) == destination
        if chosen and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new, **kwargs)
        if chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    return wrapper
