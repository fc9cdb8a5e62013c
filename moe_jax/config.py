"""Configuration of a Mixture-of-Experts layer: frozen data that cannot be wrong.

Every field states its meaning under it; every class checks itself when built, so an illegal combination fails where it
is written down and not in the middle of a step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import jax.numpy as jnp

from moe_jax.config_checks import check_boolean, check_booleans, check_integer, check_kind, is_finite_number
from moe_jax.kernels import Activation
from moe_jax.kernels.fused_moe import IMPLEMENTATION_NAMES

ScoringFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]
SCORING_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")

CustomRoutingFunction = Callable[..., tuple[Any, Any]]
"""`f(hidden_states [T, H], router_logits [T, E], top_k, renormalize) -> (weights [T, K] float32, ids [T, K] int32)`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLimit:
    """Group-limited routing: only experts of the best groups may be chosen (DeepSeek-V3, section 2.1.2; spec 2.6)."""

    num_groups: int
    """Experts are split into this many equal, contiguous groups."""
    groups_kept: int
    """How many groups stay eligible per token."""
    score: Literal["max", "top2_sum"] | None = None
    """How a group is scored: its best expert (DeepSeek-V2), or the sum of its two best biased scores (V3). None, as in vLLM: the
    latter with a correction bias, the former without."""
    masked_score: float = float("-inf")
    """What experts outside the kept groups score in the final choice: -inf (vLLM, DeepSeek-V3) or 0 (DeepSeek-V2)."""

    def __post_init__(self) -> None:
        check_integer("num_groups", self.num_groups, least=1, must="be positive")
        check_integer("groups_kept", self.groups_kept, least=1, must="be positive")
        if self.groups_kept > self.num_groups:
            raise ValueError(f"groups_kept must be in [1, num_groups={self.num_groups}], got {self.groups_kept}")
        if self.score not in (None, "max", "top2_sum"):
            raise ValueError(f"score must be 'max' or 'top2_sum', or None; got {self.score!r}")
        if self.masked_score != float("-inf") and not is_finite_number(self.masked_score):
            raise ValueError(f"masked_score must be finite or -inf, got {self.masked_score!r}")

    def validate(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError unless these groups fit `num_experts` experts and `top_k` choices."""
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups must divide num_experts={num_experts}, got {self.num_groups}")
        group_size = num_experts // self.num_groups
        if self.score == "top2_sum" and group_size < 2:
            raise ValueError(f"score='top2_sum' needs at least 2 experts per group, got {group_size}")
        if top_k > self.groups_kept * group_size:
            raise ValueError(
                f"top_k={top_k} exceeds the {self.groups_kept * group_size} experts "
                f"of groups_kept={self.groups_kept} groups"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How hidden states become `(topk_weights [T, K], topk_ids [T, K])`; the defaults are vLLM's (spec section 2).

    docs/routers.md has a table of the fields, and worked numbers for every router.
    """

    scoring: ScoringFunction = "softmax"
    """Turns logits into scores, in float32: softmax over all experts, sigmoid, or sqrt(softplus)."""
    score_after_top_k: bool = False
    """Choose on the raw logits and score only the chosen ones (gpt-oss: softmax over K; Llama 4: sigmoid)."""
    renormalize: bool = True
    """Divide the chosen weights by their sum."""
    renormalize_epsilon: float = 0.0
    """Added to that sum (Hugging Face: 1e-20 for DeepSeek-V3; vLLM: 0, and a sum that is not positive counts as 1)."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed output; exactly one place applies it."""
    apply_scale_to_output: bool = False
    """False: the router multiplies its weights by the factor. True: the runner multiplies the routed output."""
    correction_bias: bool = False
    """A bias per expert (`e_score_correction_bias`) steers the choice and never enters the weights."""
    group_limit: GroupLimit | None = None
    """Restrict the choice to the best groups of experts."""
    logits_bias: bool = False
    """The linear map from hidden states to logits has a bias (gpt-oss)."""
    hash_vocab_size: int | None = None
    """Choose experts by token id from a table `[vocab, K]` (DeepSeek-V4's first layers); the call needs `input_ids`."""
    sparsemixer_jitter: float | None = None
    """PhiMoE's sparsemixer with this jitter; needs top_k=2 and renormalize=False."""
    normalize_input: bool = False
    """RMS-normalise the router's input, times H**-0.5, times a learned scale (Gemma 4)."""
    input_norm_epsilon: float = 1e-6
    """Added to the mean square under `normalize_input`."""
    per_expert_scale: bool = False
    """Multiply each weight by a learned factor of its expert (Gemma 4)."""
    num_zero_experts: int = 0
    """Identity experts with ids num_experts .. num_experts + num_zero_experts - 1 (LongCat-Flash)."""
    custom: CustomRoutingFunction | None = None
    """Replaces everything between logits and scaling."""
    simulation: str | None = None
    """Name of a registered routing simulation ("uniform_random", "normal_routing"). It ignores the logits and overrides
    every field that chooses or weighs experts; the scaling factor still applies. Parameters stay as they are, so that
    any model's routing can be simulated. The name is looked up when a layer is built: it may be registered until then."""
    round_weights_to_input_dtype: bool = False
    """Round the float32 weights to the dtype of the hidden states, where Hugging Face casts them."""

    def __post_init__(self) -> None:
        check_booleans(self, correction_bias="; it is a switch: the values go into layer.router.correction_bias")
        if self.scoring not in SCORING_FUNCTIONS:
            raise ValueError(f"scoring must be one of {', '.join(SCORING_FUNCTIONS)}; got {self.scoring!r}")
        if not (is_finite_number(self.renormalize_epsilon) and self.renormalize_epsilon >= 0):
            raise ValueError(f"renormalize_epsilon must be finite and not negative, got {self.renormalize_epsilon!r}")
        if not (is_finite_number(self.routed_scaling_factor) and self.routed_scaling_factor > 0):
            raise ValueError(f"routed_scaling_factor must be positive and finite, got {self.routed_scaling_factor!r}")
        if self.hash_vocab_size is not None:
            check_integer("hash_vocab_size", self.hash_vocab_size, least=1, must="be positive")
        check_integer("num_zero_experts", self.num_zero_experts, least=0, must="not be negative")
        if not (is_finite_number(self.input_norm_epsilon) and self.input_norm_epsilon > 0):
            raise ValueError(f"input_norm_epsilon must be positive and finite, got {self.input_norm_epsilon!r}")
        if self.custom is not None and not callable(self.custom):
            raise ValueError(f"custom must be a function, got {self.custom!r}")
        check_kind("group_limit", self.group_limit, GroupLimit, type(None))
        check_kind("simulation", self.simulation, str, type(None))
        if self.simulation is None:  # which overrides the rest, so that any router can be simulated
            self._validate_combination()

    def _validate_combination(self) -> None:
        """Raise ValueError if one field says how to choose or weigh experts and another one would be ignored."""
        if self.sparsemixer_jitter is not None:
            if not (is_finite_number(self.sparsemixer_jitter) and self.sparsemixer_jitter >= 0):
                raise ValueError(f"sparsemixer_jitter must be finite and not negative, got {self.sparsemixer_jitter!r}")
            if self.renormalize:
                raise ValueError("sparsemixer_jitter needs renormalize=False, got renormalize=True")
        ways = {
            "custom": self.custom is not None,
            "sparsemixer_jitter": self.sparsemixer_jitter is not None,
            "hash_vocab_size": self.hash_vocab_size is not None,
            "group_limit": self.group_limit is not None,
        }
        chosen = [name for name, given in ways.items() if given]
        if len(chosen) > 1:
            raise ValueError(f"at most one of {', '.join(ways)} may choose the experts, got {' and '.join(chosen)}")
        if chosen and self.score_after_top_k:
            raise ValueError(f"score_after_top_k=True cannot be combined with {chosen[0]}")
        if chosen and chosen[0] != "group_limit" and self.correction_bias:
            raise ValueError(f"correction_bias=True steers a choice by score, but {chosen[0]} chooses otherwise")
        if chosen and chosen[0] in ("custom", "sparsemixer_jitter") and self.scoring != "softmax":
            raise ValueError(f"scoring={self.scoring!r} would be ignored, because {chosen[0]} does its own scoring")
        if chosen and chosen[0] != "hash_vocab_size" and self.num_zero_experts:
            raise ValueError(f"num_zero_experts={self.num_zero_experts} cannot be combined with {chosen[0]}")

    def validate(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError unless this router can choose `top_k` of `num_experts` experts."""
        candidates = num_experts + self.num_zero_experts
        check_integer("top_k", top_k, least=1, must=f"be in [1, {candidates}] (experts and zero experts)")
        if top_k > candidates:
            raise ValueError(f"top_k must be in [1, {candidates}] (experts and zero experts), got {top_k}")
        if self.sparsemixer_jitter is not None and top_k != 2:
            raise ValueError(f"sparsemixer routing needs top_k=2, got {top_k}")
        if self.scored_group_limit is not None:
            self.scored_group_limit.validate(candidates, top_k)

    @property
    def scored_group_limit(self) -> GroupLimit | None:
        """`group_limit` with the score that is in use."""
        limit = self.group_limit
        if limit is None or limit.score is not None:
            return limit
        return dataclasses.replace(limit, score="top2_sum" if self.correction_bias else "max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig:
    """The dense gated MLP that every token passes, beside the routed experts (spec 1.7)."""

    intermediate_size: int
    """Width of the MLP: for several shared experts fused into one, their sum."""
    sigmoid_gate: bool = False
    """Multiply the output by sigmoid(x @ g), g: [H, 1] (Qwen2-MoE)."""
    bias: bool = False
    """The three projections have biases."""
    hidden_size: int | None = None
    """Width of the tokens they see, if a `routed_input_transform` gives the routed experts another; None: the same."""

    def __post_init__(self) -> None:
        check_booleans(self)
        check_integer("intermediate_size of the shared experts", self.intermediate_size, least=1, must="be positive")
        if self.hidden_size is not None:
            check_integer("hidden_size of the shared experts", self.hidden_size, least=1, must="be positive or None")


AxisNames = str | tuple[str, ...] | None
"""A mesh axis, a tuple of axes that is flattened into one, or None for not sharded."""

DispatchStrategy = Literal[
    "replicated", "allgather_reducescatter", "padded_all_to_all", "ragged_all_to_all", "remote_dma"
]
"""How tokens meet their experts; see `moe_jax.parallel`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Which mesh axes shard what, and how tokens meet their experts; the caller chooses the names (spec 1.8).

    Tokens are split over `data_axis` and `sequence_axis`, experts over `expert_axis` and `tensor_axis`. A mesh axis may
    be one of the first pair and one of the second: its ranks then hold different tokens *and* different experts, which
    is vLLM's expert parallelism (`from_vllm`).
    """

    expert_axis: AxisNames = None
    """Experts are split over this axis."""
    tensor_axis: AxisNames = None
    """The intermediate size of every expert (and of the shared experts) is split over this axis."""
    data_axis: AxisNames = None
    """Tokens are split over this axis."""
    sequence_axis: AxisNames = None
    """The tokens of each data position are split again over this axis: the second to last dimension of the hidden states."""
    strategy: DispatchStrategy | None = None
    """How tokens meet their experts; None chooses by mesh, tokens and platform (`MoERunner.explain_dispatch` says why)."""
    placement_strategy: Literal["linear", "round_robin"] = "linear"
    """How experts are dealt out to the ranks of `expert_axis`, see `ExpertMapManager`."""
    capacity_factor: float | None = None
    """Of `padded_all_to_all`: room that a rank keeps for each other, as a multiple of what evenly spread choices need. Rows
    beyond are dropped, and counted in `MoEAux.dropped_rows`. None: room for the worst case, nothing is ever dropped."""
    buffer_factor: float | None = None
    """Of `ragged_all_to_all`: rows that a rank receives and computes at once, as a multiple of what evenly spread choices bring
    it. Rows beyond come in further rounds; nothing is ever dropped. None: 1.25, or 512 rows for each expert if that is more."""
    one_row_per_rank: bool = False
    """Of the all-to-all strategies: a token travels once to each rank that has experts for it, and comes back as their
    weighted sum, instead of once for each expert. Fewer rows; the sum is rounded once per rank."""
    micro_batches: int = 1
    """2: each rank's tokens are dispatched and computed in two independent halves, so that the communication of one can
    hide behind the computation of the other (vLLM's dual batch overlap)."""
    reduce_results: bool = True
    """False: where ranks would sum their results for the same tokens, return them unsummed, `[ranks, ..., H]` split over
    these ranks, for the caller to sum or reduce-scatter (see `ReductionPlan`)."""

    def __post_init__(self) -> None:
        check_booleans(self)
        for name in ("expert_axis", "tensor_axis", "data_axis", "sequence_axis"):
            axis = getattr(self, name)
            names = axis if isinstance(axis, tuple) else (axis,)
            if axis is not None and not all(isinstance(each, str) for each in names):
                raise ValueError(f"{name} must be the name of a mesh axis, a tuple of names, or None; got {axis!r}")
        if self.strategy is not None and self.strategy not in get_args(DispatchStrategy):
            legal = ", ".join(map(repr, get_args(DispatchStrategy)))
            raise ValueError(f"strategy must be one of {legal} or None; got {self.strategy!r}")
        if self.placement_strategy not in ("linear", "round_robin"):
            raise ValueError(f"placement_strategy must be 'linear' or 'round_robin', got {self.placement_strategy!r}")
        for name in ("capacity_factor", "buffer_factor"):
            factor = getattr(self, name)
            if factor is not None and not (is_finite_number(factor) and factor > 0):
                raise ValueError(f"{name} must be positive and finite, or None; got {factor!r}")
        check_integer("micro_batches", self.micro_batches, least=1, must="be 1 or 2")
        if self.micro_batches > 2:
            raise ValueError(f"micro_batches must be 1 or 2, got {self.micro_batches}")

    @classmethod
    def from_vllm(
        cls,
        tp: int = 1,
        dp: int = 1,
        enable_ep: bool = False,
        *,
        pcp: int = 1,
        sequence_parallel: bool = False,
        **settings: Any,
    ) -> Self:
        """What vLLM makes of these sizes, on a mesh with the axes "dp", "pcp" and "tp", in this order (spec 1.8).

        All ranks together form one group: the expert-parallel one with `enable_ep`, the tensor-parallel one otherwise. Axes
        of size 1 are left out, so the mesh need not have them.

        Args:
            tp: tensor-parallel size; the ranks of one such group hold the same tokens.
            dp: data-parallel size; ranks hold different tokens.
            enable_ep: whole experts on each rank, instead of a slice of every expert.
            pcp: prefill-context-parallel size; ranks hold different parts of a prompt.
            sequence_parallel: split tokens over the tensor-parallel ranks, too; needs `enable_ep`.
            **settings: the other fields.

        Raises:
            ValueError: a size is not positive, a switch is no boolean, or `sequence_parallel` without `enable_ep`.
        """
        sizes = {"dp": dp, "pcp": pcp, "tp": tp}
        for name, size in sizes.items():
            check_integer(name, size, least=1, must="be positive")
        check_boolean("enable_ep", enable_ep)
        check_boolean("sequence_parallel", sequence_parallel)
        if sequence_parallel and not enable_ep:
            raise ValueError("sequence_parallel needs enable_ep=True, got False")

        def axes(*names: str) -> AxisNames:
            return tuple(name for name in names if sizes[name] > 1) or None

        group = axes("dp", "pcp", "tp")
        return cls(
            expert_axis=group if enable_ep else None,
            tensor_axis=None if enable_ep else group,
            data_axis=axes("dp"),
            sequence_axis=axes("pcp", "tp") if sequence_parallel else axes("pcp"),
            **settings,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A Mixture-of-Experts layer: sizes, activation, routing, shared experts, parallelism and number formats.

    docs/layer.md has a table of the fields.
    """

    hidden_size: int
    """H: width of the tokens that the routed experts see (after `routed_input_transform`, if there is one)."""
    intermediate_size: int
    """I: width of one routed expert."""
    num_experts: int
    """E: experts of the model (logical experts)."""
    top_k: int
    """K: experts per token."""
    activation: str | Activation = "silu"
    """Name of the activation, or the activation with its limits (spec section 8)."""
    router: RouterConfig = RouterConfig()
    """Everything else about routing."""
    shared_experts: SharedExpertsConfig | None = None
    """The shared experts, if the layer has them."""
    fuse_shared_experts: bool = False
    """Compute the shared experts as further experts of the routed ones' grouped computation, which every token chooses, instead
    of as an MLP of their own. Same parameters, same result. On a mesh every rank of `parallel.expert_axis` holds them."""
    expert_bias: bool = False
    """The experts' projections have biases (gpt-oss)."""
    apply_router_weight_on_input: bool = False
    """Multiply the expert's input by the router weight instead of its output (Llama 4); needs top_k=1."""
    num_redundant_experts: int = 0
    """Extra physical experts that hold copies of logical ones (expert load balancing)."""
    inverse_scale_shared_in_float16: bool = False
    """vLLM's float16 overflow trick: leave the routed output unscaled and multiply the shared output by 1/scale.
    The layer's output is then 1/scale of the usual one, and the decoder must divide its residuals alike (spec 1.6)."""
    parallel: ParallelConfig = ParallelConfig()
    """Which mesh axes shard the layer."""
    dtype: Any = None
    """Computation dtype; None: that of the input."""
    param_dtype: Any = jnp.float32
    """Dtype in which parameters are created; the router's correction bias is always float32."""
    implementation: str | None = None
    """Implementation of the expert computation; None chooses by device and shape, see `moe_jax.kernels.explain_fused_moe`."""

    def __post_init__(self) -> None:
        check_booleans(self)
        for name in ("hidden_size", "intermediate_size", "num_experts"):
            check_integer(name, getattr(self, name), least=1, must="be positive")
        check_integer("num_redundant_experts", self.num_redundant_experts, least=0, must="not be negative")
        check_kind("activation", self.activation, str, Activation)
        check_kind("router", self.router, RouterConfig)
        check_kind("shared_experts", self.shared_experts, SharedExpertsConfig, type(None))
        check_kind("parallel", self.parallel, ParallelConfig)
        if self.apply_router_weight_on_input and self.top_k != 1:
            raise ValueError(f"apply_router_weight_on_input needs top_k=1, got top_k={self.top_k}")
        self._validate_scaling()
        if self.fuse_shared_experts:
            self._validate_fused_shared_experts()
        for name in ("dtype", "param_dtype"):
            dtype = getattr(self, name)
            _check_floating(name, dtype)
            if dtype is not None and jnp.finfo(dtype).bits < 16:
                raise ValueError(f"{name} must have 16 bits or more to compute with, got {jnp.dtype(dtype)}")
        Activation.of(self.activation)
        if self.implementation not in (None, *IMPLEMENTATION_NAMES):
            legal = ", ".join(map(repr, IMPLEMENTATION_NAMES))
            raise ValueError(f"implementation must be one of {legal} or None; got {self.implementation!r}")
        self.router.validate(self.num_experts, self.top_k)

    def _validate_scaling(self) -> None:
        """Raise ValueError if the routed scaling factor would miss the routed output or reach it twice."""
        if self.router.apply_scale_to_output:
            if self.router.num_zero_experts and self.router.routed_scaling_factor != 1.0:
                raise ValueError(
                    "num_zero_experts needs router.apply_scale_to_output=False when routed_scaling_factor is not 1, "
                    f"got True with factor {self.router.routed_scaling_factor}: "
                    "their part is added after the output is scaled"
                )
            return
        if self.inverse_scale_shared_in_float16:
            raise ValueError(
                "inverse_scale_shared_in_float16 needs router.apply_scale_to_output=True, got False: "
                "the router would scale its weights although the routed output must stay unscaled"
            )
        if self.apply_router_weight_on_input and self.router.routed_scaling_factor != 1.0:
            raise ValueError(
                f"apply_router_weight_on_input needs router.apply_scale_to_output=True when routed_scaling_factor "
                f"is not 1, "
                f"got False with factor {self.router.routed_scaling_factor}: "
                "the factor would scale the experts' input, not their output"
            )

    def _validate_fused_shared_experts(self) -> None:
        """Raise ValueError unless the shared experts are experts like the routed ones, which all tokens choose."""
        shared = self.shared_experts
        if shared is None:
            raise ValueError("fuse_shared_experts=True needs shared_experts, got None")
        unmet = {
            "shared experts without a sigmoid_gate, got sigmoid_gate=True": shared.sigmoid_gate,
            f"a multiple of intermediate_size={self.intermediate_size} as intermediate_size of the shared experts, "
            f"got {shared.intermediate_size}": shared.intermediate_size % self.intermediate_size,
            f"hidden_size={self.hidden_size} for the shared experts, too, got {shared.hidden_size}": shared.hidden_size
            not in (None, self.hidden_size),
            f"shared_experts.bias={self.expert_bias} like expert_bias, got {shared.bias}": shared.bias
            != self.expert_bias,
            "apply_router_weight_on_input=False, got True": self.apply_router_weight_on_input,
            "inverse_scale_shared_in_float16=False, got True: it scales the shared experts' own output": (
                self.inverse_scale_shared_in_float16
            ),
        }
        for need, is_unmet in unmet.items():
            if is_unmet:
                raise ValueError(f"fuse_shared_experts=True needs {need}")

    @property
    def num_fused_shared_experts(self) -> int:
        """Experts of the routed ones' width that every token passes, with `fuse_shared_experts`; otherwise 0."""
        if self.shared_experts is None or not self.fuse_shared_experts:
            return 0
        return self.shared_experts.intermediate_size // self.intermediate_size

    @property
    def num_physical_experts(self) -> int:
        """Slots that hold an expert: logical experts and their redundant copies."""
        return self.num_experts + self.num_redundant_experts


def _check_floating(name: str, dtype: Any) -> None:
    """Raise ValueError unless `dtype` is None or names a floating dtype."""
    try:
        is_floating = dtype is None or jnp.issubdtype(dtype, jnp.floating)
    except TypeError as error:
        raise ValueError(f"{name} must be floating, got {dtype!r}, which is no dtype") from error
    if not is_floating:
        raise ValueError(f"{name} must be floating, got {jnp.dtype(dtype)}")
