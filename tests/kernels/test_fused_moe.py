"""What every implementation of `fused_moe` must do. A later implementation joins by being listed by the op."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import experts as oracle

from moe_jax.kernels import Activation, explain_fused_moe, fused_moe
from moe_jax.kernels.fused_moe.api import IMPLEMENTATIONS as MODULES
from moe_jax.kernels.fused_moe.xla import Plan

IMPLEMENTATIONS = [module.NAME for module in MODULES]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True)
class Block:
    """Random arguments of `fused_moe`, and what the oracle says about them."""

    arrays: dict[str, Any]
    activation: Activation
    apply_router_weight_on_input: bool = False

    @classmethod
    def draw(
        cls,
        rng,
        *,
        tokens=19,
        experts=7,
        top_k=3,
        hidden=24,
        intermediate=20,
        activation="silu",
        bias=False,
        dtype=jnp.float32,
        **kwargs,
    ):
        activation = Activation.of(activation)
        projections = 2 if activation.is_gated else 1

        def normal(*shape, scale=1.0):
            return jnp.array(rng.normal(size=shape) * scale, dtype)

        arrays = {
            "x": normal(tokens, hidden),
            "topk_weights": jnp.array(rng.uniform(0.1, 1, size=(tokens, top_k)), jnp.float32),
            "topk_ids": jnp.array(
                np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].reshape(tokens, top_k), jnp.int32
            ),
            "gate_up_proj": normal(experts, projections, intermediate, hidden, scale=hidden**-0.5),
            "down_proj": normal(experts, hidden, intermediate, scale=intermediate**-0.5),
        }
        if bias:
            arrays["gate_up_bias"] = normal(experts, projections, intermediate)
            arrays["down_bias"] = normal(experts, hidden)
        return cls(arrays, activation, **kwargs)

    def with_arrays(self, **arrays):
        return dataclasses.replace(self, arrays={**self.arrays, **arrays})

    def run(self, implementation, **kwargs):
        return _run(
            self.arrays,
            activation=self.activation,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            implementation=implementation,
            **kwargs,
        )

    def expected(self, **kwargs):
        def activate(gate, up=None):
            parameters = {name: getattr(self.activation, name) for name in ("limit", "alpha", "beta")}
            return oracle.activate(self.activation.name, gate, up, **parameters)

        return oracle.fused_moe(
            **{
                name: np.asarray(array.astype(jnp.float32) if name != "topk_ids" else array)
                for name, array in self.arrays.items()
            },
            activate=activate,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            **kwargs,
        )


@functools.partial(jax.jit, static_argnames=("activation", "apply_router_weight_on_input", "implementation"))
def _run(arrays, **kwargs):
    return fused_moe(**arrays, **kwargs)


def assert_close(result, expected, rtol=2e-5):
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0, atol=rtol * scale + 1e-30)


@each_implementation
@pytest.mark.parametrize(
    "sizes",
    [
        dict(tokens=1, experts=8, top_k=2),
        dict(tokens=16, experts=8, top_k=2, hidden=64, intermediate=48),
        dict(tokens=129, experts=13, top_k=4, hidden=33, intermediate=7),
        dict(tokens=300, experts=3, top_k=1),
        dict(tokens=40, experts=11, top_k=11),
        dict(tokens=3, experts=1, top_k=1, hidden=1, intermediate=1),
        dict(tokens=2, experts=61, top_k=2),
        dict(tokens=2, experts=9, top_k=3, hidden=70, intermediate=33, bias=True),
        dict(tokens=20, experts=61, top_k=2, hidden=45, intermediate=75, bias=True),
        dict(tokens=1, experts=5, top_k=1, hidden=2101, intermediate=3),
    ],
    ids=str,
)
def test_is_the_weighted_sum_of_the_chosen_experts(implementation, sizes, rng):
    block = Block.draw(rng, **sizes)
    assert_close(block.run(implementation), block.expected())


@each_implementation
def test_zero_tokens_give_zero_rows(implementation, rng):
    result = Block.draw(rng, tokens=0).run(implementation)
    assert result.shape == (0, 24)


@each_implementation
@pytest.mark.parametrize("tokens", [37, 260])
def test_all_tokens_on_one_expert(implementation, tokens, rng):
    block = Block.draw(rng, tokens=tokens, experts=9, top_k=1)
    block = block.with_arrays(topk_ids=jnp.full((tokens, 1), 6, jnp.int32))
    assert_close(block.run(implementation), block.expected())


@each_implementation
def test_one_hot_expert_beside_others(implementation, rng):
    block = Block.draw(rng, tokens=150, experts=16, top_k=4)
    hot = jnp.where(jnp.arange(4) == 0, 5, (block.arrays["topk_ids"] % 4) + 8)
    block = block.with_arrays(topk_ids=hot.astype(jnp.int32))
    assert_close(block.run(implementation), block.expected())


@each_implementation
def test_an_expert_chosen_twice_by_a_token_counts_twice(implementation, rng):
    block = Block.draw(rng, tokens=6, top_k=3)
    block = block.with_arrays(topk_ids=jnp.array([[2, 2, 4]] * 6, jnp.int32))
    assert_close(block.run(implementation), block.expected())


@each_implementation
@pytest.mark.parametrize(("tokens", "experts"), [(24, 5), (24, 80), (4, 20)])
def test_foreign_and_missing_experts_contribute_nothing_whatever_their_weight(implementation, tokens, experts, rng):
    block = Block.draw(rng, tokens=tokens, experts=experts, top_k=3)
    ids = np.array(rng.integers(-1, 2 * experts, size=(tokens, 3)), np.int32)
    ids[::6] = [-1, experts, 2**31 - 1]
    foreign = (ids < 0) | (ids >= experts)
    weights = block.arrays["topk_weights"]
    expected = block.with_arrays(topk_ids=jnp.array(ids)).expected()
    poisoned = block.with_arrays(
        topk_ids=jnp.array(ids),
        topk_weights=jnp.where(foreign, jnp.array([jnp.nan, jnp.inf, -jnp.inf])[:3], weights),
        x=jnp.where(foreign.all(axis=1)[:, None], jnp.nan, block.arrays["x"]),
    )
    result = poisoned.run(implementation)
    assert_close(result, expected)
    np.testing.assert_array_equal(result[foreign.all(axis=1)], 0)


@each_implementation
def test_poisoned_padding_tokens_do_not_leak_into_gradients(implementation, rng):
    block = Block.draw(rng, tokens=20, bias=True)
    ids = block.arrays["topk_ids"].at[13:].set(-1)
    padding = (jnp.arange(20) >= 13)[:, None]
    clean = block.with_arrays(topk_ids=ids)
    poisoned = clean.with_arrays(
        x=jnp.where(padding, jnp.nan, clean.arrays["x"]),
        topk_weights=jnp.where(padding, jnp.nan, clean.arrays["topk_weights"]),
    )
    expected, actual = (gradients(some, implementation, jnp.ones((20, 24))) for some in (clean, poisoned))
    for name, gradient in actual.items():
        assert_close(gradient, expected[name])
    np.testing.assert_array_equal(actual["x"][13:], 0)


@each_implementation
@pytest.mark.parametrize("traced_offset", [False, True])
def test_devices_that_hold_parts_of_the_experts_add_up_to_the_whole(implementation, traced_offset, rng):
    block = Block.draw(rng, tokens=21, experts=7, bias=True)
    whole = 0
    for first, last in [(0, 3), (3, 4), (4, 7)]:
        held = {name: array[first:last] for name, array in block.arrays.items() if name[:4] in ("gate", "down")}
        part = block.with_arrays(**held)
        result = part.run(implementation, expert_offset=jnp.int32(first) if traced_offset else first)
        assert_close(result, part.expected(expert_offset=first))
        whole += result
    assert_close(whole, block.expected())


@each_implementation
@pytest.mark.parametrize(
    "activation",
    [
        Activation("silu", limit=0.5),
        Activation("gelu"),
        Activation("gelu_tanh"),
        Activation("relu2"),
        Activation("swigluoai"),
        Activation("swigluoai_uninterleave", limit=0.7),
        Activation("swiglustep", limit=0.4),
        Activation("silu_no_mul"),
        Activation("gelu_no_mul"),
        Activation("gelu_tanh_no_mul"),
        Activation("relu2_no_mul"),
    ],
    ids=str,
)
def test_every_activation_with_biases(implementation, activation, rng):
    block = Block.draw(rng, activation=activation, bias=True)
    assert_close(block.run(implementation), block.expected())


@each_implementation
@pytest.mark.parametrize("top_k", [1, 3])
def test_router_weights_on_the_input(implementation, top_k, rng):
    block = Block.draw(rng, top_k=top_k, bias=True, apply_router_weight_on_input=True)
    assert_close(block.run(implementation), block.expected())


def gradients(block, implementation, cotangent, wrap=lambda function: function):
    floating = {name: array for name, array in block.arrays.items() if name != "topk_ids"}

    def loss(floating):
        result = fused_moe(
            topk_ids=block.arrays["topk_ids"],
            activation=block.activation,
            apply_router_weight_on_input=block.apply_router_weight_on_input,
            implementation=implementation,
            **floating,
        )
        return jnp.sum(result * cotangent)

    return jax.jit(jax.grad(wrap(loss)))(floating)


@each_implementation
@pytest.mark.parametrize(
    "options",
    [
        dict(bias=True),
        dict(tokens=130, experts=4, top_k=2, intermediate=33),
        dict(tokens=1, experts=8, top_k=2),
        dict(activation="relu2_no_mul", bias=True),
        dict(top_k=1, apply_router_weight_on_input=True, bias=True),
    ],
    ids=str,
)
def test_gradients_agree_with_finite_differences_of_the_oracle(implementation, options, rng):
    block = Block.draw(rng, **options)
    cotangent = rng.normal(size=block.arrays["x"].shape)
    actual = gradients(block, implementation, jnp.array(cotangent, jnp.float32))
    for name, gradient in actual.items():
        # The derivative along a random direction; the oracle works in float64, and so must the step.
        direction = rng.normal(size=gradient.shape)
        exact = {other: np.float64(array) for other, array in block.arrays.items()} | {
            "topk_ids": block.arrays["topk_ids"]
        }
        ends = []
        for step in (1e-5, -1e-5):
            moved = exact | {name: exact[name] + step * direction}
            ends.append(np.sum(_oracle64(block, moved) * cotangent))
        slope = (ends[0] - ends[1]) / 2e-5
        computed = np.sum(np.float64(gradient) * direction)
        scale = np.linalg.norm(np.float64(gradient)) + 1e-6
        assert abs(computed - slope) <= 1e-3 * scale, name


def _oracle64(block, arrays):
    parameters = {name: getattr(block.activation, name) for name in ("limit", "alpha", "beta")}
    return oracle.fused_moe(
        **arrays,
        activate=lambda *projected: oracle.activate(block.activation.name, *projected, **parameters),
        apply_router_weight_on_input=block.apply_router_weight_on_input,
    )


def test_gradients_of_every_implementation_agree(rng):
    block = Block.draw(rng, tokens=50, experts=6, top_k=2, bias=True)
    ids = block.arrays["topk_ids"].at[::7, 1].set(-1)
    block = block.with_arrays(topk_ids=ids)
    cotangent = jnp.array(rng.normal(size=(50, 24)), jnp.float32)
    expected = gradients(block, "reference", cotangent)
    for implementation in IMPLEMENTATIONS:
        for name, gradient in gradients(block, implementation, cotangent).items():
            assert_close(gradient, expected[name], rtol=5e-5)


@each_implementation
def test_rematerialisation_does_not_change_gradients(implementation, rng):
    block = Block.draw(rng)
    cotangent = jnp.array(rng.normal(size=(19, 24)), jnp.float32)
    expected = gradients(block, implementation, cotangent)
    for name, gradient in gradients(block, implementation, cotangent, wrap=jax.checkpoint).items():
        assert_close(gradient, expected[name])


@each_implementation
def test_bfloat16_is_within_rounding_of_the_exact_result(implementation, rng):
    block = Block.draw(rng, tokens=33, hidden=128, intermediate=96, dtype=jnp.bfloat16)
    result = block.run(implementation)
    assert result.dtype == jnp.bfloat16
    assert_close(result.astype(jnp.float32), block.expected(), rtol=2e-2)


@each_implementation
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(1, 128, 128), (33, 511, 128)])
@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(8, 2, 1), (64, 6, 4)])
def test_sample_of_the_upstream_grid(implementation, tokens, hidden, intermediate, experts, top_k, ranks, rng):
    # spec 10.6: randn / 10, bfloat16, absolute tolerance 2e-2; each rank computes its share of the experts.
    block = Block.draw(
        rng, tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, dtype=jnp.bfloat16
    )
    held_names = ("gate_up_proj", "down_proj")
    arrays = {
        name: jnp.array(rng.normal(size=block.arrays[name].shape) / 10, jnp.bfloat16) for name in ("x", *held_names)
    }
    block = block.with_arrays(**arrays)
    share = experts // ranks
    total = jnp.zeros(block.arrays["x"].shape)
    for first in range(0, experts, share):
        held = block.with_arrays(**{name: block.arrays[name][first : first + share] for name in held_names})
        total += held.run(implementation, expert_offset=jnp.int32(first)).astype(jnp.float32)
    np.testing.assert_allclose(total, block.expected(), rtol=0, atol=2e-2)


@each_implementation
def test_repeated_calls_give_the_same_bits(implementation, rng):
    block = Block.draw(rng, tokens=200, experts=5, top_k=4)
    first = block.run(implementation)
    for _ in range(3):
        np.testing.assert_array_equal(block.run(implementation), first)


@each_implementation
def test_scan_over_stacked_layers(implementation, rng):
    blocks = [Block.draw(rng, tokens=12) for _ in range(3)]
    stacked = {
        name: jnp.stack([block.arrays[name] for block in blocks]) for name in ("gate_up_proj", "down_proj", "topk_ids")
    }
    weights = blocks[0].arrays["topk_weights"]

    @jax.jit
    def scanned(x):
        def layer(x, parameters):
            return fused_moe(x, weights, implementation=implementation, **parameters), None

        return jax.lax.scan(layer, x, stacked)[0]

    x = blocks[0].arrays["x"]
    expected = np.float64(x)
    for block in blocks:
        expected = _oracle64(block, block.arrays | {"x": expected, "topk_weights": weights})
    assert_close(scanned(x), expected, rtol=1e-4)


@each_implementation
def test_vmap_is_the_same_as_a_loop(implementation, rng):
    blocks = [Block.draw(rng, tokens=9) for _ in range(3)]
    stacked = {name: jnp.stack([block.arrays[name] for block in blocks]) for name in blocks[0].arrays}
    result = jax.jit(jax.vmap(lambda arrays: fused_moe(**arrays, implementation=implementation)))(stacked)
    for row, block in zip(result, blocks, strict=True):
        assert_close(row, block.expected())


@each_implementation
@pytest.mark.parametrize("check_vma", [True, False])
def test_experts_sharded_with_shard_map_are_the_unsharded_block(implementation, check_vma, rng):
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    block = Block.draw(rng, tokens=14, experts=6)
    cotangent = jnp.array(rng.normal(size=(14, 24)), jnp.float32)
    names = ("x", "topk_weights", "gate_up_proj", "down_proj")

    def local(ids, x, weights, gate_up_proj, down_proj):
        offset = jax.lax.axis_index("expert") * 3
        part = fused_moe(x, weights, ids, gate_up_proj, down_proj, expert_offset=offset, implementation=implementation)
        return jax.lax.psum(part, "expert")

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P("data"), P("expert"), P("expert")),
        out_specs=P("data"),
        check_vma=check_vma,
    )

    def loss(*floating):
        result = sharded(block.arrays["topk_ids"], *floating)
        return jnp.sum(result * cotangent), result

    floating = [block.arrays[name] for name in names]
    actual, result = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*floating)
    assert_close(result, block.expected())
    expected = gradients(block, "reference", cotangent)
    for name, gradient in zip(names, actual, strict=True):
        assert_close(gradient, expected[name], rtol=5e-5)


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
        (ValueError, r"\[E, 2, I, H\] with E >= 1", {"gate_up_proj": GATE_UP[:, 0]}),
        (ValueError, r"x must be \[T, H\] = \(5, 4\).*got shape \(5, 3\)", {"x": X[:, :3]}),
        (ValueError, r"down_proj must be \[E, H, I\] = \(3, 4, 6\)", {"down_proj": DOWN.mT}),
        (ValueError, r"gate_up_bias must be .* = \(3, 2, 6\)", {"gate_up_bias": jnp.ones((3, 12))}),
        (ValueError, r"down_bias must be \[E, H\] = \(3, 4\)", {"down_bias": jnp.ones((3, 6))}),
        (TypeError, "topk_ids must be integer, got float32", {"topk_ids": W}),
        (TypeError, "topk_weights must be floating, got int32", {"topk_weights": IDS}),
        (TypeError, "x and down_proj must have one dtype", {"down_proj": DOWN.astype(jnp.bfloat16)}),
        (ValueError, "unknown activation 'swish'", {"activation": "swish"}),
        (ValueError, "unknown implementation 'pallas_tpu'.*legal are xla, reference", {"implementation": "pallas_tpu"}),
    ],
)
def test_invalid_arguments_are_refused(error, message, arguments):
    valid = {"x": X, "topk_weights": W, "topk_ids": IDS, "gate_up_proj": GATE_UP, "down_proj": DOWN}
    for function in (fused_moe, explain_fused_moe):
        with pytest.raises(error, match=message):
            function(**valid | arguments)


def describe(tokens, experts, top_k, intermediate, dtype=jnp.float32):
    """What `explain` says for these sizes, hidden size 1024."""
    shapes = [
        ((tokens, 1024), dtype),
        ((tokens, top_k), jnp.float32),
        ((tokens, top_k), jnp.int32),
        ((experts, 2, intermediate, 1024), dtype),
        ((experts, 1024, intermediate), dtype),
    ]
    return explain_fused_moe(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))


@pytest.mark.parametrize(
    ("sizes", "formulation", "reason"),
    [
        ((1, 64, 8, 384), "streamed", "many experts are not used"),
        ((1, 64, 8, 384, jnp.bfloat16), "streamed", "many experts are not used"),
        ((128, 64, 8, 384), "batched with 24 slots", "16 each on average"),
        ((2048, 64, 8, 384), "batched with 288 slots", "256 each on average"),
        ((2048, 8, 2, 3584), "batched with 560 slots", "512 each on average"),
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
    assert set(rejected) == set(IMPLEMENTATIONS) - {"xla"}
    assert all(rejected.values())


@pytest.mark.parametrize(
    "formulation",
    [
        Plan("streamed", capacity=0, block_rows=8, slice_bytes=2**20, platform="cpu"),
        Plan("batched", capacity=16, block_rows=16, slice_bytes=2**20, platform="cpu"),
        Plan("batched", capacity=8, block_rows=5, slice_bytes=2**10, platform="cpu"),
        Plan("loop", capacity=0, block_rows=8, slice_bytes=2**20, platform="gpu"),
        Plan("loop", capacity=0, block_rows=7, slice_bytes=2**10, platform="gpu"),
    ],
    ids=str,
)
def test_every_formulation_of_xla_computes_skewed_routing(formulation, rng, monkeypatch):
    monkeypatch.setattr(sys.modules[Plan.__module__], "plan", lambda request: (formulation, "as the test says"))
    block = Block.draw(rng, tokens=75, experts=6, top_k=2, bias=True)
    ids = jnp.where(jnp.arange(75)[:, None] % 10 < 8, jnp.arange(2), block.arrays["topk_ids"]).at[::9].set(-1)
    block = block.with_arrays(topk_ids=ids.astype(jnp.int32))
    result = jax.jit(lambda arrays: fused_moe(**arrays, implementation="xla"))(block.arrays)
    assert_close(result, block.expected())
