"""Bundles are read from the compiler's text, and what they execute is counted: loops, branches, delay slots, copies."""

import textwrap

import pytest

from moe_jax.aot.bundles import Schedule, dump_flags
from moe_jax.aot.scalar_unit import execute

LEGEND = "= control target key start\nLH: loop header\n= control target key end\n\n"
HEADING = "== CAPACITY:\nMATMUL, VSTORE:SPILL, SALU\n    2     1     2\n== UTILIZATION:\n"


def dump(text: str, slots: dict[int, str] | None = None, *, delay_slots: int = 1) -> Schedule:
    text = textwrap.dedent(text)
    bundles = len(text.strip().splitlines())
    lines = [(slots or {}).get(address, "0 0 0") for address in range(bundles)]
    return Schedule.parse(LEGEND + text, HEADING + "\n".join(lines) + "\n", delay_slots)


LOOP = """\
         0   : { %s9_s0 = inlined_call_operand.<no memory space> [shape: s32[], index: 0, kind: input] }
       0x1   : { %s1_s1 = inlined_call_operand.hbm [shape: s32[4], index: 1, kind: input, shape index: {}] }
       0x2   : { %s2_s2 = inlined_call_operand.hbm [shape: bf16[64,128], index: 2, kind: input, shape index: {}] }
       0x3   : { %s3_s3 = smov.u32 [#allocation4] /* materialized constant */ }
       0x4   : { %5 = dma.hbm_to_smem /*hbm=*/%s1_s1, /*size_in_granules=*/1, /*smem=*/%s3_s3 }
       0x5   : { %s6_s5 = smov.u32 0 }
       0x6 LB: > { %s30_s7 = sadd.s32 0, %s7_s5 ;; %s7_s5 = sphi %s6_s5, %s20_s5 } /* Start region 7 :: Start region 8 */
       0x7   : > { %s8_s6 = sld [smem:[#allocation4 + %s30_s7]] }
       0x8   : > { %p9_p0 = scmp.le.s32.totalorder %s8_s6, 0 }
       0x9   : > { %10 = sbr.rel (%p9_p0) target = $region9 }
       0xa   : > {  }
       0xb   : > { %s11_s8 = sshll.u32 %s8_s6, 1 /* only if rows exist */ }
       0xc   : > { %12 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s2_s2, /*size_in_granules=*/%s11_s8, /*vmem=*/[#allocation6] }
       0xd PF: > { %s20_s5 = sadd.s32 1, %s7_s5 } /* Start/End empty region 9 */
       0xe   : > { %p21_p1 = scmp.ge.s32.totalorder %s20_s5, %s9_s0 }
       0xf   : { %22 = sbr.rel (!%p21_p1) target = $region7 }
      0x10   : { } /* End region 7 */
      0x11 PF: { } /* exit bundle */
"""


def test_what_a_loop_executes_follows_from_the_tables_that_it_reads():
    schedule = dump(LOOP, {0xB: "2 1 0", 0xC: "1 0 0"})
    execution = execute(schedule, {0: 4, 1: [3, 0, 5, -1]})
    # Six bundles before, one after; 0x6 to 0xa and 0xd to 0x10 four times; 0xb and 0xc for the two positive entries.
    assert execution.bundles == 6 + 4 * 9 + 2 * 2 + 1
    assert execution.slots("MATMUL") == 2 * 3
    assert execution.slots("VSTORE:SPILL") == 2
    assert execution.matmul_occupancy == 3 / 4
    assert execution.read_bytes == {2: 2 * 32 * (3 + 5)}
    assert execution.written_bytes == {}


def test_what_two_calls_execute_is_added_up():
    schedule = dump(LOOP, {0xB: "2 1 0", 0xC: "1 0 0"})
    two = execute(schedule, {0: 4, 1: [3, 0, 5, -1]}) + execute(schedule, {0: 2, 1: [0, 7, 0, 0]})
    assert two.bundles == (6 + 4 * 9 + 2 * 2 + 1) + (6 + 2 * 9 + 2 + 1)
    assert two.slots("MATMUL") == 2 * 3 + 3
    assert two.read_bytes == {2: 2 * 32 * (3 + 5 + 7)}


def test_an_empty_bundle_may_stand_for_several_so_a_branch_is_taken_where_control_can_come_from_elsewhere_at_the_latest():
    schedule = dump(LOOP, delay_slots=3)
    assert [schedule.after_branch(address) for address in (0x9, 0xF)] == [0xD, 0x11]
    # What precedes the next block belongs to the branch: both copies of positive entries are executed for the others too.
    harmless = LOOP.replace("%s11_s8 = sshll.u32 %s8_s6, 1", "%s11_s8 = smax.s32 %s8_s6, 0")
    execution = execute(dump(harmless, delay_slots=3), {0: 4, 1: [3, 0, 5, -1]})
    assert execution.bundles == 6 + 4 * 11 + 1
    assert execution.read_bytes == {2: 32 * (3 + 5)}


@pytest.mark.parametrize("source", ["spop.sfrf", "spop", "spop.drf"])
def test_a_branch_on_an_unknown_value_and_missing_scalars_are_errors(source):
    with pytest.raises(ValueError, match="scalars are not given"):
        execute(dump(LOOP), {0: 4})
    unknown = LOOP.replace("sld [smem:[#allocation4 + %s30_s7]]", f"{source} %123")
    with pytest.raises(ValueError, match="depends on %p9_p0, which is not known"):
        execute(dump(unknown), {0: 4, 1: [3, 0, 5, -1]})


def test_a_kernel_that_does_not_end_is_given_up():
    endless = LOOP.replace("scmp.ge.s32.totalorder %s20_s5, %s9_s0", "scmp.ge.s32.totalorder 0, 1")
    with pytest.raises(RuntimeError, match="did not end after 1000 bundles"):
        execute(dump(endless), {0: 4, 1: [1] * 10_000}, most_bundles=1000)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("%s5_s5 = sadd.s32 4294967295, 3", 2),
        ("%s5_s5 = ssub.s32 0, 3", 2**32 - 3),
        ("%s5_s5 = sshra.s32 4294967280, 3", 2**32 - 2),
        ("%s5_s5 = smulhi.u32 2863311531, 4294967295", 2 * (2**32 - 1) // 3),
        ("%s5_s5 = smin.u32 4294967295, 7", 7),
        ("%s5_s5 = smov.u32 (%p1_p1, %s4_s4), 8", 8),
        ("%s5_s5 = smov.u32 (!%p1_p1, %s4_s4), 8", 5),
        ("%s5_s5 = scalar_select /*predicate=*/%p1_p1, /*on_true=*/1, /*on_false=*/0", 1),
    ],
)
def test_words_of_32_bits_wrap_and_predicates_select(instruction, expected):
    text = f"""\
             0   : {{ %s2_s2 = inlined_call_operand.hbm [shape: bf16[64,128], index: 2, kind: input] ;; %s4_s4 = smov.u32 5 }}
           0x1   : {{ %p1_p1 = scmp.lt.s32.totalorder 4294967295, 0 }}
           0x2   : {{ {instruction} }}
           0x3   : {{ %p6_p2 = scmp.eq.s32.totalorder %s5_s5, {expected} }}
           0x4   : {{ %7 = dma.vmem_to_hbm (%p6_p2), /*vmem=*/[#allocation1], /*size_in_granules=*/1, /*hbm=*/%s2_s2 }}
    """
    assert execute(dump(text), {}).written_bytes == {2: 32}


DIVISION = """\
         0   : {{ %s2_s2 = inlined_call_operand.hbm [shape: bf16[64,128], index: 2, kind: input] ;; %s4_s4 = smov.u32 101 }}
       0x1   : {{ %p1_p1 = scmp.eq.s32.totalorder %s4_s4, 101 }}
       0x2   : {{ %7 = sdivrem.u32 (%p1_p1), {operands} /* {kind} */ }}
       0x3   : {{ %8 = sdivrem.u32 (!%p1_p1), %s4_s4, 14 /* kRem */ }}
       0x4   : {{ %s5_s5 = spop.drf %7 }}
       0x5   : {{ %s6_s6 = {second} }}
       0x6   : {{ %9 = dma.hbm_to_vmem /*hbm=*/%s2_s2, /*size_in_granules=*/%s5_s5, /*vmem=*/[#allocation1] }}
       0x7   : {{ %10 = dma.vmem_to_hbm /*vmem=*/[#allocation1], /*size_in_granules=*/%s6_s6, /*hbm=*/%s2_s2 }}
"""


@pytest.mark.parametrize(
    ("kind", "second", "expected"),
    [("kDiv", "smov.u32 1", (7, 1)), ("kRem", "smov.u32 1", (3, 1)), ("kDivAndRem", "spop.drf %7", (7, 3))],
)
def test_a_division_gives_its_quotient_before_its_remainder_and_only_what_is_asked_for(kind, second, expected):
    execution = execute(dump(DIVISION.format(operands="%s4_s4, 14", kind=kind, second=second)), {})
    assert (execution.read_bytes[2], execution.written_bytes[2]) == tuple(32 * granules for granules in expected)


@pytest.mark.parametrize("operands", ["%s9_s9, 14", "%s4_s4, %s9_s9", "%s4_s4, 0"])
def test_what_a_division_of_unknown_values_or_by_zero_gives_is_not_known(operands):
    with pytest.raises(ValueError, match="size or address of a copy are not known"):
        execute(dump(DIVISION.format(operands=operands, kind="kRem", second="smov.u32 1")), {})


def test_texts_that_are_not_of_the_same_bundles_are_refused():
    with pytest.raises(ValueError, match="18 bundles, not numbered from 0, with slots for 1"):
        Schedule.parse(LEGEND + LOOP, HEADING + "0 0 0\n", 1)
    with pytest.raises(ValueError, match="no heading"):
        Schedule.parse(LEGEND + LOOP, "", 1)


def test_a_folder_without_dumps_is_an_error_that_says_what_to_set(tmp_path):
    assert str(tmp_path) in dump_flags(tmp_path)
    with pytest.raises(FileNotFoundError, match="LIBTPU_INIT_ARGS must be set before libtpu is loaded"):
        Schedule.read(tmp_path, 4)
