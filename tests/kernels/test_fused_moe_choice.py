"""How `fused_moe` chooses: what it refuses, what `explain_fused_moe` says, and each formulation of the implementation `xla`."""

import contextlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implementations import UNDER_TEST, assert_close
from support.moe_blocks import Block

from moe_jax.kernels import explain_fused_moe, fused_moe
from moe_jax.kernels.device import GPU_DEVICES, TPU_DEVICES, targeting
from moe_jax.kernels.fused_moe import expert_block
from moe_jax.kernels.fused_moe.api import IMPLEMENTATIONS as MODULES
from moe_jax.kernels.fused_moe.expert_slots import slots_for, slots_within
from moe_jax.kernels.fused_moe.xla import Plan, rows_computed

X, W, IDS = jnp.ones((5, 4)), jnp.ones((5, 2)), jnp.zeros((5, 2), jnp.int32)
GATE_UP, DOWN = jnp.ones((3, 2, 6, 4)), jnp.ones((3, 4, 6))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"x must be \[T, H\], got shape \(4,\)", {"x": X[0]}),
        (ValueError, r"topk_ids must be \[T, K\] with T=5", {"topk_ids": IDS[:4]}),
        (ValueError, r"K >= 1, got shape \(5, 0\)", {"topk_ids": IDS[:, :0]}),
        (ValueError, r"topk_weights must be \[T, K\] = \(5, 2\)", {"topk_weights": W[:, :1]}),
        (ValueError, r"\[E, 1, I, H\].*'relu2_no_mul'.*got shape \(3, 2, 6, 4\)", {"activation": "relu2_no_mul"}),
        (ValueError, r"\[E, 2, I, H\] with E, I >= 1", {"gate_up_proj": GATE_UP[:, 0]}),
        (
            ValueError,
            r"E, I >= 1.*got shape \(3, 2, 0, 4\)",
            {"gate_up_proj": GATE_UP[:, :, :0], "down_proj": DOWN[..., :0]},
        ),
        (ValueError, r"x must be \[T, H\] = \(5, 4\).*got shape \(5, 3\)", {"x": X[:, :3]}),
        (ValueError, r"down_proj must be \[E, H, I\] = \(3, 4, 6\)", {"down_proj": DOWN.mT}),
        (ValueError, r"gate_up_bias must be .* = \(3, 2, 6\)", {"gate_up_bias": jnp.ones((3, 12))}),
        (ValueError, r"down_bias must be \[E, H\] = \(3, 4\)", {"down_bias": jnp.ones((3, 6))}),
        (TypeError, "topk_ids must be integer, got float32", {"topk_ids": W}),
        (TypeError, "topk_weights must be floating, got int32", {"topk_weights": IDS}),
        (TypeError, "expert_offset must be one integer, got 1.7", {"expert_offset": 1.7}),
        (TypeError, "expert_offset must be one integer, got True", {"expert_offset": True}),
        (TypeError, r"expert_offset must be one integer, got float32 of shape \(\)", {"expert_offset": jnp.float32(1)}),
        (
            TypeError,
            r"expert_offset must be one integer, got int32 of shape \(1,\)",
            {"expert_offset": jnp.ones(1, int)},
        ),
        (TypeError, "layer must be one integer, got 0.5", {"layer": 0.5}),
        (TypeError, "layer must be one integer, got False", {"layer": False}),
        (
            TypeError,
            "down_proj must have the dtype of x, float32, got bfloat16",
            {"down_proj": DOWN.astype(jnp.bfloat16)},
        ),
        (
            TypeError,
            "gate_up_proj must have the dtype of x, bfloat16, or float32.*got float16",
            {"x": X.astype(jnp.bfloat16), "gate_up_proj": GATE_UP.astype(jnp.float16)},
        ),
        (ValueError, r"expected_rows must be in \[0, T \* K\] = \[0, 10\], got 11", {"expected_rows": 11}),
        (ValueError, "expected_rows must be .*, got -1", {"expected_rows": -1}),
        (ValueError, "unknown activation 'swish'", {"activation": "swish"}),
        (
            ValueError,
            "unknown implementation 'cuda'.*legal are pallas_gpu, pallas_tpu, xla, reference",
            {"implementation": "cuda"},
        ),
    ],
)
def test_invalid_arguments_are_refused(error, message, arguments):
    valid = {"x": X, "topk_weights": W, "topk_ids": IDS, "gate_up_proj": GATE_UP, "down_proj": DOWN}
    for function in (fused_moe, explain_fused_moe):
        with pytest.raises(error, match=message):
            function(**valid | arguments)


def describe(tokens, experts, top_k, intermediate, dtype=jnp.float32, *, hidden=1024, device=None, **kwargs):
    """What `explain_fused_moe` says for these sizes, on a GPU or TPU of that name, or on the machine at hand."""
    shapes = [
        ((tokens, hidden), dtype),
        ((tokens, top_k), jnp.float32),
        ((tokens, top_k), jnp.int32),
        ((experts, 2, intermediate, hidden), dtype),
        ((experts, hidden, intermediate), dtype),
    ]
    with targeting((GPU_DEVICES | TPU_DEVICES)[device]) if device else contextlib.nullcontext():
        return explain_fused_moe(*(jax.ShapeDtypeStruct(*shape) for shape in shapes), **kwargs)


@pytest.mark.parametrize(
    ("sizes", "formulation", "reason"),
    [
        ((1, 64, 8, 384), "streamed", "many experts are not used"),
        ((1, 64, 8, 384, jnp.bfloat16), "streamed", "many experts are not used"),
        ((128, 64, 8, 384), "batched with 32 or 16 slots", "16 each on average"),
        ((2048, 64, 8, 384), "batched with 288 or 256 or 128 or 64 slots", "256 each on average"),
        ((2048, 8, 2, 3584), "batched with 560 or 512 or 256 or 128 slots", "512 each on average"),
    ],
    ids=str,
)
def test_explain_names_the_formulation_and_why_from_shapes_alone(sizes, formulation, reason):
    choice = describe(*sizes)
    assert choice.implementation == "xla"
    assert formulation in choice.formulation
    assert reason in choice.reason
    assert str(choice).startswith("fused_moe: xla")


def test_explain_gives_the_reason_of_every_rejected_implementation():
    rejected = dict(describe(4, 8, 2, 96).rejected)
    assert set(rejected) == {module.NAME for module in MODULES} - {"xla"}
    assert all(rejected.values())


UNSUPPORTED = [
    (dict(), "compute capability 9.0 .Hopper. or 10.x .Blackwell., the platform is 'cpu'"),
    (dict(device="a100"), "Hopper.*Blackwell.*a100 has 8.0"),
    (dict(device="h200", dtype=jnp.float32), "operands must be bfloat16 or float16.*got float32"),
    (dict(device="h200", hidden=1016), "H must be a multiple of 16.*got 1016"),
    (dict(device="b200", intermediate=392), "I must be a multiple of 16.*got 392"),
]


@pytest.mark.parametrize(("change", "limit"), UNSUPPORTED, ids=str)
def test_what_kernels_for_gpus_cannot_compute_is_refused_by_name_and_otherwise_left_to_xla(change, limit):
    sizes = dict(tokens=64, experts=16, top_k=4, intermediate=384, dtype=jnp.bfloat16) | change
    with pytest.raises(NotImplementedError, match=limit):
        describe(**sizes, implementation="pallas_gpu")
    choice = describe(**sizes)
    assert choice.implementation == "xla"
    assert re.search(limit, dict(choice.rejected)["pallas_gpu"])


def test_kernels_for_gpus_do_not_run_without_one(rng):
    block = Block.draw(rng, UNDER_TEST["pallas_gpu"], tokens=4)
    with pytest.raises(NotImplementedError, match="'pallas_gpu' of fused_moe cannot run: .*the platform is 'cpu'"):
        fused_moe(**block.arrays, **block.options)


@pytest.mark.parametrize(
    ("device", "tokens", "kernel", "tiles"),
    [
        ("h200", 8, "stream", "StreamTiles"),
        ("h200", 4096, "rows", r"RowTiles\(rows=128"),
        ("b200", 8, "rows", r"RowTiles\(rows=128"),
    ],
)
def test_explain_names_kernel_tiles_and_where_they_come_from(device, tokens, kernel, tiles):
    choice = describe(tokens, 64, 8, 384, jnp.bfloat16, device=device)
    assert choice.implementation == "pallas_gpu"
    assert re.search(f"^{kernel} kernel, gate/up {tiles}.*, down {tiles}", choice.formulation)
    for part, shape in {"gate/up": "64 groups, gate and up of 1024 -> 384", "down": "64 groups, 384 -> 1024"}.items():
        assert f"{part}: analytic default, no tuned entry of {device} for {shape}" in choice.reason


@pytest.mark.parametrize("device", [None, "h200", "v6e"])
def test_one_rank_of_many_chooses_for_the_rows_that_it_expects_not_for_all_choices(device):
    """128 tokens of DeepSeek-V3 on one of 32 ranks: 1024 choices, of which 32 are expected to be its experts'."""
    sizes = dict(experts=8, intermediate=2048, dtype=jnp.bfloat16, hidden=7168, device=device)
    all_choices = describe(128, top_k=8, **sizes)
    expecting = describe(128, top_k=8, **sizes, expected_rows=32)
    # Four rows for each expert, all of which are its own, are what a device without other ranks would compute.
    assert expecting.formulation == describe(16, top_k=2, **sizes).formulation != all_choices.formulation
    assert "32 rows" in expecting.reason or "4 to 7 rows per group" in expecting.reason


@pytest.mark.parametrize(
    ("rows_of_each", "slots"),
    [((64,) * 4, 80), ((9,) * 3 + (229,), 16), ((300, 0, 0, 0), 16), ((100, 80, 60, 16), 80)],
    ids=str,
)
def test_rows_at_hand_decide_how_many_slots_experts_get(rows_of_each, slots):
    """Even routing fills many slots; of skewed routing many would stay empty."""
    capacities = (80, 32, 16)
    costs = [rows_computed(jnp.array(rows_of_each), capacity, 64, 64) for capacity in capacities]
    assert capacities[int(np.argmin(costs))] == slots


@pytest.mark.parametrize(
    "formulation",
    [
        Plan("streamed", capacities=(), block_rows=8, slice_bytes=2**20, platform="cpu"),
        Plan("batched", capacities=(16,), block_rows=16, slice_bytes=2**20, platform="cpu"),
        Plan("batched", capacities=(8,), block_rows=5, slice_bytes=2**10, platform="cpu"),
        Plan("batched", capacities=(64, 16, 3), block_rows=4, slice_bytes=2**10, platform="cpu"),
        Plan("batched", capacities=(2,), block_rows=2, slice_bytes=2**10, platform="cpu"),
        Plan("loop", capacities=(), block_rows=8, slice_bytes=2**20, platform="gpu"),
        Plan("loop", capacities=(), block_rows=7, slice_bytes=2**10, platform="gpu"),
        # More than 64 rows at once.
        Plan("batched", capacities=(72,), block_rows=20, slice_bytes=2**10, platform="cpu"),
        Plan("loop", capacities=(), block_rows=70, slice_bytes=2**10, platform="gpu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_formulation_of_xla_computes_skewed_routing(formulation, dtype, rng, monkeypatch):
    monkeypatch.setattr(sys.modules[Plan.__module__], "plan", lambda request: (formulation, "as the test says"))
    tokens = 75 if formulation.block_rows < 20 else 230
    block = Block.draw(rng, UNDER_TEST["xla"], tokens=tokens, experts=6, top_k=2, bias=True, dtype=dtype)
    ids = jnp.where(jnp.arange(tokens)[:, None] % 10 < 8, jnp.arange(2), block.arrays["topk_ids"]).at[::9].set(-1)
    block = block.with_arrays(topk_ids=ids.astype(jnp.int32))
    result = jax.jit(lambda arrays: fused_moe(**arrays, implementation="xla"))(block.arrays)
    if dtype == "float32":
        block.assert_close(result, block.expected())
    else:
        assert_close(result, block.expected(), 2e-2, norm_error=5e-3)


@pytest.mark.parametrize("matrix_units", [False, True])
@pytest.mark.parametrize("tokens", [16, 60])
def test_few_rows_of_bfloat16_are_right_as_left_and_as_right_operand(tokens, matrix_units, rng, monkeypatch):
    monkeypatch.setattr(expert_block, "has_matrix_units", lambda: matrix_units)
    block = Block.draw(rng, UNDER_TEST["xla"], tokens=tokens, experts=6, top_k=2, bias=True, dtype="bfloat16")
    result = jax.jit(lambda arrays: fused_moe(**arrays, implementation="xla"))(block.arrays)
    assert_close(result, block.expected(), 2e-2, norm_error=5e-3)


def test_rows_are_the_left_operand_when_many_and_without_matrix_units_when_very_few_of_bfloat16(monkeypatch):
    def left(dtype):
        return [rows for rows in (1, 8, 16, 17, 32, 64, 65, 300) if expert_block.rows_come_first(rows, dtype)]

    monkeypatch.setattr(expert_block, "has_matrix_units", lambda: True)
    assert left("bfloat16") == left("float32") == [65, 300]
    monkeypatch.setattr(expert_block, "has_matrix_units", lambda: False)
    assert left("bfloat16") == [1, 8, 16, 65, 300]
    assert left("float32") == left("float16") == [65, 300]


@pytest.mark.parametrize("itemsize", [2, 4])
def test_slots_are_numbers_of_rows_that_multiply_well(itemsize):
    numbers = [slots_for(rows, itemsize) for rows in range(1, 300)]
    assert all(0 <= slots - rows < max(32, rows) for rows, slots in enumerate(numbers, 1))
    for rows in range(1, 300):
        within = slots_within(rows, itemsize)
        assert within == max((slots for slots in numbers if slots <= rows), default=0)


def test_a_program_for_any_number_of_tokens_is_refused():
    def compute(x):
        ids = jnp.zeros((x.shape[0], 2), jnp.int32)
        return fused_moe(x, jnp.ones(ids.shape), ids, GATE_UP, DOWN)

    (num_tokens,) = jax.export.symbolic_shape("t")
    with pytest.raises(ValueError, match=r"x must have sizes that are known .*, got \[t, 4\]"):
        jax.export.export(jax.jit(compute))(jax.ShapeDtypeStruct((num_tokens, 4), jnp.float32))
