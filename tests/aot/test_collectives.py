"""Collectives are read from compiled programs as they run: kind, bytes, groups, number of executions, what runs beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support.compiled_programs import collective, recorded

from moe_jax.aot.collectives import read_collectives
from moe_jax.aot.hlo import read_computations, short_type, type_bytes

KINDS = ["all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter"]


def read(name):
    return read_collectives(recorded(name))


def named(collectives):
    kinds = [one.kind for one in collectives]
    assert sorted(kinds) == sorted(set(kinds)), "one of each kind was asked for"
    return dict(zip(kinds, collectives, strict=True))


@pytest.mark.parametrize(("name", "devices"), [("collectives_v6e_2x2", 4), ("collectives_h200_1x8", 8)])
def test_every_kind_is_read_with_the_bytes_that_one_device_gives(name, devices):
    collectives = named(read(name))
    assert sorted(collectives) == KINDS
    ranks = devices // 2
    shard = 8 * ranks * 128 * 2  # rows of one device, 128 bfloat16 features
    for kind, found in collectives.items():
        given = {"reduce-scatter": ranks * shard}.get(kind, shard)
        if kind == "ragged-all-to-all" and "v6e" in name:
            given *= 2  # the TPU compiler widens its rows from 128 to 2 * 128 features
        assert found.operand_bytes == given, kind
        assert found.executions == 5, kind
        assert found.total_operand_bytes == 5 * given
        assert found.open_loops == 0


@pytest.mark.parametrize(("name", "devices"), [("collectives_v6e_2x2", 4), ("collectives_h200_1x8", 8)])
def test_groups_are_the_rows_and_columns_of_the_mesh(name, devices):
    mesh = np.arange(devices).reshape(2, -1)
    rows, columns = ([tuple(map(int, group)) for group in groups] for groups in (mesh, mesh.T))
    collectives = named(read(name))
    pairs = collectives.pop("collective-permute")
    assert set(pairs.groups) == {(row[i], row[(i + 1) % len(row)]) for row in rows for i in range(len(row))}
    assert pairs.group_size == 2
    for kind, found in collectives.items():
        expected = columns if kind == "all-reduce" else rows
        assert list(found.groups) == expected, kind
        assert found.group_size == len(expected[0])


def test_hosts_are_crossed_by_groups_that_have_devices_of_several():
    collectives = named(read("collectives_h200_1x8"))
    for kind, crosses in {"all-gather": False, "all-reduce": True, "collective-permute": False}.items():
        assert collectives[kind].crosses(devices_per_host=4) == crosses
        assert not collectives[kind].crosses(devices_per_host=8)
        assert collectives[kind].crosses(devices_per_host=1)


def test_what_runs_between_start_and_end_is_named():
    gpu = named(read("collectives_h200_1x8"))
    assert gpu["ragged-all-to-all"].is_async
    assert gpu["ragged-all-to-all"].meanwhile == ("loop_add_fusion.1", "gemm_fusion_dot.1")
    assert gpu["all-reduce"].meanwhile == ("gemm_fusion_dot", "loop_reduce_fusion")
    assert gpu["all-gather"].is_async
    assert gpu["all-gather"].meanwhile == ()
    assert not gpu["reduce-scatter"].is_async  # GPU programs mark what waits at once
    tpu = named(read("collectives_v6e_2x2"))
    assert [kind for kind, found in tpu.items() if found.is_async] == ["collective-permute"]


def test_a_ragged_exchange_between_gpu_hosts_is_seen_to_be_made_of_an_all_gather():
    first, gathered, ragged = read("ragged_h200_2x8")
    assert [first.kind, gathered.kind, ragged.kind] == ["all-to-all", "all-gather", "ragged-all-to-all"]
    assert gathered.operand_bytes == 64 * 128 * 2
    assert (gathered.forwards, ragged.forwards) == (None, "all-gather")
    assert gathered.crosses(devices_per_host=8)
    assert not ragged.crosses(devices_per_host=8)


@pytest.mark.parametrize("name", ["loops_v6e_2x2", "loops_h200_1x4"])
def test_layers_inside_a_loop_of_unknown_length_are_counted_per_turn(name):
    collectives = read(name)
    assert [one.kind for one in collectives].count("all-reduce") == 1
    for one in collectives:
        assert one.executions == 7
        assert one.open_loops == 1
    assert next(c for c in collectives if c.kind == "all-reduce").operand_bytes == 8 * 128 * 2


def test_counted_bytes_are_those_of_a_program_compiled_here():
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)

    def layers(x):
        def layer(x, scale):
            return jax.lax.psum(x * scale, "expert"), None

        def local(x):
            return jax.lax.scan(layer, x, jnp.arange(3.0))[0]

        split = PartitionSpec("data")
        return jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(x)

    text = jax.jit(layers).lower(jnp.ones((6, 5))).compile().as_text()
    (found,) = read_collectives(text)
    assert (found.kind, found.operand_types) == ("all-reduce", ("f32[3,5]",))
    assert (found.operand_bytes, found.executions) == (3 * 5 * 4, 3)
    assert [set(group) for group in found.groups] == [{0, 1, 2, 3}, {4, 5, 6, 7}]


PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=8

%wrapped (param: bf16[4,2]) -> bf16[4,2] {{
  %param = bf16[4,2]{{1,0}} parameter(0)
  ROOT %inner = bf16[4,2]{{1,0}} all-to-all(%param), channel_id=1, {groups}, dimensions={{0}}
}}

%unused (param: f32[]) -> f32[] {{
  %param = f32[] parameter(0)
  ROOT %never = f32[] all-reduce(%param), replica_groups={{}}, to_apply=%sum
}}

ENTRY %main (x: bf16[4,2]) -> bf16[4,2] {{
  %x = bf16[4,2]{{1,0}} parameter(0)
  %start = ((bf16[4,2]{{1,0}}), bf16[4,2]{{1,0}}, u32[]) async-start(%x), calls=%wrapped
  %work = f32[8]{{0}} custom-call(%x), custom_call_target="kernel"
  %renamed = bf16[2,4]{{1,0}} bitcast(%x)
  %update = ((bf16[4,2]{{1,0}}), bf16[4,2]{{1,0}}, u32[]) async-update(%start), calls=%wrapped
  %more = f32[8]{{0}} fusion(%work), kind=kLoop, calls=%unknown
  %done = bf16[4,2]{{1,0}} async-done(%update), calls=%wrapped
  ROOT %last = bf16[4,2]{{1,0}} fusion(%done), kind=kLoop, calls=%unknown
}}
"""


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={}", ()),
        ("replica_groups={{0,5},{3,1}}", ((0, 5), (3, 1))),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
    ],
)
def test_every_way_to_write_groups_is_read(written, groups):
    collectives = read_collectives(PROGRAM.format(groups=written))
    assert [one.groups for one in collectives] == [groups]
    assert collectives[0].group_size == (len(groups[0]) if groups else 8)


def test_a_wrapped_collective_is_asynchronous_and_one_that_never_runs_is_left_out():
    (found,) = read_collectives(PROGRAM.format(groups="replica_groups={}"))
    assert (found.kind, found.operand_bytes) == ("all-to-all", 16)
    assert found.is_async
    assert found.meanwhile == ("work", "more")


def test_groups_in_an_unknown_form_and_text_that_is_no_program_are_refused():
    with pytest.raises(ValueError, match="form that is not known: 'replica_groups=somehow"):
        read_collectives(PROGRAM.format(groups="replica_groups=somehow"))
    with pytest.raises(ValueError, match="ENTRY computation, got none"):
        read_collectives("module @jit_f {}")


@pytest.mark.parametrize(
    ("kind", "changes", "sent"),
    [
        ("all-reduce", {}, 2 * 700),
        ("all-gather", dict(operand_bytes=100), 700),
        ("reduce-scatter", dict(result_bytes=100), 700),
        ("all-to-all", {}, 700),
        ("ragged-all-to-all", {}, 800),
        ("collective-permute", dict(group_size=2), 800),
        ("all-reduce", dict(group_size=1), 0),
    ],
)
def test_sent_bytes_are_the_least_that_the_operation_needs(kind, changes, sent):
    assert collective(kind, **changes).sent_bytes == sent


@pytest.mark.parametrize(
    ("text", "written", "size"),
    [
        ("bf16[4,128]{1,0:T(8,128)(2,1)S(1)}", "bf16[4,128]", 1024),
        ("pred[3]", "pred[3]", 3),
        ("s4[5]{0}", "s4[5]", 3),
        ("f8e4m3fn[10]", "f8e4m3fn[10]", 10),
        ("f32[]", "f32[]", 4),
        ("f32[<=8,2]", "f32[<=8,2]", 64),
        ("(f32[2]{0}, /*index=1*/u32[]{:S(2)}, token[])", "(f32[2], u32[], token[])", 12),
    ],
)
def test_sizes_of_types(text, written, size):
    assert (short_type(text), type_bytes(text)) == (written, size)


def test_a_computation_keeps_the_order_of_its_instructions():
    main = read_computations(PROGRAM.format(groups="replica_groups={}"))["main"]
    assert [instruction.name for instruction in main.instructions][:3] == ["x", "start", "work"]
    assert main.by_name()["done"].operands == ("update",)
