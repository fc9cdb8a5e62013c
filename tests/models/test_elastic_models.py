"""Whole models from n to m devices and back: what arrives is, bit by bit, what is loaded there."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from support import golden_cases
from support.golden_models import QUICK_TO_COMPILE, TOLERANCE, golden_model, relative_error
from support.small_models import small_decoder

from moe_jax import ParallelConfig, from_pretrained
from moe_jax.models import CausalLM, elastic
from moe_jax.models.elastic import move_model
from moe_jax.parallel import create_mesh, parallel_of

CASE = golden_cases.golden_case("qwen3_moe", "raw_probabilities")  # 12 experts, a dense layer and stacked sparse ones
ALL_AXES = {"data": 2, "expert": 2, "tensor": 2}


def load(sizes=None, **settings):
    mesh = None if sizes is None else create_mesh(sizes)
    return from_pretrained(CASE.folder("fused"), dtype=np.float32, mesh=mesh, **settings)


def mixtures(model):
    return [stack.blocks[place].feed_forward for stack in model.stacks for place in stack.moe_positions]


def assert_same_model(one, other):
    """The same program over the same bits in the same places, so that there is nothing by which results could differ."""
    assert nnx.graphdef(one) == nnx.graphdef(other)
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(model)) for model in (one, other)), strict=True):
        a, b = a[...], b[...]
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), path
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def logits_of(model, ids):
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids), compiler_options=QUICK_TO_COMPILE)
    return np.asarray(forward(state, jnp.asarray(ids)))


def test_a_moved_model_is_the_one_that_is_loaded_there():
    model = load({"expert": 4}, num_redundant_experts=4)
    move_model(model, create_mesh(ALL_AXES))
    assert_same_model(model, load(ALL_AXES, num_redundant_experts=4))
    move_model(model, None, num_redundant_experts=0)
    assert_same_model(model, golden_model(CASE, "fused"))


@pytest.mark.slow
def test_so_it_is_if_it_moves_a_layer_at_a_time(monkeypatch):
    monkeypatch.setattr(elastic, "BLOCK_BYTES", 1)
    model = load({"expert": 4}, num_redundant_experts=4)
    move_model(model, create_mesh({"tensor": 2, "expert": 3}), num_redundant_experts=6)
    assert_same_model(model, load({"tensor": 2, "expert": 3}, num_redundant_experts=6))


def rearranged(model, rng):
    """Put the experts of every layer of the model into other slots."""
    for mixture in mixtures(model):
        slots = np.asarray(mixture.replicas.physical_to_logical[...])
        order = rng.permuted(np.tile(np.arange(slots.shape[1]), (len(slots), 1)), axis=1)
        for variable in jax.tree.leaves(
            nnx.state(mixture.routed_experts), is_leaf=lambda x: isinstance(x, nnx.Variable)
        ):
            array = variable[...]
            moved = np.stack([layer[row] for layer, row in zip(np.asarray(array), order, strict=True)])
            variable.set_value(jax.device_put(moved, array.sharding))
        mixture.replicas.replace(np.take_along_axis(slots, order, axis=1))


def placements(model):
    return [np.asarray(mixture.replicas.physical_to_logical[...]) for mixture in mixtures(model)]


@pytest.mark.parametrize("block_bytes", [1, elastic.BLOCK_BYTES], ids=["by layers", "whole"])
def test_a_placement_of_load_balancing_moves_along_where_there_are_as_many_slots(block_bytes, rng, monkeypatch):
    monkeypatch.setattr(elastic, "BLOCK_BYTES", block_bytes)
    model = load({"expert": 4}, num_redundant_experts=4)
    rearranged(model, rng)
    before, weights = placements(model), [np.asarray(one.routed_experts.down_proj[...]) for one in mixtures(model)]
    move_model(model, create_mesh({"expert": 8}))
    np.testing.assert_array_equal(placements(model), before)
    for mixture, expected in zip(mixtures(model), weights, strict=True):
        np.testing.assert_array_equal(mixture.routed_experts.down_proj[...], expected)
    move_model(model, create_mesh({"expert": 2}), num_redundant_experts=2)  # other slots: as in a fresh model
    assert_same_model(model, load({"expert": 2}, num_redundant_experts=2))


def test_a_model_that_leaves_its_mesh_goes_to_the_first_device_of_it():
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[4:6])
    model = CausalLM(small_decoder(num_hidden_layers=1), rngs=nnx.Rngs(0), mesh=mesh, parallel=parallel_of(mesh))
    move_model(model, None)
    assert {device for leaf in jax.tree.leaves(nnx.state(model)) for device in leaf.devices()} == {jax.devices()[4]}


@pytest.mark.slow
def test_logits_keep_their_bits_from_mesh_to_mesh(rng):
    ids = CASE.expected().input_ids
    model = load({"expert": 4}, num_redundant_experts=4)
    rearranged(model, rng)
    move_model(model, create_mesh(ALL_AXES))
    assert relative_error(logits_of(model, ids), CASE.expected().logits) < TOLERANCE
    for sizes in ({"expert": 2}, None):
        move_model(model, None if sizes is None else create_mesh(sizes), num_redundant_experts=0)
        logits = logits_of(model, ids)
        np.testing.assert_array_equal(logits, logits_of(load(sizes), ids))
        assert relative_error(logits, CASE.expected().logits) < TOLERANCE


def test_how_a_mesh_splits_a_model_is_kept_or_told_by_its_names_or_said():
    parallel = ParallelConfig(expert_axis="expert", data_axis="expert", strategy="ragged_all_to_all")
    model = load({"expert": 4}, parallel=parallel)
    move_model(model, create_mesh({"expert": 2}))
    assert model.parallel == parallel == mixtures(model)[0].config.parallel
    move_model(model, create_mesh({"tensor": 2}))
    assert model.parallel == ParallelConfig(tensor_axis="tensor")
    move_model(model, create_mesh({"tensor": 2, "x": 2}), ParallelConfig(tensor_axis="tensor", data_axis="x"))
    assert model.partitioning.batch == ("x",)


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_no_more_than_one_parameter_and_a_block_of_it_is_there_twice(monkeypatch):
    model = load({"expert": 4})
    sizes = [array.nbytes for array in jax.tree.leaves(nnx.state(model))]
    largest, mesh, most = max(sizes), create_mesh({"tensor": 2}), 0
    monkeypatch.setattr(elastic, "BLOCK_BYTES", largest // 2)
    device_put = jax.device_put

    def watched(*arguments, **options):
        nonlocal most
        most = max(most, live_bytes())
        return device_put(*arguments, **options)

    before = live_bytes()
    monkeypatch.setattr(jax, "device_put", watched)
    gc.freeze()  # what other tests have left need not be searched at every call
    move_model(model, mesh)
    gc.unfreeze()
    monkeypatch.undo()
    bound = 1.6 * largest  # of two stacked layers one is a block
    assert largest < most - before <= bound < 0.8 * sum(sizes)
    assert live_bytes() == before


@pytest.mark.parametrize(
    ("sizes", "parallel", "message"),
    [
        ({"expert": 5}, None, "the 5 ranks of expert_axis=.* must divide the physical experts"),
        ({"expert": 2}, ParallelConfig(expert_axis="other"), "must be axes of the mesh"),
        (None, ParallelConfig(expert_axis="expert"), "parallel needs a mesh, got None"),
    ],
    ids=["does not divide", "another axis", "no mesh"],
)
def test_a_mesh_that_does_not_fit_leaves_the_model_as_it_was(sizes, parallel, message):
    model = golden_model(CASE, "fused")
    graph, arrays = nnx.graphdef(model), jax.tree.leaves(nnx.state(model))
    with pytest.raises(ValueError, match=message):
        move_model(model, None if sizes is None else create_mesh(sizes), parallel)
    assert nnx.graphdef(model) == graph
    assert all(one is other for one, other in zip(jax.tree.leaves(nnx.state(model)), arrays, strict=True))
