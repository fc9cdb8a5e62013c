"""Layers that are scanned in groups, each with its own part of what is given and of what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.golden_models import QUICK_TO_COMPILE
from support.small_models import alternating_decoder, small_decoder

from moe_jax.models import CausalLM
from moe_jax.models.scan_plan import Segment


def test_in_repeated_groups_forced_experts_go_to_their_layer_and_reports_stand_in_its_place(rng):
    """A layer and two groups of two: layer 2, the second of the first group, is told apart by a router without weights."""
    experts = np.broadcast_to(np.arange(4), (5, 2, 5, 4))
    forced = rng.permuted(experts, axis=-1)[..., :2]
    ids = jnp.asarray(rng.integers(0, 16, (2, 5)))

    graph, state = nnx.split(nnx.eval_shape(lambda: CausalLM(alternating_decoder(5), rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), state))
    assert [stack.segment for stack in model.stacks] == [Segment(0, 1, 1), Segment(1, 2, 2)]
    weight = model.stacks[1].blocks[1].feed_forward.router.weight
    weight[...] = weight[...].at[0].set(0)

    def run(state, forced):
        return nnx.merge(graph, state)(ids, forced_ids=forced, with_aux=True)[1]

    aux = jax.jit(run, compiler_options=QUICK_TO_COMPILE)(nnx.state(model), jnp.asarray(forced))
    np.testing.assert_array_equal(aux.topk_ids, forced)
    assert np.asarray(aux.router_logits).any(axis=(1, 2, 3)).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("with_cache", [False, True])
def test_experts_stay_a_stack_where_a_cache_says_that_no_gradient_is_wanted_and_are_scanned_otherwise(with_cache):
    """Gradients of a whole stack would be added up layer by layer; a layer taken out of it is a copy of all its experts."""
    model = nnx.eval_shape(lambda: CausalLM(small_decoder(num_hidden_layers=3), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def run(state):
        model = nnx.merge(graph, state)
        return model.hidden_states(jnp.zeros((2, 1), jnp.int32), cache=model.init_cache(2, 8) if with_cache else None)[
            0
        ]

    (scan,) = [equation for equation in jax.make_jaxpr(run)(state).eqns if equation.primitive.name == "scan"]
    given = {variable.aval.shape for variable in scan.params["jaxpr"].jaxpr.invars}
    for experts in [(4, 2, 4, 8), (4, 8, 4)]:
        assert ((3, *experts) in given, experts in given) == (with_cache, not with_cache)
