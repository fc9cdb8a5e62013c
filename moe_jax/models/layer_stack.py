"""Decoder layers, and stacks of them that are scanned with one compiled body per kind."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoEConfig, ParallelConfig
from moe_jax.families.decoder import Decoder, GroupedQueryAttention, Layer
from moe_jax.models.attention import AttentionInputs, MultiHeadAttention
from moe_jax.models.cache import CacheArrays, LayerCache
from moe_jax.models.feed_forward import GatedMLP
from moe_jax.models.latent_attention import MultiHeadLatentAttention
from moe_jax.models.parameter_sources import is_expert_matrix, layer_partition_specs
from moe_jax.models.partitioning import Partitioning
from moe_jax.models.scan_plan import Segment
from moe_jax.runner import MoEAux, MoERunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How the layers of a model are built, beside what the decoder's description says."""

    dtype: Any
    """Computation dtype."""
    param_dtype: Any
    """Dtype in which parameters are created."""
    parallel: ParallelConfig = ParallelConfig()
    """How experts are split over `mesh`."""
    mesh: Mesh | None = None
    """Devices of `parallel`'s axes."""
    partitioning: Partitioning | None = None
    """How the batch and everything outside the MoE layers are split over `mesh`."""
    num_redundant_experts: int = 0
    """Extra physical experts of every MoE layer, which hold copies of logical ones."""
    fuse_shared_experts: bool = False
    """Compute shared experts among the routed ones, see `MoEConfig`."""
    implementation: str | None = None
    """Implementation of the expert computation; None chooses by device and shape."""


class DecoderLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Children: `attention_norm`, `attention`, `feed_forward_norm`, `feed_forward` (a `GatedMLP` or a `MoERunner`).
    """

    def __init__(self, layer: Layer, decoder: Decoder, options: BuildOptions, *, rngs: nnx.Rngs):
        """Create one layer of `decoder`."""
        dtypes: dict[str, Any] = {"dtype": options.dtype, "param_dtype": options.param_dtype, "rngs": rngs}
        hidden, epsilon = decoder.hidden_size, decoder.norm_epsilon
        self.attention_norm = nnx.RMSNorm(hidden, epsilon=epsilon, **dtypes)
        if isinstance(layer.attention, GroupedQueryAttention):
            self.attention = MultiHeadAttention(layer.attention, hidden_size=hidden, norm_epsilon=epsilon, **dtypes)
        else:
            self.attention = MultiHeadLatentAttention(layer.attention, hidden_size=hidden, **dtypes)
        self.feed_forward_norm = nnx.RMSNorm(hidden, epsilon=epsilon, **dtypes)
        if isinstance(layer.feed_forward, MoEConfig):
            _check_router(layer.feed_forward)
            config = dataclasses.replace(
                layer.feed_forward,
                dtype=options.dtype,
                param_dtype=options.param_dtype,
                parallel=options.parallel,
                num_redundant_experts=options.num_redundant_experts,
                fuse_shared_experts=options.fuse_shared_experts,
                implementation=options.implementation,
            )
            self.feed_forward = MoERunner(config, mesh=options.mesh, rngs=rngs)
        else:
            self.feed_forward = GatedMLP(layer.feed_forward, hidden_size=hidden, **dtypes)

    def __call__(
        self,
        x: Float[Array, "B S H"],
        inputs: AttentionInputs,
        cache: LayerCache | None,
        *,
        is_real: Bool[Array, "B S"] | None,
        forced_ids: Int[Array, "B S K"] | None,
    ) -> tuple[Float[Array, "B S H"], LayerCache | None, MoEAux | None]:
        """Returns hidden states, cache and, from a Mixture of Experts, its aux."""
        attended, cache = self.attention(self.attention_norm(x), inputs, cache)
        x = x + attended
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoERunner):
            output, aux = self.feed_forward(normed, forced_ids=forced_ids, token_mask=is_real, with_aux=True)
        else:
            output, aux = self.feed_forward(normed), None
        return x + output, cache, aux


def _check_router(config: MoEConfig) -> None:
    """Raise NotImplementedError for a router that needs more than hidden states: layers of a model are given nothing else."""
    needs = {"hash_vocab_size": "the tokens' ids", "simulation": "a key"}
    for name, needed in needs.items():
        if (value := getattr(config.router, name)) is not None:
            raise NotImplementedError(
                f"router.{name}={value!r} needs {needed} in every layer, which a model does not pass on; a MoERunner takes it"
            )


class LayerStack(nnx.Module):
    """The layers of one segment of the scan plan, with stacked weights.

    Attributes:
        blocks: one `DecoderLayer` per position in the group, whose parameters have a leading axis `repeats`.
    """

    def __init__(self, segment: Segment, decoder: Decoder, options: BuildOptions, *, rngs: nnx.Rngs):
        """Create `segment.period` blocks of `segment.repeats` layers each."""
        self.segment = segment
        self.partitioning = options.partitioning
        firsts = range(segment.start, segment.start + segment.period)
        layers = [decoder.layers[first] for first in firsts]
        self.moe_positions = tuple(i for i, layer in enumerate(layers) if isinstance(layer.feed_forward, MoEConfig))
        self.blocks = nnx.List([_stacked(first, decoder, options, segment.repeats, rngs=rngs) for first in firsts])

    @property
    def num_moe_layers(self) -> int:
        """Layers with a Mixture of Experts."""
        return len(self.moe_positions) * self.segment.repeats

    def __call__(
        self,
        x: Float[Array, "B S H"],
        inputs: AttentionInputs,
        caches: tuple[CacheArrays, ...] | None,
        *,
        is_real: Bool[Array, "B S"] | None,
        forced_ids: Int[Array, "L B S K"] | None,
        with_aux: bool,
        recompute: bool = False,
    ) -> tuple[Float[Array, "B S H"], tuple[CacheArrays, ...] | None, MoEAux | None]:
        """Run the layers in order.

        Args:
            x: hidden states.
            inputs: what all layers share.
            caches: what earlier tokens left, per position in the group.
            is_real: False at padding.
            forced_ids: experts to use in each of the segment's L MoE layers.
            with_aux: collect the MoE layers' aux.
            recompute: keep nothing of a layer for the gradient but its input, and compute the layer again there.

        Returns:
            Hidden states, caches, and the aux stacked over the L MoE layers in their order (None without any).
        """
        graphs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)
        # A cache means that no gradient will be asked for, which is what weights are taken out of their stack for.
        whole, states = zip(*(_expert_matrices(state, kept=caches is not None) for state in states), strict=True)
        repeats = self.segment.repeats
        if forced_ids is not None:
            forced_ids = forced_ids.reshape(repeats, len(self.moe_positions), *forced_ids.shape[1:])

        def run_layer(
            position: int, state: nnx.State, index: Array, x: Array, cache: LayerCache | None, forced: Array | None
        ) -> tuple[Array, LayerCache | None, MoEAux | None]:
            layer = nnx.merge(graphs[position], state, whole[position])
            if whole[position]:
                layer.feed_forward.routed_experts.layer = nnx.data(index)
            return layer(x, inputs, cache, is_real=is_real, forced_ids=forced)

        if recompute:
            # The loops of a scan keep the compiler from merging both computations of a layer. Of one round nothing is
            # left of a loop.
            run_layer = jax.checkpoint(run_layer, static_argnums=0, prevent_cse=repeats == 1)

        def run_group(carry: tuple, group: tuple) -> tuple[tuple, MoEAux | None]:
            (x, caches), (states, index, forced) = carry, group
            if self.partitioning is not None:
                x = self.partitioning.constrain_tokens(x)
            new_caches, auxes = [], []
            for position, state in enumerate(states):
                x, cache, aux = run_layer(
                    position,
                    state,
                    index,
                    x,
                    None if caches is None else LayerCache(caches[position], index),
                    None
                    if forced is None or position not in self.moe_positions
                    else forced[self.moe_positions.index(position)],
                )
                if cache is not None:
                    arrays = cache.arrays
                    if self.partitioning is not None:
                        arrays = tuple(map(self.partitioning.constrain_cache, arrays))
                    new_caches.append(arrays)
                if aux is not None and with_aux:
                    auxes.append(aux)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes) if auxes else None
            return (x, None if caches is None else tuple(new_caches)), stacked

        (x, caches), aux = jax.lax.scan(run_group, (x, caches), (states, jnp.arange(repeats), forced_ids))
        if aux is not None:
            aux = jax.tree.map(lambda leaf: leaf.reshape(self.num_moe_layers, *leaf.shape[2:]), aux)
        return x, caches, aux


def _expert_matrices(state: nnx.State, *, kept: bool) -> tuple[nnx.State, nnx.State]:
    """The projections of the experts, if they are to be kept as the stacks that they are, and everything else.

    What a scan hands out layer by layer XLA copies for kernels, and for loops on CPUs: all experts of a layer, chosen or not.
    """

    def is_kept(path: tuple[Any, ...], _: Any) -> bool:
        return kept and is_expert_matrix(path)

    kept_state, others = nnx.split_state(state, is_kept, ...)
    return kept_state, others


def _stacked(first: int, decoder: Decoder, options: BuildOptions, repeats: int, *, rngs: nnx.Rngs) -> DecoderLayer:
    """`repeats` layers, all of the kind of layer `first`, as one module whose parameters have a leading axis."""
    keys = jax.random.split(rngs.params(), repeats)

    def create(key: Array) -> DecoderLayer:
        return DecoderLayer(decoder.layers[first], decoder, options, rngs=nnx.Rngs(params=key))

    abstract = nnx.eval_shape(create, keys[0])
    graph = nnx.graphdef(abstract)
    create_all = jax.vmap(lambda key: nnx.state(create(key)))
    partitioning = options.partitioning
    if partitioning is None:
        return nnx.merge(graph, create_all(keys))
    # Compiled with their shardings, so that no device ever holds more than its share.
    specs = layer_partition_specs(abstract, first, decoder, partitioning)
    shardings = nnx.map_state(
        lambda path, _: NamedSharding(partitioning.mesh, PartitionSpec(None, *specs[path])), nnx.state(abstract)
    )
    return nnx.merge(graph, jax.jit(create_all, out_shardings=shardings)(keys))
