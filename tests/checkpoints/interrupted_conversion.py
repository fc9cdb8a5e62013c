"""A conversion or export in a process of its own, which is killed at a chosen moment or may not write much.

Processes are forked from a server that has imported everything once: importing takes far longer than converting.
"""

import itertools
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
    process = _SERVER.Process(target=_run, args=("convert", source, output, options))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def run_killed_at_rename(
    destination: Path, after: bool, source: Path, output: Path, options: Mapping[str, Any], command: str = "convert"
) -> int | None:
    """Convert or export; the process kills itself just before, or just after, something is renamed to `destination`."""
    process = _SERVER.Process(target=_run_to_rename, args=(command, source, output, options, destination, after))
    process.start()
    process.join()
    return process.exitcode


def run_killed_before_step(step: int, source: Path, output: Path, options: Mapping[str, Any]) -> int | None:
    """Export; the process kills itself just before the `step`-th change or sync of a name, counted from 0."""
    process = _SERVER.Process(target=_export_to_step, args=(step, source, output, options))
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


def _run(command: str, source: Path, output: Path, options: Mapping[str, Any]) -> None:
    from moe_jax import checkpoints

    getattr(checkpoints, command)(source, output, **options)


def _run_to_rename(
    command: str, source: Path, output: Path, options: Mapping[str, Any], destination: Path, after: bool
) -> None:
    for name in ("rename", "replace"):
        setattr(os, name, _killing(getattr(os, name), destination, after))
    _run(command, source, output, options)


def _export_to_step(step: int, source: Path, output: Path, options: Mapping[str, Any]) -> None:
    steps = itertools.count()

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **kwargs: Any) -> Any:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **kwargs)

        return wrapper

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    _run("export", source, output, options)


def _killing(rename: Callable[..., None], destination: Path, after: bool) -> Callable[..., None]:
    def wrapper(old: Any, new: Any, **kwargs: Any) -> None:
        chosen = Path(new) == destination
        if chosen and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new, **kwargs)
        if chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    return wrapper
