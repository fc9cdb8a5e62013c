"""A decoder-only language model, put together from a `Decoder` description."""

import json
import os
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ParallelConfig
from moe_jax.families.decoder import Decoder
from moe_jax.models.attention import AttentionInputs
from moe_jax.models.cache import CacheArrays, KVCache, init_cache
from moe_jax.models.layer_stack import BuildOptions, LayerStack
from moe_jax.models.parameter_sources import parameter_shardings
from moe_jax.models.partitioning import Partitioning
from moe_jax.models.rotary import rotation
from moe_jax.models.scan_plan import plan_segments
from moe_jax.models.sequence import Sequence
from moe_jax.parallel import with_auto_axes
from moe_jax.parallel.sharding import placed
from moe_jax.runner import MoEAux


class ModelInputs(TypedDict, total=False):
    """What a call may bring beside token ids and a cache; `CausalLM.__call__` describes each."""

    attention_mask: Int[Array, "B S"] | None
    positions: Int[Array, "B S"] | None
    forced_ids: Int[Array, "L B S K"] | None


class CausalLM(nnx.Module):
    """Token ids in, logits out.

    Attributes:
        decoder: what the model is made of.
        dtype: computation dtype.
        parallel: how the model is split over `mesh`.
        mesh: devices that the model is spread over, as a mesh with Auto axes, or None.
        partitioning: how batch and dense parts are split over `mesh`, or None.
        recompute_layers: gradients keep of every layer only its input, and compute the layer again; may be set at any time.
        source_folder: the folder that the model was loaded from, with its tokenizer and generation settings, or None.
        embedder: `nnx.Embed` `[V, H]`.
        stacks: one `LayerStack` per segment of the scan plan.
        final_norm: `nnx.RMSNorm`.
        lm_head: `nnx.Linear` `[H, V]`, or None when the embedding table is used.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        parallel: ParallelConfig | None = None,
        mesh: Mesh | None = None,
        num_redundant_experts: int = 0,
        fuse_shared_experts: bool = False,
        implementation: str | None = None,
        recompute_layers: bool = False,
        hf_config: Mapping[str, Any] | None = None,
        source_folder: str | os.PathLike[str] | None = None,
    ):
        """Create a model with random weights.

        Args:
            decoder: sizes and kinds of layers.
            rngs: source of the `params` keys.
            dtype: computation dtype.
            param_dtype: dtype in which parameters are created; the router's correction bias is always float32.
            parallel: how the model is split over `mesh`: every MoE layer as `MoERunner` does it, the batch over the data
                axes, and everything else between the ranks that hold the same tokens (see `Partitioning`); None: not
                at all.
            mesh: devices of `parallel`'s axes. The model computes on these devices with Auto axes, whatever their type
                in `mesh`. While `jax.set_mesh` makes Explicit axes current, enter `jax.set_mesh(model.mesh)` first, or
                call the model in a `jax.sharding.auto_axes`.
            num_redundant_experts: extra slots of every MoE layer, which hold copies of experts (see
                `moe_jax.load_balancing`).
            fuse_shared_experts: compute shared experts among the routed ones, see `MoEConfig`; parameters are the same.
            implementation: implementation of the expert computation; None chooses by device and shape.
            recompute_layers: for training: gradients keep of every layer only its input, and compute the layer again, which
                saves memory and costs another forward pass. Without gradients it changes nothing.
            hf_config: the `config.json` that `decoder` was made from, kept for `save_pretrained`.
            source_folder: where its tokenizer and generation settings are.

        Raises:
            NotImplementedError: a router that chooses by token ids, or is simulated: layers are given hidden states alone.
            ValueError: what `MoERunner` refuses.
        """
        self.decoder = decoder
        self.dtype = jnp.dtype(dtype)
        self.parallel = ParallelConfig() if parallel is None else parallel
        self.mesh = None if mesh is None else with_auto_axes(mesh)
        self.partitioning = None if self.mesh is None else Partitioning.of(self.parallel, self.mesh)
        self.recompute_layers = recompute_layers
        self.source_folder = None if source_folder is None else os.fspath(source_folder)
        self._hf_config = None if hf_config is None else json.dumps(dict(hf_config))  # text, for modules hold hashables
        options = BuildOptions(
            dtype=self.dtype,
            param_dtype=param_dtype,
            parallel=self.parallel,
            mesh=self.mesh,
            partitioning=self.partitioning,
            num_redundant_experts=num_redundant_experts,
            fuse_shared_experts=fuse_shared_experts,
            implementation=implementation,
        )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embedder = nnx.Embed(decoder.vocab_size, decoder.hidden_size, **dtypes)
        self.stacks = nnx.List(
            [LayerStack(segment, decoder, options, rngs=rngs) for segment in plan_segments(decoder.layers)]
        )
        self.final_norm = nnx.RMSNorm(decoder.hidden_size, epsilon=decoder.norm_epsilon, **dtypes)
        head = None
        if not decoder.tie_word_embeddings:
            head = nnx.Linear(
                decoder.hidden_size,
                decoder.vocab_size,
                use_bias=False,
                preferred_element_type=jnp.float32,
                **dtypes,
            )
        self.lm_head = nnx.data(head)
        if self.partitioning is not None:
            shardings = parameter_shardings(self)  # pyright: ignore[reportArgumentType]  # an import cycle for types
            nnx.update(self, nnx.map_state(lambda path, value: placed(value, shardings[path]), nnx.state(self)))

    @property
    def partitioning_remarks(self) -> tuple[str, ...]:
        """What the ranks of `mesh` that hold the same tokens cannot split evenly among all of them, in sentences."""
        return () if self.partitioning is None else self.partitioning.remarks(self.decoder)

    @property
    def hf_config(self) -> dict[str, Any] | None:
        """The `config.json` that the model was made from, if it is known."""
        return None if self._hf_config is None else json.loads(self._hf_config)

    @overload
    def __call__(
        self, input_ids: Array, *, cache: None = None, with_aux: Literal[False] = False, **inputs: Unpack[ModelInputs]
    ) -> Array: ...
    @overload
    def __call__(
        self, input_ids: Array, *, cache: None = None, with_aux: Literal[True], **inputs: Unpack[ModelInputs]
    ) -> tuple[Array, MoEAux]: ...
    @overload
    def __call__(
        self, input_ids: Array, *, cache: KVCache, with_aux: Literal[False] = False, **inputs: Unpack[ModelInputs]
    ) -> tuple[Array, KVCache]: ...
    @overload
    def __call__(
        self, input_ids: Array, *, cache: KVCache, with_aux: Literal[True], **inputs: Unpack[ModelInputs]
    ) -> tuple[Array, KVCache, MoEAux]: ...
    @overload
    def __call__(
        self,
        input_ids: Array,
        *,
        cache: KVCache | None = None,
        with_aux: bool = False,
        **inputs: Unpack[ModelInputs],
    ) -> Any: ...
    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        *,
        attention_mask: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        cache: KVCache | None = None,
        with_aux: bool = False,
        forced_ids: Int[Array, "L B S K"] | None = None,
    ) -> Any:
        """Logits of every token.

        Args:
            input_ids: token ids; with a cache, only the new ones.
            attention_mask: 1 at real tokens of `input_ids`, 0 at padding, which may stand on either side; of the shape of
                `input_ids`, with a cache too. None: all are real.
            positions: for the rotary embedding; by default tokens are counted from the row's first real one, those in
                the cache included.
            cache: earlier tokens, see `init_cache`; rows may hold different numbers of them. A row that outgrows it gets NaN
                logits.
            with_aux: also return the routing of all MoE layers.
            forced_ids: experts to use instead of the chosen ones, as `MoEAux.topk_ids` reports them: for each of the L MoE
                layers and each token of `input_ids`, padding included, the ids of K = top_k experts.

        Returns:
            Logits `[B, S, V]` float32 (meaningless at padding); with a cache `(logits, cache)`; with `with_aux` a
            `MoEAux` follows, whose arrays have a leading axis of the L MoE layers (None if there are none).

        Raises:
            ValueError: `attention_mask` or `forced_ids` of another shape, or more tokens than the cache has slots and no
                `attention_mask`, which could say that some are padding.
        """
        hidden, new_cache, aux = self.hidden_states(
            input_ids,
            attention_mask=attention_mask,
            positions=positions,
            cache=cache,
            with_aux=with_aux,
            forced_ids=forced_ids,
        )
        results: list[Any] = [self.logits(hidden)]
        if cache is not None:
            results.append(new_cache)
        if with_aux:
            results.append(aux)
        return results[0] if len(results) == 1 else tuple(results)

    def hidden_states(
        self,
        input_ids: Int[Array, "B S"],
        *,
        attention_mask: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        cache: KVCache | None = None,
        with_aux: bool = False,
        forced_ids: Int[Array, "L B S K"] | None = None,
    ) -> tuple[Float[Array, "B S H"], KVCache | None, MoEAux | None]:
        """What `logits` makes logits of: the normalised hidden states, with the cache and aux of `__call__`.

        Prompts are long and only their last token's logits are needed: take its hidden state and call `logits` on that.

        Args:
            input_ids: as for `__call__`.
            attention_mask: as for `__call__`.
            positions: as for `__call__`.
            cache: as for `__call__`.
            with_aux: as for `__call__`.
            forced_ids: as for `__call__`.

        Returns:
            Hidden states in the computation dtype, meaningless at padding; the cache with the new tokens, or None without one;
            the routing, or None without `with_aux` or MoE layers.

        Raises:
            ValueError: `attention_mask` or `forced_ids` of another shape.
        """
        num_moe_layers = len(self.decoder.moe_layers)
        if forced_ids is not None and forced_ids.shape[:3] != (num_moe_layers, *input_ids.shape):
            raise ValueError(
                f"forced_ids must have the shape ({num_moe_layers} MoE layers, *{input_ids.shape} of input_ids, top_k), "
                f"got {forced_ids.shape}"
            )
        if cache is not None and attention_mask is None and input_ids.shape[1] > cache.max_length:
            raise ValueError(
                f"the cache must have a slot for each of the {input_ids.shape[1]} tokens of a row, got "
                f"max_length={cache.max_length}"
            )
        sequence = Sequence.of(
            input_ids,
            attention_mask,
            lengths=None if cache is None else cache.lengths,
            cached_slots=None if cache is None else cache.max_length,
        )
        inputs = self._attention_inputs(sequence, sequence.positions if positions is None else positions)
        x, segments, aux = self._run_stacks(
            self.embedder(input_ids),
            inputs,
            None if cache is None else cache.segments,
            is_real=sequence.is_real,
            forced_ids=forced_ids,
            with_aux=with_aux,
        )
        x = self.final_norm(x)
        if cache is not None:
            lengths = cache.lengths + sequence.new_tokens
            x = jnp.where((lengths > cache.max_length)[:, None, None], jnp.nan, x)
            cache = KVCache(segments, lengths)
        return x, cache, aux

    def _run_stacks(
        self,
        x: Float[Array, "B S H"],
        inputs: AttentionInputs,
        segments: tuple[tuple[CacheArrays, ...], ...] | None,
        *,
        is_real: Bool[Array, "B S"] | None,
        forced_ids: Int[Array, "L B S K"] | None,
        with_aux: bool,
    ) -> tuple[Float[Array, "B S H"], tuple[tuple[CacheArrays, ...], ...], MoEAux | None]:
        """All layers in order, each stack with its own part of the cache and of the forced ids."""
        new_segments, auxes, first = [], [], 0
        for index, stack in enumerate(self.stacks):
            last = first + stack.num_moe_layers
            x, caches, aux = stack(
                x,
                inputs,
                None if segments is None else segments[index],
                is_real=is_real,
                forced_ids=None if forced_ids is None else forced_ids[first:last],
                with_aux=with_aux,
                recompute=self.recompute_layers,
            )
            first = last
            new_segments.append(caches)
            if aux is not None:
                auxes.append(aux)
        aux = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *auxes) if auxes else None
        return x, tuple(new_segments), aux

    def logits(self, hidden_states: Float[Array, "... H"]) -> Float[Array, "... V"]:
        """float32 logits of normalised hidden states."""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        table = self.embedder.embedding[...].astype(self.dtype)
        return jnp.einsum("...h,vh->...v", hidden_states, table, preferred_element_type=jnp.float32)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
        """An empty cache, split over `mesh` as the model is.

        Args:
            batch_size: rows.
            max_length: real tokens that a row may hold, earlier and new ones; one that outgrows them gets NaN logits.
            dtype: of keys and values; None: the computation dtype.
        """
        plan = tuple(stack.segment for stack in self.stacks)
        dtype = self.dtype if dtype is None else dtype
        return init_cache(
            self.decoder,
            plan,
            batch_size=batch_size,
            max_length=max_length,
            dtype=dtype,
            partitioning=self.partitioning,
        )

    def _attention_inputs(self, sequence: Sequence, positions: Int[Array, "B S"]) -> AttentionInputs:
        kinds = [layer.attention for layer in self.decoder.layers]
        windows = {getattr(kind, "sliding_window", None) for kind in kinds}
        return AttentionInputs(
            rotations={rope: rotation(rope, positions) for rope in {kind.rope for kind in kinds}},
            visibility={window: sequence.visibility(window) for window in windows},
            slots=sequence.order,
        )
