"""Start a program on many hosts: `jax.distributed` with timeouts under which a lost process ends the others soon."""

import jax

HEARTBEAT_TIMEOUT_SECONDS = 10
"""A process that has not been heard of for so long is taken for dead, and the others end.

jax waits 100 seconds. Heartbeats come from a thread of their own, so neither compiling nor loading delays them.
"""

SHUTDOWN_TIMEOUT_SECONDS = 10
"""How long a process that ends waits for the others to end too; jax waits 300 seconds, also for one that is gone."""

NO_CLUSTER = "no cluster was found that jax knows (SLURM, Open MPI, a Kubernetes job, a TPU pod)"
"""Why processes must be told who they are."""


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT_SECONDS,
    shutdown_timeout_seconds: int = SHUTDOWN_TIMEOUT_SECONDS,
) -> None:
    """Join this process with the others of its job, so that `jax.devices()` are the devices of all.

    It must come before anything that uses a device. Under SLURM, Open MPI, in Kubernetes jobs and on TPU pods, jax finds
    everything out by itself. Collectives between the CPUs of several processes go through gloo, jax's default.

    Args:
        coordinator_address: "host:port" of process 0, on which it listens. Give all three of the first arguments, or
            none.
        num_processes: how many processes there are.
        process_id: number of this one.
        heartbeat_timeout_seconds: see `HEARTBEAT_TIMEOUT_SECONDS`.
        shutdown_timeout_seconds: see `SHUTDOWN_TIMEOUT_SECONDS`.

    Raises:
        ValueError: only some of the first three are given, they contradict each other, or none is given and no cluster is
            found.
        RuntimeError: jax has used its devices already, or the other processes cannot be reached.
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
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
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
