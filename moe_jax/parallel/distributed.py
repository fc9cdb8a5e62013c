"""Start a program on many hosts: `jax.distributed` with timeouts under which a lost process ends the others soon."""

import socket
import time
from collections.abc import Callable

import jax

INITIALIZATION_TIMEOUT_SECONDS = 300
"""How long a process waits for the others when it starts, as in jax."""

HEARTBEAT_TIMEOUT_SECONDS = 10
"""A process that has not been heard of for so long is taken for dead, and the others end.

jax waits 100 seconds. Heartbeats come from a thread of their own, so neither compiling nor loading delays them.
"""

SHUTDOWN_TIMEOUT_SECONDS = 10
"""How long a process that ends waits for the others to end too; jax waits 300 seconds, also for one that is gone."""

_ATTEMPT_SECONDS = 5
"""How long one attempt to connect may take, where packets are dropped and nothing answers."""
_PAUSE_SECONDS = 0.5
"""Between attempts."""

NO_CLUSTER = "no cluster was found that jax knows (SLURM, Open MPI, a Kubernetes job, a TPU pod)"
"""Why processes must be told who they are."""


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout_seconds: int = INITIALIZATION_TIMEOUT_SECONDS,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT_SECONDS,
    shutdown_timeout_seconds: int = SHUTDOWN_TIMEOUT_SECONDS,
    on_wait: Callable[[str], None] | None = None,
) -> None:
    """Join this process with the others of its job, so that `jax.devices()` are the devices of all.

    It must come before anything that uses a device. Under SLURM, Open MPI, in Kubernetes jobs and on TPU pods, jax finds
    everything out by itself. Collectives between the CPUs of several processes go through gloo, jax's default.

    Where jax itself waits in vain, it ends the process from within. So a process that is given an address first waits until
    process 0 listens there. Process 0 cannot know of the others: if one never comes, jax ends it and those that came.

    Args:
        coordinator_address: "host:port" of process 0, on which it listens. Give all three of the first arguments, or
            none.
        num_processes: how many processes there are.
        process_id: number of this one.
        initialization_timeout_seconds: see `INITIALIZATION_TIMEOUT_SECONDS`.
        heartbeat_timeout_seconds: see `HEARTBEAT_TIMEOUT_SECONDS`.
        shutdown_timeout_seconds: see `SHUTDOWN_TIMEOUT_SECONDS`.
        on_wait: called once, with the reason, if process 0 does not listen at the given address at once.

    Raises:
        ValueError: only some of the first three are given, they contradict each other, or none is given and no cluster is
            found.
        TimeoutError: nothing listens at the given address of process 0.
        RuntimeError: jax has used its devices already.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{', '.join(given)} go together; missing: {', '.join(missing)}")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must be in [0, num_processes={num_processes}), got {process_id}")
    if coordinator_address is not None:
        parse_address(coordinator_address)
        if process_id != 0:
            wait_for_listener(coordinator_address, initialization_timeout_seconds, on_wait)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=initialization_timeout_seconds,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=shutdown_timeout_seconds,
        )
    except ValueError as error:
        if missing:
            raise ValueError(f"{NO_CLUSTER}: give {', '.join(given)} ({error})") from error
        raise


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; ValueError if it is anything else."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator_address must be host:port, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def wait_for_listener(address: str, timeout_seconds: float, on_wait: Callable[[str], None] | None = None) -> None:
    """Return once process 0 listens at `address`; `on_wait` is called with the reason if it doesn't at once.

    A name that cannot be resolved is waited for too: that of a pod is known only once it has started.

    Raises:
        TimeoutError: it never did.
    """
    deadline = time.monotonic() + timeout_seconds
    waiting = False
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection(parse_address(address), timeout=max(0.1, min(left, _ATTEMPT_SECONDS))).close()
        except OSError as error:
            reason = error.strerror or str(error)
            if left <= 0:
                raise TimeoutError(
                    f"process 0 cannot be reached at {address} ({reason}), after {timeout_seconds} seconds; the address must "
                    "be that of a host on which process 0 runs, and its port be open to the others"
                ) from error
        else:
            return
        if on_wait is not None and not waiting:
            on_wait(f"waiting for process 0 at {address} ({reason})")
        waiting = True
        time.sleep(min(_PAUSE_SECONDS, max(0, left)))
