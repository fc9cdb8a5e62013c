"""The expert-parallel MoE block on a mesh of simulated devices, and what the oracle says about it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from oracles import expert_gradients
from oracles import experts as oracle
from support.tpu_interpretation import interpreting_tpu

from moe_jax.kernels import Activation
from moe_jax.kernels.device import TPU_DEVICES, targeting
from moe_jax.kernels.expert_parallel import expert_parallel_moe
from moe_jax.kernels.expert_parallel.pallas_tpu_block import compute
from moe_jax.kernels.expert_parallel.request import Request
from moe_jax.kernels.expert_parallel.tiles import ExpertParallelTiles
from moe_jax.kernels.fused_moe.request import Request as BlockRequest

SMALL_TILES = ExpertParallelTiles(rows=32, intermediate=128, chunk=16, strip=128)
"""Several tiles per expert and several blocks of I, at sizes that are quickly interpreted."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compiled: everything but the values. Calls with equal settings share a program."""

    num_ranks: int
    activation: Activation = Activation("silu")
    apply_router_weight_on_input: bool = False
    implementation: str = "pallas_tpu"
    dma: str = "on_wait"
    tiles: ExpertParallelTiles | None = SMALL_TILES
    """None for the kernel's default."""
    axes: tuple[tuple[str, int], ...] | None = None
    """Names and sizes of the mesh axes that count as one; None for a single one."""
    data_ranks: int = 1
    """Size of another axis of the mesh, over which only tokens are split."""

    @property
    def mesh_axes(self):
        """Names and sizes of the axes over which experts are split."""
        return self.axes or (("expert", self.num_ranks),)

    @property
    def axis(self):
        """As `expert_parallel_moe` takes it."""
        names = tuple(name for name, _ in self.mesh_axes)
        return names if self.axes else names[0]

    def mesh(self):
        """The simulated devices."""
        names, sizes = zip(*self.mesh_axes, strict=True)
        sizes = (self.data_ranks, *sizes)
        return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), ("data", *names))

    def sharded(self):
        """The block as a function of whole arrays."""
        tokens, experts = PartitionSpec(("data", *dict(self.mesh_axes))), PartitionSpec(tuple(dict(self.mesh_axes)))
        names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        specs = dict(x=tokens, topk_weights=tokens, topk_ids=tokens, **dict.fromkeys(names, experts))
        return jax.shard_map(
            self.on_rank,
            mesh=self.mesh(),
            in_specs=(specs,),
            out_specs=tokens,
            check_vma=False,
        )

    def on_rank(self, arrays):
        """The block on one rank."""
        if self.tiles is None or self.implementation != "pallas_tpu":
            return expert_parallel_moe(
                **arrays,
                axis=self.axis,
                activation=self.activation,
                apply_router_weight_on_input=self.apply_router_weight_on_input,
                implementation=self.implementation,
            )
        block = BlockRequest.of(
            **arrays,
            activation=self.activation,
            expert_offset=0,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            recompute_activation=False,
        )
        return compute(Request(block, self.axis, self.num_ranks, 0), self.tiles)


@functools.cache
def program(setting):
    """The compiled block."""
    return jax.jit(setting.sharded())


@functools.cache
def gradient_program(setting):
    """Gradients of sum(result * cotangent) with respect to everything floating, and the result."""

    def loss(floating, topk_ids, cotangent):
        result = setting.sharded()({**floating, "topk_ids": topk_ids})
        return jnp.vdot(result, cotangent, preferred_element_type=jnp.float32), result

    return jax.jit(jax.grad(loss, has_aux=True))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of all ranks."""

    setting: Setting
    arrays: dict[str, Any]

    @classmethod
    def draw(
        cls, rng, setting, *, tokens=5, experts=2, top_k=3, hidden=128, intermediate=256, bias=False, dtype=jnp.float32
    ):
        """`tokens` and `experts` are those of one rank."""
        num_experts, num_tokens = experts * setting.num_ranks, tokens * setting.num_ranks * setting.data_ranks
        projections = 2 if setting.activation.is_gated else 1

        def normal(*shape, scale=1.0):
            return jnp.array(rng.normal(size=shape) * scale, dtype)

        arrays = {
            "x": normal(num_tokens, hidden),
            "topk_weights": jnp.array(rng.uniform(0.1, 1, size=(num_tokens, top_k)), jnp.float32),
            "topk_ids": jnp.array(rng.integers(0, num_experts, size=(num_tokens, top_k)), jnp.int32),
            "gate_up_proj": normal(num_experts, projections, intermediate, hidden, scale=hidden**-0.5),
            "down_proj": normal(num_experts, hidden, intermediate, scale=intermediate**-0.5),
            "gate_up_bias": normal(num_experts, projections, intermediate) if bias else None,
            "down_bias": normal(num_experts, hidden) if bias else None,
        }
        return cls(setting, arrays)

    def routed(self, topk_ids):
        """The same with these ids; tokens without an expert hold NaN, as do weights of pairs without one."""
        topk_ids = np.asarray(topk_ids, np.int32)
        num_experts = self.arrays["down_proj"].shape[0]
        has_expert = (topk_ids >= 0) & (topk_ids < num_experts)
        x = jnp.where(has_expert.any(axis=1)[:, None], self.arrays["x"], jnp.nan)
        topk_weights = jnp.where(has_expert, self.arrays["topk_weights"], jnp.nan)
        return dataclasses.replace(
            self, arrays={**self.arrays, "x": x, "topk_weights": topk_weights, "topk_ids": jnp.array(topk_ids)}
        )

    def run(self, *, checked=True):
        """The result, and what was seen while the kernel was interpreted."""
        setting = self.setting
        if setting.implementation != "pallas_tpu":
            return np.asarray(program(setting)(self.arrays)), None
        num_devices = setting.num_ranks * setting.data_ranks
        with interpreting_tpu("v6e", dma=setting.dma, num_devices=num_devices, checked=checked) as seen:
            result = np.asarray(program(setting)(self.arrays))
        return result, seen

    def gradients(self, cotangent):
        """Gradients by argument, and the result."""
        floating = {name: array for name, array in self.arrays.items() if name != "topk_ids" and array is not None}
        absent = {name: None for name, array in self.arrays.items() if array is None}
        arguments = ({**floating, **absent}, self.arrays["topk_ids"], cotangent)
        if self.setting.implementation != "pallas_tpu":
            return gradient_program(self.setting)(*arguments)
        with interpreting_tpu("v6e", dma=self.setting.dma, num_devices=self.setting.num_ranks):
            return jax.block_until_ready(gradient_program(self.setting)(*arguments))

    def _exact(self, function, **kwargs):
        activation = self.setting.activation
        parameters = {name: getattr(activation, name) for name in ("limit", "alpha", "beta")}
        arrays = {
            name: np.asarray(array, np.int64 if name == "topk_ids" else np.float64)
            for name, array in self.arrays.items()
            if array is not None
        }
        return function(
            **arrays,
            activate=lambda *projected: oracle.activate(activation.name, *projected, **parameters),
            apply_router_weight_on_input=self.setting.apply_router_weight_on_input,
            **kwargs,
        )

    def expected(self):
        """The exact result."""
        return self._exact(oracle.fused_moe)

    def expected_gradients(self, cotangent):
        """The exact gradients, by argument."""
        return self._exact(expert_gradients.fused_moe, cotangent=np.asarray(cotangent, np.float64))

    def assert_right(self, result):
        """As close to the exact result as rounding to the dtype of x allows."""
        assert_close(result, self.expected(), self.arrays["x"].dtype)


def assert_close(result, expected, dtype):
    """Within a few roundings of the largest value."""
    result = np.asarray(result, np.float64)
    assert np.isfinite(result).all()
    error = 4e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(result, expected, rtol=0, atol=error * max(np.abs(expected).max(), 1e-30))


def traced(setting, problem):
    """The block's jaxpr, for TPUs."""
    with targeting(TPU_DEVICES["v6e"]):
        return jax.make_jaxpr(setting.sharded())(problem.arrays)
