"""The report of a compile says what the compiler planned and what follows from the chip's peaks, and when nothing fits."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from support.compiled_programs import GROUPED_QUERY, collective, decoder_of, recorded
from support.published_configs import CONFIGS, DEEPSEEK_V3_671B, QWEN1_5_MOE_A2_7B, QWEN3_30B_A3B

from moe_jax.aot.collectives import read_collectives
from moe_jax.aot.compile_report import collective_rows, report
from moe_jax.aot.memory import MemoryUse, OutOfMemory, refusal
from moe_jax.aot.mesh_choice import choose_mesh, held_bytes, parallel_for, parse_mesh
from moe_jax.aot.model_programs import CompiledProgram, abstract_model
from moe_jax.aot.roofline import roofline
from moe_jax.aot.sizes import Sizes
from moe_jax.aot.targets import target_named
from moe_jax.aot.work import Work, cache_per_device, parameters_per_device
from moe_jax.families import get_family
from moe_jax.kernels.device import GPU_DEVICES, TPU_DEVICES, targeting
from moe_jax.parallel import written_axes


def compiled(name, program, *, argument=100, output=30, temporary=7, code=3):
    memory = MemoryUse(argument_bytes=argument, output_bytes=output, temporary_bytes=temporary, code_bytes=code)
    return CompiledProgram(name=name, seconds=1.5, memory=memory, refused=None, text=recorded(program))


@functools.cache
def model_on(devices):
    shape = {"data": devices // 4, "expert": 4, "tensor": 1}
    types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=jax.devices()[:devices])
    decoder = decoder_of(GROUPED_QUERY)
    return abstract_model(decoder, dtype=jnp.bfloat16, mesh=mesh, parallel=parallel_for(mesh, None)), shape


SIZES = Sizes(batch_size=4, prompt_length=16, cache_length=32)


def test_memory_is_the_sum_of_what_the_compiler_planned_and_fits_up_to_the_last_byte():
    model, mesh = model_on(4)
    target = target_named("h200:1x4")
    room = target.device.memory_bytes
    for argument, fits in ((room - 40, True), (room - 39, False)):
        programs = [
            compiled("prefill", "loops_h200_1x4", argument=argument),
            compiled("decode", "loops_h200_1x4"),
        ]
        result = report(model, target, SIZES, mesh, programs)
        assert result.programs[0].needed_bytes == argument + 30 + 7 + 3
        assert result.programs[0].available_bytes == room
        assert (result.fits, result.programs[0].fits, result.programs[1].fits) == (fits, fits, True)
        said = [warning for warning in result.warnings if "prefill does not fit" in warning]
        assert len(said) == (not fits)
        assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in warning for warning in result.warnings) == fits


def test_a_refused_prefill_is_reported_with_the_compilers_numbers_and_without_decode():
    model, mesh = model_on(4)
    refused = OutOfMemory(needed_bytes=50 * 2**30, available_bytes=31 * 2**30)
    program = CompiledProgram(name="prefill", seconds=2.0, memory=None, refused=refused, text="")
    result = report(model, target_named("v6e:2x2"), SIZES, mesh, [program])
    assert not result.fits
    (prefill,) = result.programs
    assert (prefill.needed_bytes, prefill.available_bytes) == (50 * 2**30, 31 * 2**30)
    assert prefill.roofline is None
    assert any(f"{19 * 2**30:,} more than there are" in warning for warning in result.warnings)
    assert any(warning.startswith("decode was not compiled") for warning in result.warnings)


def test_collectives_of_decode_are_told_apart_by_token_and_by_call():
    rows = collective_rows(read_collectives(recorded("loops_v6e_2x2")), None)
    assert [row.kind for row in rows] == ["all-to-all", "all-to-all", "all-reduce"]
    assert [row.total_bytes for row in rows] == [7 * 32768, 7 * 16384, 7 * 2048]
    assert all(row.in_loop and row.executions == 7 for row in rows)
    outside = collective_rows(read_collectives(recorded("collectives_v6e_2x2")), None)
    assert not any(row.in_loop for row in outside)


def test_alike_collectives_share_a_row_and_those_of_one_device_have_none():
    alone = collective("all-reduce", group_size=1)
    two = [collective("all-gather", executions=3), collective("all-gather", executions=4, name="other")]
    (row,) = collective_rows([*two, alone], 4)
    assert (row.executions, row.total_bytes) == (7, 7 * 800)
    assert row.between_hosts


def test_a_rewritten_ragged_exchange_is_reported_with_what_it_brings_to_each_device():
    model, mesh = model_on(8)
    programs = [compiled("prefill", "ragged_h200_2x8"), compiled("decode", "loops_h200_1x4")]
    result = report(model, target_named("h200:2x8"), SIZES, mesh, programs)
    (warning,) = [warning for warning in result.warnings if "rewrote ragged-all-to-all" in warning]
    assert warning.startswith("prefill")
    assert f"{5 * 64 * 128 * 2:,} bytes" in warning  # five layers, the rows of the one other host
    assert result.programs[0].roofline.network_bytes > 0
    assert result.programs[1].roofline.network_bytes == 0


def test_each_limit_of_the_roofline_follows_from_its_peak():
    chip = TPU_DEVICES["v6e"]
    work = Work(flops=2 * 918e12, weight_bytes=1640e9, cache_bytes=3 * 1640e9)
    moved = [collective("collective-permute", group_size=2, operand_bytes=int(200e9), executions=4)]
    found = roofline(work, moved, chip, devices_per_host=None, is_bfloat16=True)
    assert (found.compute_seconds, found.memory_seconds, found.links_seconds) == pytest.approx((2, 4, 2))
    assert (found.seconds, found.limit) == (pytest.approx(4), "memory")
    assert found.network_bytes == 0
    assert roofline(work, moved, chip, devices_per_host=None, is_bfloat16=False).compute_seconds is None


def test_what_crosses_hosts_counts_for_the_network_not_for_the_links():
    inside = collective("all-to-all", groups=((0, 1, 2, 3),), group_size=4)
    across = collective("all-to-all", groups=((0, 4),), group_size=2, executions=3)
    found = roofline(Work(), [inside, across], GPU_DEVICES["h200"], devices_per_host=4, is_bfloat16=True)
    assert found.links_seconds == pytest.approx(600 / 450e9)
    assert found.network_bytes == 3 * 400
    assert found.limit == "links"


@pytest.mark.parametrize(
    ("text", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (47.50G) exceeds available HBM (31.25G). HLO module: jit_prefill.",
            int(47.5 * 2**30),
            int(31.25 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:\nRan out of memory in memory space hbm. Used 3.5T of 95.25G hbm.",
            int(3.5 * 2**40),
            int(95.25 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: too much", None, None),
    ],
)
def test_a_refusal_of_the_tpu_compiler_is_read(text, needed, available):
    assert refusal(RuntimeError(text)) == OutOfMemory(needed_bytes=needed, available_bytes=available)


def test_other_errors_are_no_refusal():
    vmem = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem. Used 61M of 60M vmem."
    assert refusal(RuntimeError(vmem)) is None
    assert refusal(RuntimeError("INVALID_ARGUMENT: something else")) is None


QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}


ODD_SHARED_EXPERTS = QWEN1_5_MOE_A2_7B | {"shared_expert_intermediate_size": 5634}


@pytest.mark.parametrize(
    ("config", "target", "devices", "strategy", "mesh"),
    [
        (DEEPSEEK_V3_671B, "v5p", 64, None, "data=1,expert=64,tensor=1"),
        (DEEPSEEK_V3_671B, "h200", 16, None, "data=1,expert=16,tensor=1"),
        (DEEPSEEK_V3_671B, "v6e", 256, None, "data=2,expert=128,tensor=1"),
        (QWEN3_235B_A22B, "v6e", 256, None, "data=4,expert=64,tensor=1"),  # not the 96 columns of 16 tensor ranks
        (QWEN3_235B_A22B, "v6e", 64, None, "data=1,expert=64,tensor=1"),
        (
            QWEN3_235B_A22B,
            "v6e",
            64,
            "ragged_all_to_all",
            "data=1,expert=32,tensor=2",
        ),  # attention whole on 64 is too much
        (QWEN1_5_MOE_A2_7B, "v5e", 8, None, "data=2,expert=4,tensor=1"),  # 60 experts
        (ODD_SHARED_EXPERTS, "v5e", 8, None, "data=4,expert=2,tensor=1"),  # split among ranks with the same tokens
        (ODD_SHARED_EXPERTS, "v5e", 8, "ragged_all_to_all", "data=2,expert=4,tensor=1"),  # of which there are none
        (QWEN3_30B_A3B, "v6e", 4, "ragged_all_to_all", "data=1,expert=4,tensor=1"),
        (QWEN3_30B_A3B, "h200", 1, None, "data=1,expert=1,tensor=1"),
        (QWEN3_30B_A3B, "h200", 7, None, "data=7,expert=1,tensor=1"),
    ],
)
def test_default_meshes_of_published_models(config, target, devices, strategy, mesh):
    decoder = get_family(config).build_decoder(config)
    memory = (TPU_DEVICES | GPU_DEVICES)[target].memory_bytes
    sizes = Sizes(batch_size=8, prompt_length=1024, cache_length=2048)
    chosen = choose_mesh(decoder, devices, sizes=sizes, itemsize=2, memory_bytes=memory, strategy=strategy)
    assert written_axes(chosen.positions) == mesh


SHAPES_OF_4 = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)]


@pytest.mark.parametrize("batch_size", [8, 4096])
def test_default_meshes_have_the_least_tensor_parallelism_that_fits_and_hold_the_least(batch_size):
    config = GROUPED_QUERY | {"num_experts": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    decoder, sizes = decoder_of(config), Sizes(batch_size=batch_size, prompt_length=16, cache_length=32)
    held = {}
    for shape in SHAPES_OF_4:
        mesh = jax.make_mesh(
            shape, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:4]
        )
        model = abstract_model(decoder, dtype=jnp.bfloat16, mesh=mesh, parallel=parallel_for(mesh, None))
        held[shape] = parameters_per_device(model) + cache_per_device(model, batch_size=batch_size, cache_length=32)
        positions = dict(mesh.shape)
        assert held_bytes(decoder, positions, sizes=sizes, itemsize=2) == held[shape]
    for room in (0, *sorted(set(held.values()))):
        choice = choose_mesh(decoder, 4, sizes=sizes, itemsize=2, memory_bytes=4 * room // 3)
        chosen = tuple(choice.positions.values())
        fitting = {shape: size for shape, size in held.items() if size <= 0.75 * (4 * room // 3)}
        if not fitting:
            assert held[chosen] == min(held.values())
            assert "with every mesh they take over 75%" in choice.reason
        else:
            least = min(tensor for _, _, tensor in fitting)
            assert chosen[2] == least
            assert held[chosen] == min(size for shape, size in fitting.items() if shape[2] == least)


@pytest.mark.parametrize("devices", [4, 12])
@pytest.mark.parametrize("name", CONFIGS)
def test_default_meshes_use_all_devices_of_every_model(name, devices):
    decoder = get_family(CONFIGS[name]).build_decoder(CONFIGS[name])
    positions = choose_mesh(decoder, devices, sizes=SIZES, itemsize=2, memory_bytes=16 * 10**9).positions
    assert parse_mesh(written_axes(positions), devices) == positions


@pytest.mark.parametrize("text", ["", "data", "data=0,expert=8", "model=8", "expert=4,expert=2", "expert=x"])
def test_meshes_in_another_form_are_refused(text):
    with pytest.raises(ValueError, match="data=N,expert=N,tensor=N"):
        parse_mesh(text, 8)
    with pytest.raises(ValueError, match="mesh expert=4 needs 4 devices, got 8"):
        parse_mesh("expert=4", 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h200:2x8", "h200:2x8"),
        ("a100", "a100:1x1"),
        ("v6e:16x16", "v6e:16x16"),
        ("v5p", "v5p:2x2x1"),
        ("7x", "tpu7x:2x2x1"),
    ],
)
def test_targets_by_name(name, expected):
    assert target_named(name).name == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h300:1x8", "unknown target 'h300:1x8'; legal are TPUs .v5e, .* and GPUs .a100, h100"),
        ("h200:8", "must be hosts x GPUs per host, as in h200:2x8; got '8'"),
        ("h200:0x8", "must be at least 1, got 0 and 8"),
    ],
)
def test_other_targets_are_refused_with_the_legal_ones(name, message):
    with pytest.raises(ValueError, match=message):
        target_named(name)


def test_sizes_are_padded_as_generation_pads_them():
    padded = Sizes(batch_size=3, prompt_length=1000, cache_length=1040).padded()
    assert (padded.prompt_length, padded.cache_length) == (1024, 1024 + 64)
    model, mesh = model_on(8)
    sizes = Sizes(batch_size=3, prompt_length=1000, cache_length=1040)
    programs = [compiled("prefill", "loops_h200_1x4"), compiled("decode", "loops_h200_1x4")]
    warnings = report(model, target_named("h200:1x8"), sizes, mesh, programs).warnings
    assert any("1000 prompt tokens to 1024, room for 40 new ones to 64" in warning for warning in warnings)
    assert any("batch of 3 cannot be split over the 2 data positions" in warning for warning in warnings)
    with pytest.raises(ValueError, match="must exceed prompt_length=8"):
        Sizes(batch_size=1, prompt_length=8, cache_length=8)


def test_what_a_kernel_moves_is_said_to_be_missing():
    given, shape = model_on(4)
    decoder = decoder_of({**GROUPED_QUERY, "hidden_size": 128, "moe_intermediate_size": 128})
    for strategy, is_said in ((None, False), ("remote_dma", True)):
        with targeting(TPU_DEVICES["v6e"]):
            parallel = parallel_for(given.mesh, strategy)
            model = abstract_model(decoder, dtype=jnp.bfloat16, mesh=given.mesh, parallel=parallel)
        program = compiled("prefill", "loops_h200_1x4")
        warnings = report(model, target_named("v6e:2x2"), SIZES, shape, [program]).warnings
        assert any("rows travel inside of a kernel" in warning for warning in warnings) == is_said


@pytest.mark.parametrize(
    ("strategy", "data_axis"), [("replicated", "data"), ("ragged_all_to_all", ("data", "expert")), (None, "data")]
)
def test_strategies_that_move_tokens_split_the_batch_over_experts_too(strategy, data_axis):
    mesh = jax.make_mesh((2, 4, 1), ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
    parallel = parallel_for(mesh, strategy)
    assert (parallel.strategy, parallel.data_axis) == (strategy, data_axis)
