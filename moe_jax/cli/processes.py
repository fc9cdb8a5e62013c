"""Commands that run on several devices, and as several processes: their arguments, and what the processes agree on."""

import argparse
import hashlib
import os
import sys
from typing import TYPE_CHECKING, Any

from moe_jax.cli import arguments as shared

if TYPE_CHECKING:
    from jax.sharding import Mesh


PROCESS_OPTIONS = ("--coordinator", "--num-processes", "--process-id")
"""What is given of each process where jax does not find it out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--mesh`, `--distributed` and what goes with it."""
    group = parser.add_argument_group("several devices, several hosts")
    group.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="AXIS=N,...",
        help="spread the model over devices: expert=N splits the experts, tensor=N every expert, data=N the prompts",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes that run the same command; SLURM, Open MPI, Kubernetes jobs and TPU pods are "
        "detected, elsewhere give the three options below; process 0 prints",
    )
    group.add_argument("--coordinator", type=host_and_port, metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num-processes", type=shared.positive_int, metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=shared.whole_number, metavar="I", help="number of this process, from 0")


def mesh_sizes(text: str) -> dict[str, int]:
    """The axes of `--mesh`, in their order, for `type=`."""
    from moe_jax.parallel import parse_axes

    try:
        return parse_axes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def host_and_port(text: str) -> str:
    """The address of `--coordinator`, as it is, for `type=`."""
    from moe_jax.parallel.distributed import parse_address

    try:
        parse_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like host0:1234, got {text!r}") from None
    return text


def join(arguments: argparse.Namespace) -> "Mesh | None":
    """Join the other processes if there are any, and make the mesh of `--mesh`; before anything uses a device.

    Raises:
        ValueError: options that don't go together, or devices that don't make up the mesh.
        TimeoutError: process 0 cannot be reached.
    """
    manual = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    missing = [option for option, value in zip(PROCESS_OPTIONS, manual, strict=True) if value is None]
    is_manual = len(missing) < len(PROCESS_OPTIONS)
    if is_manual and not arguments.distributed:
        raise ValueError(f"{', '.join(PROCESS_OPTIONS)} need --distributed")
    if is_manual and missing:
        raise ValueError(f"{', '.join(PROCESS_OPTIONS)} go together; missing: {', '.join(missing)}")
    if is_manual and not 0 <= arguments.process_id < arguments.num_processes:
        raise ValueError(
            f"--process-id must be from 0 to {arguments.num_processes - 1}, because --num-processes is "
            f"{arguments.num_processes}; got {arguments.process_id}"
        )
    if arguments.distributed and arguments.mesh is None:
        raise ValueError("--distributed needs --mesh, which says how the devices of all processes share the model")
    if arguments.mesh is None:
        return None
    from moe_jax.cli.output import remark
    from moe_jax.parallel import create_mesh, initialize_distributed
    from moe_jax.parallel.distributed import NO_CLUSTER

    if arguments.distributed:
        try:
            initialize_distributed(*manual, on_wait=remark)
        except ValueError as error:
            if is_manual:
                raise
            raise ValueError(f"{NO_CLUSTER}: give {', '.join(PROCESS_OPTIONS)}") from error
        keep_stdout_for_results()
    return create_mesh(arguments.mesh)


def keep_stdout_for_results() -> None:
    """Send what libraries write to standard output, as gloo does, to standard error; what Python prints stays."""
    sys.stdout.flush()
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = open(results, "w", encoding=sys.stdout.encoding, errors="replace", buffering=1)  # noqa: SIM115


def is_first() -> bool:
    """Whether this process is the one that prints."""
    import jax

    return jax.process_index() == 0


def check_agreement(*values: Any) -> None:
    """ValueError on every process unless all were given the same `values` (anything with a meaningful `repr`)."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(repr(values).encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    if different := [number for number, other in enumerate(digests) if not np.array_equal(other, digests[0])]:
        raise ValueError(
            "all processes must be given the same prompts, settings and seed; "
            f"those of process {', '.join(map(str, different))} differ from those of process 0"
        )
