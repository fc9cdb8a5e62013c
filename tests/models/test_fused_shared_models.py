"""Models whose shared experts are computed among the routed ones: the logits of transformers, from and to the same checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import golden_cases
from support.golden_models import QUICK_TO_COMPILE, TOLERANCE, golden_model, relative_error

from moe_jax import from_pretrained, save_pretrained
from moe_jax.parallel import create_mesh

CASE = golden_cases.golden_case("deepseek_v3", "yarn")  # two shared experts in one MLP, a dense layer, scaled weights


def fused(sizes=None):
    mesh = None if sizes is None else create_mesh(sizes)
    return from_pretrained(CASE.folder("fused"), dtype=np.float32, mesh=mesh, fuse_shared_experts=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, {"data": 2, "expert": 3}], ids=str)
def test_logits_of_a_model_with_fused_shared_experts_are_those_of_transformers(sizes):
    expected = CASE.expected()
    graph, state = nnx.split(fused(sizes))
    forward = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids), compiler_options=QUICK_TO_COMPILE)
    logits = np.asarray(forward(state, jnp.asarray(expected.input_ids)))
    assert relative_error(logits, expected.logits) < TOLERANCE


@pytest.mark.slow
def test_a_model_with_fused_shared_experts_is_saved_as_any_other(tmp_path):
    save_pretrained(fused(), tmp_path / "saved")
    saved, original = from_pretrained(tmp_path / "saved"), golden_model(CASE, "fused")
    for (path, one), (_, other) in zip(
        *(nnx.to_flat_state(nnx.state(model)) for model in (saved, original)), strict=True
    ):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))


def test_a_model_whose_shared_experts_have_a_gate_is_refused():
    case = golden_cases.golden_case("qwen2_moe", "every_second_layer")
    with pytest.raises(ValueError, match="fuse_shared_experts=True needs .* without a sigmoid_gate"):
        from_pretrained(case.folder(case.forms[0]), fuse_shared_experts=True)
