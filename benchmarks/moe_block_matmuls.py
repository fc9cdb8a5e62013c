"""The matmuls of an MoE block and nothing else, under conditions that no layer has. Not a script.

How many rows each expert gets is known when the program is compiled, each expert's matrices are arrays of their own, and there is
no router, gather, activation or sum. What takes longer than transformers' whole block even so can't be won with XLA's matmuls.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from moe_block_cases import MoEBlock

type Operands = tuple[Sequence[Array], Sequence[Array]]
"""Rows, and the (out, in) matrices that they are multiplied with."""


def matmuls_alone(block: MoEBlock, dtype: str, num_tokens: int) -> dict[str, Callable[[], list[Array]]]:
    """Several ways to compute the same products: name -> function that computes all of them.

    "rows first" and "weights first" multiply expert by expert, the exact number of rows; "even" one batch of all experts, each with
    the average number of rows, which is less work than uneven routing is.
    """
    parameters = {name: jnp.asarray(array, dtype) for name, array in block.parameters().items()}
    sizes = rows_per_expert(block, num_tokens)
    gate_up_proj = parameters["gate_up_proj"].reshape(block.num_experts, -1, block.hidden_size)
    down_proj = parameters["down_proj"]
    shared = [array for name, array in parameters.items() if name.startswith("shared")]

    def operands_of(matrices: Sequence[Array], num_rows: Sequence[int]) -> Operands:
        rng = np.random.default_rng(0)
        shapes = [(number, matrix.shape[-1]) for matrix, number in zip(matrices, num_rows, strict=True)]
        return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes], matrices

    used = np.flatnonzero(sizes)
    of_experts = [matrices[expert] for matrices in (gate_up_proj, down_proj) for expert in used]
    exact = operands_of([*of_experts, *shared], [*sizes[used], *sizes[used], *[num_tokens] * len(shared)])
    mean = -(-num_tokens * block.top_k // block.num_experts)
    rng = np.random.default_rng(0)
    even_rows = [
        jnp.asarray(rng.standard_normal((block.num_experts, mean, matrices.shape[-1]), np.float32), dtype)
        for matrices in (gate_up_proj, down_proj)
    ]
    even_shared = operands_of(shared, [num_tokens] * len(shared))
    even = ([*even_rows, *even_shared[0]], [gate_up_proj, down_proj, *even_shared[1]])

    calls = {"rows first": _compiled(exact, rows_first=True), "weights first": _compiled(exact, rows_first=False)}
    if num_tokens * block.top_k >= block.num_experts:
        calls |= {
            "even, rows first": _compiled(even, rows_first=True),
            "even, weights first": _compiled(even, rows_first=False),
        }
    return calls


def rows_per_expert(block: MoEBlock, num_tokens: int) -> np.ndarray:
    """[E], of the block's own tokens and router."""
    logits = block.tokens(num_tokens) @ block.parameters()["router"].T
    chosen = np.argsort(-logits, axis=1)[:, : block.top_k]
    return np.bincount(chosen.reshape(-1), minlength=block.num_experts)


def _compiled(operands: Operands, *, rows_first: bool) -> Callable[[], list[Array]]:
    def multiply_all(operands: Operands) -> list[Array]:
        equation = "...rd,...nd->...rn" if rows_first else "...nd,...rd->...nr"
        pairs = zip(*operands, strict=True)
        return [jnp.einsum(equation, *(pair if rows_first else reversed(pair))) for pair in pairs]

    program = jax.jit(multiply_all).lower(operands).compile()
    return lambda: program(operands)
