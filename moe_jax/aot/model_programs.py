"""The programs of a generation, compiled for devices that this machine lacks, from a model's description alone.

They are the very functions that `moe_jax.generation.generate` compiles, traced for the target's devices. No weight is allocated:
the model is made of shapes, dtypes and shardings.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh

from moe_jax.aot.memory import MemoryUse, OutOfMemory, refusal
from moe_jax.aot.sizes import Sizes
from moe_jax.aot.targets import Target
from moe_jax.config import ParallelConfig
from moe_jax.families.decoder import Decoder
from moe_jax.generation.programs import (
    Signature,
    compiler_options,
    lower_decode,
    lower_prefill,
    signature_of,
)
from moe_jax.models import CausalLM
from moe_jax.models.parameter_sources import parameter_homes
from moe_jax.parallel import arrange_mesh, written_axes

ProgramName = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """One compiled program, or why there is none."""

    name: ProgramName
    seconds: float
    """How long tracing and compiling took."""
    memory: MemoryUse | None
    """Planned use of a device's memory; None if the compiler refused the program."""
    refused: OutOfMemory | None
    """Why the compiler refused it."""
    text: str
    """The compiled program; empty if the compiler refused it."""


def abstract_model(
    decoder: Decoder,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    parallel: ParallelConfig | None = None,
    implementation: str | None = None,
) -> CausalLM:
    """A model whose parameters are shapes, dtypes and shardings.

    Args:
        decoder: sizes and kinds of layers.
        dtype: of computation and parameters.
        mesh: devices that it is spread over.
        parallel: how it is split over them.
        implementation: implementation of the expert computation; None chooses by device and shape.

    Raises:
        ValueError: the mesh cannot split the model evenly.
    """

    def create() -> CausalLM:
        return CausalLM(
            decoder,
            rngs=nnx.Rngs(0),
            dtype=dtype,
            param_dtype=dtype,
            parallel=parallel,
            mesh=mesh,
            implementation=implementation,
        )

    model = nnx.eval_shape(create)
    homes = parameter_homes(model)
    graph, state = nnx.split(model)
    placed = [
        (path, variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=homes[path])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def target_mesh(target: Target, sizes: Mapping[str, int]) -> Mesh:
    """A mesh of the target's devices, with Auto axes of these names and sizes, laid out as those of `create_mesh`.

    Raises:
        UnfitEnvironmentError: this process cannot compile for the target.
        ValueError: the sizes don't multiply to the number of devices.
    """
    devices = target.topology().devices
    positions = math.prod(sizes.values())
    if positions != len(devices):
        raise ValueError(
            f"the mesh {written_axes(sizes)} has {positions} positions, but {target.name} has {len(devices)} devices"
        )
    return arrange_mesh(sizes, devices)


def compile_generation(
    model: CausalLM, target: Target, sizes: Sizes, *, on_start: Callable[[ProgramName], None] | None = None
) -> tuple[CompiledProgram, ...]:
    """Compile prefill, then decode: greedy, with one end-of-sequence token.

    Decode takes over what prefill delivers, so it isn't compiled if prefill doesn't fit.

    Args:
        model: an `abstract_model` on a `target_mesh` of `target`.
        target: what to compile for.
        sizes: of the generation.
        on_start: called before each program is traced.
    """
    announce = on_start or _say_nothing
    with target.lowering():
        signature = _signature(model, sizes.padded())
        announce("prefill")
        started = time.perf_counter()
        lowered = lower_prefill(signature)
        compiled, prefill = _compile("prefill", lowered, signature, started)
        if compiled is None:
            return (prefill,)
        announce("decode")
        started = time.perf_counter()
        _, decode = _compile("decode", lower_decode(signature, lowered, compiled), signature, started)
    return prefill, decode


def _say_nothing(name: ProgramName) -> None:
    """Stands for no callback."""


def _signature(model: CausalLM, sizes: Sizes) -> Signature:
    signature, _ = signature_of(
        model,
        batch_size=sizes.batch_size,
        prompt_length=sizes.prompt_length,
        room=sizes.cache_length - sizes.prompt_length,
        num_eos=1,
        do_sample=False,
        top_k=None,
        use_top_p=False,
        with_expert_load=False,
    )
    return signature


def _compile(
    name: ProgramName, lowered: jax.stages.Lowered, signature: Signature, started: float
) -> tuple[jax.stages.Compiled | None, CompiledProgram]:
    try:
        compiled = lowered.compile(compiler_options(signature))
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(error)
        if refused is None:
            raise
        seconds = time.perf_counter() - started
        return None, CompiledProgram(name=name, seconds=seconds, memory=None, refused=refused, text="")
    program = CompiledProgram(
        name=name,
        seconds=time.perf_counter() - started,
        memory=MemoryUse.of(compiled),
        refused=None,
        text=compiled.as_text() or "",
    )
    return compiled, program
