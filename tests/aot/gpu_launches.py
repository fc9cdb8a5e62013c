"""Compile the expert computation for a GPU that this machine lacks: the kernels of a call, and what makes its host wait.

    python tests/aot/gpu_launches.py [--gpu h200] [--models qwen3-30b-a3b ...] [--tokens 1 8 ...]

With few tokens a small kernel takes as long as the products of an expert, so what XLA makes of sorting, gathering and combining
counts as much as the two matmul kernels. How much it makes into one kernel depends on details of how it is written. And a loop
or a branch that reads its condition from the GPU would make the host wait in the middle of a call. Prints a table; more kernels
than `MOST_KERNELS`, or anything to wait for, forward or backward, make the exit code 1.
"""

import argparse
import itertools
import sys

import jax
from gpu_kernels import PROGRAMS

from moe_jax.aot.hlo import read_computations
from moe_jax.aot.targets import GpuTarget, check_environment
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.benchmarking.gpu_programs import waits_for_host

MOST_KERNELS = {
    "fused_moe": {1: 11, 8: 10, 32: 12, 128: 12, 512: 13, 8192: 18},
    "fused_moe gradient": {8: 24, 8192: 31},
}
"""By program and number of tokens: as many as were seen of the published models, the matmul kernels among them, and two more
where splits of a contraction are added up."""
MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "deepseek-v3-ep8")
_NO_KERNEL = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast"})

_NO_LAUNCH = 'custom_call_target="AllocateBuffer"'
"""Memory that is not initialized."""


def compiled_text(target: GpuTarget, program: str, model: str, tokens: int) -> str:
    """A program of `gpu_kernels.PROGRAMS`, as XLA compiled it."""
    function, arguments = PROGRAMS[program](EXPERT_SHAPES[model], tokens)
    sharding = target.one_device()
    arguments = jax.tree.map(lambda given: jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=sharding), arguments)
    with target.lowering():
        lowered = jax.jit(function).lower(*arguments)
    return lowered.compile().as_text()


def launched_kernels(text: str) -> list[str]:
    """Names of the kernels of one call, in their order."""
    (entry,) = (computation for computation in read_computations(text).values() if computation.is_entry)
    return [
        instruction.name
        for instruction in entry.instructions
        if instruction.opcode not in _NO_KERNEL and _NO_LAUNCH not in instruction.attributes
    ]


def main() -> int:
    """Compile, print, and say whether there are too many kernels or anything to wait for."""
    parser = argparse.ArgumentParser(
        description="Count what a call launches on a GPU, and what its host waits for, by compiling it ahead of time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--gpu", default="h200", help="name of the GPU")
    parser.add_argument("--models", nargs="+", choices=EXPERT_SHAPES, default=MODELS, metavar="MODEL", help="shapes")
    tokens = sorted({tokens for most in MOST_KERNELS.values() for tokens in most})
    parser.add_argument("--tokens", nargs="+", type=int, choices=tokens, default=tokens, help="numbers of tokens")
    arguments = parser.parse_args()
    check_environment()
    target, failures = GpuTarget.named(arguments.gpu), 0
    print(f"jax {jax.__version__}, {arguments.gpu}: what one call launches and waits for, static analysis\n")
    print("| program | model | tokens | kernels | at most | host waits for |")
    print("|---|---|---|---|---|---|")
    for program, most in MOST_KERNELS.items():
        for model, tokens in itertools.product(
            arguments.models, [tokens for tokens in most if tokens in arguments.tokens]
        ):
            text = compiled_text(target, program, model, tokens)
            kernels, waits = launched_kernels(text), waits_for_host(text)
            row = (program, model, tokens, len(kernels), most[tokens], ", ".join(waits) or "nothing")
            print("|", " | ".join(map(str, row)), "|", flush=True)
            if waits or len(kernels) > most[tokens]:
                failures += 1
                print(f"FAILED {program}, {model}, {tokens} tokens: {', '.join(kernels)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
