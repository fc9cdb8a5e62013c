"""Compile the expert computation of few tokens for a GPU that this machine lacks, and count the kernels that a call launches.

    python tests/aot/gpu_launches.py [--gpu h200] [--models qwen3-30b-a3b ...] [--tokens 1 8 ...]

With few tokens a small kernel takes as long as the products of an expert, so what XLA makes of sorting, gathering and combining
counts as much as the two matmul kernels. How much it makes into one kernel depends on details of how it is written. Prints a
table; more kernels than `MOST_KERNELS` make the exit code 1.
"""

import argparse
import itertools
import sys

import jax
from gpu_kernels import fused_moe_program

from moe_jax.aot.hlo import read_computations
from moe_jax.aot.targets import GpuTarget, check_environment
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES

MOST_KERNELS = {1: 11, 8: 10, 32: 12, 128: 12, 512: 13}
"""By number of tokens: as many as were seen of the published models, the two matmul kernels among them, and two more where
splits of a contraction are added up."""
MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "deepseek-v3-ep8")
_NO_KERNEL = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast"})

_NO_LAUNCH = 'custom_call_target="AllocateBuffer"'
"""Memory that is not initialized."""


def launched_kernels(target: GpuTarget, model: str, tokens: int) -> list[str]:
    """Names of the kernels of one call, in their order."""
    program, arguments = fused_moe_program(EXPERT_SHAPES[model], tokens)
    sharding = target.one_device()
    arguments = jax.tree.map(lambda given: jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=sharding), arguments)
    with target.lowering():
        lowered = jax.jit(program).lower(*arguments)
    computations = read_computations(lowered.compile().as_text())
    (entry,) = (computation for computation in computations.values() if computation.is_entry)
    return [
        instruction.name
        for instruction in entry.instructions
        if instruction.opcode not in _NO_KERNEL and _NO_LAUNCH not in instruction.attributes
    ]


def main() -> int:
    """Compile, print, and say whether there are too many."""
    parser = argparse.ArgumentParser(
        description="Count the kernels that a call of few tokens launches on a GPU, by compiling it ahead of time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--gpu", default="h200", help="name of the GPU")
    parser.add_argument("--models", nargs="+", choices=EXPERT_SHAPES, default=MODELS, metavar="MODEL", help="shapes")
    parser.add_argument(
        "--tokens", nargs="+", type=int, choices=MOST_KERNELS, default=tuple(MOST_KERNELS), help="numbers of tokens"
    )
    arguments = parser.parse_args()
    check_environment()
    target, too_many = GpuTarget.named(arguments.gpu), 0
    print(f"jax {jax.__version__}, {arguments.gpu}: kernels of one call, static analysis\n")
    print("| model | tokens | kernels | at most |")
    print("|---|---|---|---|")
    for model, tokens in itertools.product(arguments.models, arguments.tokens):
        kernels = launched_kernels(target, model, tokens)
        print(f"| {model} | {tokens} | {len(kernels)} | {MOST_KERNELS[tokens]} |", flush=True)
        if len(kernels) > MOST_KERNELS[tokens]:
            too_many += 1
            print(f"FAILED {model}, {tokens} tokens: {', '.join(kernels)}")
    return 1 if too_many else 0


if __name__ == "__main__":
    sys.exit(main())
