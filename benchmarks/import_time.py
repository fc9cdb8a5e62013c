"""How long `import moe_jax` takes, against `import jax, flax.nnx`: fresh processes, alternating, median of each.

    python benchmarks/import_time.py [--rounds 15] [--json FILE]

Each process times its own import, so that starting the interpreter is not counted; the first round, which may read
files from the disk, is thrown away.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

STATEMENTS = {
    "jax, flax.nnx": "import jax, flax.nnx",
    "moe_jax": "import moe_jax",
    "moe_jax, and its layer": "import moe_jax; moe_jax.MoERunner, moe_jax.MoEConfig",
}
TIMED = "import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
BAR = 1.3


def import_seconds(statement: str) -> float:
    """Seconds that one import takes in a fresh process."""
    command = [sys.executable, "-c", TIMED.format(statement=statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of every import, one of each per round."""
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for number in range(rounds + 1):
        for name, statement in STATEMENTS.items():
            elapsed = import_seconds(statement)
            if number > 0:
                seconds[name].append(elapsed)
                print(f"round {number:2d}  {name:24s} {elapsed:6.3f} s", flush=True)
    return seconds


def main() -> None:
    """Measure, print each round and the ratios, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 10 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")
    arguments = parser.parse_args()
    if arguments.rounds < 10:
        parser.error(f"--rounds must be at least 10, got {arguments.rounds}")

    seconds = measure(arguments.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baseline = medians["jax, flax.nnx"]
    for name, median in medians.items():
        print(f"{name:24s} median {median:.3f} s, {median / baseline:.2f} of `import jax, flax.nnx`")
    print(f"bar: `import moe_jax` takes at most {BAR} of `import jax, flax.nnx`")

    if arguments.json:
        result = {
            "command": ["python", *sys.argv],
            "device": {"machine": platform.machine(), "processors": os.cpu_count()},
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("jax", "flax", "moe-jax")},
            "seconds": seconds,
            "median_seconds": medians,
            "ratio_to_jax_and_flax": {name: median / baseline for name, median in medians.items()},
            "bar": BAR,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
