"""Weights that lie in device memory in an order of their own keep it, and are computed with like any others."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout
from support import golden_cases
from support.golden_models import TOLERANCE, relative_error

from moe_jax import from_pretrained
from moe_jax.generation import GenerationSettings, generate
from moe_jax.load_balancing import EplbConfig, ExpertLoadBalancer
from moe_jax.models import elastic, parameter_sources
from moe_jax.models.elastic import move_model
from moe_jax.parallel import create_mesh

CASE = golden_cases.golden_case("qwen3_moe", "raw_probabilities")


@pytest.fixture(autouse=True)
def columns_before_rows(monkeypatch):
    """What is read by rows lies column by column, which XLA does on no device by itself, as on TPUs they lie row by row."""

    def home(sharding, ndim):
        return Format(Layout((*range(ndim - 2), ndim - 1, ndim - 2)), sharding)

    monkeypatch.setattr(parameter_sources, "home_row_by_row", home)


def assert_column_by_column(model):
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        order = list(variable[...].format.layout.major_to_minor)
        if path[-1] in ("embedding", "gate_up_proj", "down_proj"):  # embeddings of tokens, and experts
            order[-2:] = reversed(order[-2:])
        assert order == list(range(variable.ndim)), path


def assert_generates_as_expected(model):
    expected = CASE.expected()
    settings = GenerationSettings(max_new_tokens=expected.greedy_tokens.shape[1])
    result = generate(model, [prompt.tolist() for prompt in expected.prompts()], settings)
    np.testing.assert_array_equal(result.tokens, expected.greedy_tokens)


def test_a_loaded_model_has_the_layout_and_generates_with_it():
    model = from_pretrained(CASE.folder("fused"), dtype=np.float32)
    assert_column_by_column(model)
    assert_generates_as_expected(model)


@pytest.mark.slow
def test_experts_keep_the_layout_when_they_change_places_and_when_the_model_moves(rng, monkeypatch):
    model = from_pretrained(
        CASE.folder("fused"), dtype=np.float32, mesh=create_mesh({"expert": 4}), num_redundant_experts=4
    )
    assert_column_by_column(model)
    balancer = ExpertLoadBalancer(model, EplbConfig(window_size=2))
    balancer.place(model, rng.permuted(balancer.physical_to_logical(model), axis=1))
    assert_column_by_column(model)
    assert_generates_as_expected(model)
    monkeypatch.setattr(elastic, "BLOCK_BYTES", 1)  # a layer at a time
    for mesh in (create_mesh({"tensor": 2, "expert": 2}), None):
        move_model(model, mesh)
        assert_column_by_column(model)
        logits = jax.jit(lambda model, ids: model(ids))(model, CASE.expected().input_ids)
        assert relative_error(logits, CASE.expected().logits) < TOLERANCE
