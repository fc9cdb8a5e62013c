"""A model on a mesh with Explicit axes, the default of `jax.make_mesh`: it computes on the same devices with Auto axes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from support import golden_cases
from support.golden_models import QUICK_TO_COMPILE, TOLERANCE, relative_error

from moe_jax import from_pretrained
from moe_jax.generation import GenerationSettings, generate
from moe_jax.models import CausalLM
from moe_jax.models.parameter_sources import parameter_shardings

CASE = golden_cases.golden_case("mixtral", "full_tied")  # 12 experts


@functools.cache
def explicit_mesh():
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])


@functools.cache
def model():
    return from_pretrained(CASE.folder("fused"), dtype=np.float32, mesh=explicit_mesh())


def forward(state, ids):
    return nnx.merge(nnx.graphdef(model()), state)(ids)


def test_its_experts_are_split_over_all_devices():
    experts = model().stacks[0].blocks[0].feed_forward.routed_experts.gate_up_proj[...]
    assert experts.sharding.device_set == set(jax.devices()[:4])
    assert experts.sharding.shard_shape(experts.shape)[1] == experts.shape[1] // 4


@pytest.mark.parametrize("current", ["no mesh", "the model's mesh", "the mesh with Explicit axes"])
def test_logits_are_those_of_transformers(current):
    expected, function, context = CASE.expected(), forward, contextlib.nullcontext()
    if current == "the model's mesh":
        context = jax.set_mesh(model().mesh)
    elif current == "the mesh with Explicit axes":
        context = jax.set_mesh(explicit_mesh())
        function = jax.sharding.auto_axes(forward, axes=("a", "b"), out_sharding=PartitionSpec())
    state = nnx.state(model())
    with context:
        logits = jax.jit(function, compiler_options=QUICK_TO_COMPILE)(state, jnp.asarray(expected.input_ids))
    assert relative_error(logits, expected.logits) < TOLERANCE


def test_it_may_be_created_and_loaded_while_the_mesh_with_explicit_axes_is_current():
    with jax.set_mesh(explicit_mesh()):
        loaded = from_pretrained(CASE.folder("fused"), dtype=np.float32, mesh=explicit_mesh())
        created = CausalLM(loaded.decoder, rngs=nnx.Rngs(0), parallel=loaded.parallel, mesh=explicit_mesh())
    shardings = parameter_shardings(model())
    for each in (loaded, created):
        for path, variable in nnx.to_flat_state(nnx.state(each)):
            assert variable[...].sharding.is_equivalent_to(shardings[path], variable[...].ndim), path


def test_greedy_tokens_are_those_of_transformers():
    expected = CASE.expected()
    result = generate(model(), expected.prompts()[:1], GenerationSettings(max_new_tokens=6))
    np.testing.assert_array_equal(result.tokens, expected.greedy_tokens[:1, :6])
