"""`fused_moe` on the weights of one of several stacked layers: the result of that layer's own weights, without a copy of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implementations import UNDER_TEST, each_implementation_with
from support.implementations import each_implementation as each_implementation_of
from support.moe_blocks import Block

from moe_jax.kernels import explain_fused_moe, fused_moe
from moe_jax.kernels.fused_moe.api import IMPLEMENTATIONS as MODULES

LAYERS = 3
MATRICES = ("gate_up_proj", "down_proj")
FEW_ROWS, MANY_ROWS = dict(tokens=9, experts=12, top_k=2), dict(tokens=90, experts=3, top_k=2)

each_implementation = each_implementation_of(MODULES)


def among_layers(block, layer, filler):
    """The block's arrays, with its matrices as those of one of three layers."""
    stacks = {
        name: jnp.stack([array if index == layer else jnp.full_like(array, filler) for index in range(LAYERS)])
        for name, array in block.arrays.items()
        if name in MATRICES
    }
    return {**block.arrays, **stacks}


@each_implementation_with(MODULES, "sizes", [FEW_ROWS, MANY_ROWS], sampled=[FEW_ROWS])
def test_other_layers_are_not_looked_at(implementation, sizes, rng):
    block = Block.draw(rng, implementation, bias=True, **sizes)
    stacked = block.with_arrays(**among_layers(block, 1, jnp.nan))
    block.assert_close(stacked.run(layer=jnp.int32(1)), block.expected())


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_may_be_static(layer, rng):
    block = Block.draw(rng, UNDER_TEST["xla"])
    stacked = block.with_arrays(**among_layers(block, layer, jnp.nan))
    result = fused_moe(**stacked.arrays, **stacked.options, layer=layer)
    block.assert_close(result, block.expected())


@pytest.mark.parametrize(("layer", "nearest"), [(7, 2), (-7, 0)])
def test_of_layers_that_there_are_not_the_nearest_is_read(layer, nearest, rng):
    block = Block.draw(rng, UNDER_TEST["xla"])
    stacked = block.with_arrays(**among_layers(block, nearest, jnp.nan))
    block.assert_close(stacked.run(layer=jnp.int32(layer)), block.expected())


@each_implementation
def test_gradients_are_those_of_the_layer_and_zero_elsewhere(implementation, rng):
    block = Block.draw(rng, implementation, tokens=13, experts=3, top_k=2, bias=True)
    cotangent = block.draw_cotangent(rng)
    gradients = block.with_arrays(**among_layers(block, 2, 1.0)).gradients(cotangent, layer=jnp.int32(2))
    for name in MATRICES:
        np.testing.assert_array_equal(gradients[name][:2], 0)
    own = {name: gradient[2] if name in MATRICES else gradient for name, gradient in gradients.items()}
    block.assert_gradients_right(own, cotangent)


def test_float32_weights_beside_bfloat16_tokens_are_converted_one_layer_at_a_time(rng):
    block = Block.draw(rng, UNDER_TEST["xla"], dtype="bfloat16", weights_dtype="float32")
    stacked = block.with_arrays(**among_layers(block, 1, jnp.nan))
    np.testing.assert_array_equal(stacked.run(layer=1), block.run())


@pytest.mark.parametrize("sizes", [dict(tokens=4, experts=12, top_k=2), dict(tokens=1, experts=16, top_k=2)], ids=str)
def test_a_scan_over_layers_copies_no_layer_on_cpus(sizes, rng):
    """Nor is anything kept as large as a layer's weights."""
    block = Block.draw(rng, UNDER_TEST["xla"], hidden=96, intermediate=64, **sizes)
    stacks = {name: array for name, array in among_layers(block, 0, 1.0).items() if name in MATRICES}
    rest = {name: array for name, array in block.arrays.items() if name not in (*MATRICES, "x")}

    @jax.jit
    def scanned(x, stacks):
        def step(x, layer):
            return fused_moe(x, **rest, **stacks, layer=layer, implementation="xla"), None

        return jax.lax.scan(step, x, jnp.arange(LAYERS))[0]

    temporary = scanned.lower(block.arrays["x"], stacks).compile().memory_analysis().temp_size_in_bytes
    assert temporary < sum(block.arrays[name].nbytes for name in MATRICES) / 2


@pytest.mark.parametrize(
    ("change", "layer", "message"),
    [
        (dict(), None, r"gate_up_proj must be \[E, 2, I, H\] with E, I >= 1 for activation 'silu' and layer=None"),
        (dict(down_proj=0), 1, r"down_proj must be \[L, E, H, I\]"),
        (dict(), 3, r"layer must be in \[0, 3\), the layers of gate_up_proj; got 3"),
        (dict(), -1, r"layer must be in \[0, 3\)"),
        (
            dict(gate_up_proj=0),
            1,
            r"gate_up_proj must be \[L, E, 2, I, H\] with E, I >= 1 for activation 'silu' and layer=1",
        ),
    ],
)
def test_layers_and_weights_that_do_not_fit_are_refused(change, layer, message, rng):
    block = Block.draw(rng, UNDER_TEST["xla"])
    arrays = among_layers(block, 0, 1.0)
    arrays |= {name: arrays[name][index] for name, index in change.items()}
    with pytest.raises(ValueError, match=message):
        fused_moe(**arrays, layer=layer)


@pytest.mark.parametrize("layer", [None, 1])
def test_the_choice_does_not_depend_on_the_number_of_layers(layer, rng):
    block = Block.draw(rng, UNDER_TEST["xla"])
    arrays = block.arrays if layer is None else among_layers(block, 0, 1.0)
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    assert explain_fused_moe(**shapes, layer=layer) == explain_fused_moe(**block.arrays)
