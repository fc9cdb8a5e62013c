"""Asynchronous work that is not waited for, and accesses that may come in the wrong order, are found in PTX; others are not."""

import pytest

from moe_jax.aot.ptx import ControlFlow

KERNEL = """
.version 9.0
.target sm_90a
.visible .entry some_kernel(
    .param .u64 .ptr .align 256 some_kernel_param_0,
    .param .align 64 .b8 some_kernel_param_1[768]
)
.maxntid 384, 1, 1
{
    .reg .pred %p<3>;
    // bra in a comment
$L__func_begin0:
    .loc 1 45 0
    mov.u32 %r1, 0;
BODY
    ret;
$L__func_end0:
}
    .section .debug_macinfo { }
"""
MULTIPLY = "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32 {%r3,%r4}, %rd1, p, 1; }"
WAIT = "wgmma.wait_group.sync.aligned 1;"
SPIN = """
    {
    .reg .pred P1;
    LAB_WAIT:
    mbarrier.try_wait.parity.shared.b64 P1, [%r71], %r72, %r73;
    @P1 bra.uni DONE;
    bra.uni LAB_WAIT;
    DONE:
    }
"""

AWAITED = {
    "no loop": MULTIPLY,
    "waits in the loop": f"$L1: {MULTIPLY} {WAIT} @%p1 bra $L1;",
    "waits at the loop's other end": f"$L1: {WAIT} {MULTIPLY} @%p1 bra $L1;",
    "several products, one wait": f"$L1: {MULTIPLY} {MULTIPLY} {WAIT} @%p1 bra $L1;",
    "waits in the inner loop of two": f"$L1: $L2: {MULTIPLY} {WAIT} @%p1 bra $L2; @%p2 bra $L1;",
    "waits on both ways": f"$L1: {MULTIPLY} @%p1 bra $L2; {WAIT} bra.uni $L3; $L2: {WAIT} $L3: @%p2 bra $L1;",
    "another loop spins": f"$L1: {SPIN} {MULTIPLY} {WAIT} {SPIN} @%p1 bra $L1;",
    "jumps forward only": f"@%p1 bra $L1; {MULTIPLY} $L1: {MULTIPLY}",
    "left out together by one predicate": f"$L1: @%p2 bra $L2; {MULTIPLY} $L2: @%p2 bra $L3; {WAIT} $L3: @%p1 bra $L1;",
    "elected anew each time round": (
        f"$L1: elect.sync %r1|%p2, -1; @!%p2 bra $L2; {MULTIPLY} $L2: @!%p2 bra $L3; {WAIT} $L3: @%p1 bra $L1;"
    ),
    "returns before the loop closes": f"$L1: {MULTIPLY} ret; bra.uni $L1;",
}
UNAWAITED = {
    "no wait": f"$L1: {MULTIPLY} @%p1 bra $L1;",
    "waits after the loop": f"$L1: {MULTIPLY} @%p1 bra $L1; {WAIT}",
    "waits in the outer loop of two": f"$L1: $L2: {MULTIPLY} @%p1 bra $L2; {WAIT} @%p2 bra $L1;",
    "a way around the wait": f"$L1: {MULTIPLY} @%p1 bra $L2; {WAIT} $L2: @%p2 bra $L1;",
    "waits under a predicate": f"$L1: {MULTIPLY} @%p2 {WAIT} @%p1 bra $L1;",
    "waits for something else": f"$L1: {MULTIPLY} cp.async.bulk.wait_group 0; {SPIN} @%p1 bra $L1;",
    "loop entered from below": f"bra.uni $L2; $L1: {MULTIPLY} $L2: @%p1 bra $L1; {WAIT}",
    "left out by another predicate": f"$L1: @%p2 bra $L2; {MULTIPLY} $L2: @%p3 bra $L3; {WAIT} $L3: @%p1 bra $L1;",
    "left out by the opposite predicate": f"$L1: @%p2 bra $L2; {MULTIPLY} $L2: @!%p2 bra $L3; {WAIT} $L3: @%p1 bra $L1;",
    "predicate computed anew between the two": (
        f"$L1: @%p2 bra $L2; {MULTIPLY} $L2: setp.lt.s32 %p2, %r1, 3; @%p2 bra $L3; {WAIT}"
        " $L3: setp.eq.s32 %p2, %r1, 4; @%p1 bra $L1;"
    ),
    "predicate computed beside another": (
        f"$L1: @%p2 bra $L2; {MULTIPLY} $L2: setp.lt.s32 %p4|%p2, %r1, 3; @%p2 bra $L3; {WAIT}"
        " $L3: setp.eq.s32 %p4|%p2, %r1, 4; @%p1 bra $L1;"
    ),
    "name of the wait goes on": f"$L1: {MULTIPLY} wgmma.wait_groups 1; @%p1 bra $L1;",
}


WRITE = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%rd1], {%r1, %r2, %r3, %r4};"
FENCE = "fence.proxy.async.shared::cta;"
COPY = "@%p3 cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd2, {%r1, %r2, %r3, %r4} ], [%r5];"
ORDERED = {
    "fence between": f"{WRITE} {FENCE} {COPY}",
    "several writes, one fence": f"{WRITE} {WRITE} {FENCE} {COPY} {COPY}",
    "fence on both ways": f"{WRITE} @%p1 bra $L1; {FENCE} bra.uni $L2; $L1: {FENCE} $L2: {COPY}",
    "copied before it is written": f"{COPY} {WRITE} {FENCE}",
    "written, fenced and copied each time round": f"$L1: {WRITE} {FENCE} {COPY} @%p1 bra $L1;",
    "written and copied on different ways": f"@%p1 bra $L1; {WRITE} bra.uni $L2; $L1: {COPY} $L2: ret;",
}
UNORDERED = {
    "no fence": f"{WRITE} {COPY}",
    "another write after the fence": f"{WRITE} {FENCE} {WRITE} {COPY}",
    "a way around the fence": f"{WRITE} @%p1 bra $L1; {FENCE} $L1: {COPY}",
    "fence under a predicate": f"{WRITE} @%p1 {FENCE} {COPY}",
    "another kind of fence": f"{WRITE} fence.mbarrier_init.release.cluster; {COPY}",
    "copied the next time round": f"$L1: {COPY} {WRITE} @%p1 bra $L1; {FENCE}",
    "the second of two writes": f"{WRITE} {FENCE} {COPY} @%p1 bra $L1; {WRITE} $L1: {COPY}",
}


def flow(body):
    return ControlFlow.of(KERNEL.replace("BODY", body))


@pytest.mark.parametrize("body", AWAITED.values(), ids=AWAITED.keys())
def test_awaited_products_are_not_reported(body):
    assert not flow(body).repeats_without("wgmma.mma_async", "wgmma.wait_group")


@pytest.mark.parametrize("body", UNAWAITED.values(), ids=UNAWAITED.keys())
def test_products_that_repeat_unawaited_are_reported(body):
    assert flow(body).repeats_without("wgmma.mma_async", "wgmma.wait_group")


def is_copied_unfenced(body):
    return flow(body).reaches_without(["stmatrix"], ["cp.async.bulk.tensor.4d.global"], "fence.proxy.async")


@pytest.mark.parametrize("body", ORDERED.values(), ids=ORDERED.keys())
def test_writes_with_a_fence_before_the_copy_are_not_reported(body):
    assert not is_copied_unfenced(body)


@pytest.mark.parametrize("body", UNORDERED.values(), ids=UNORDERED.keys())
def test_writes_that_reach_a_copy_unfenced_are_reported(body):
    assert is_copied_unfenced(body)


def test_only_what_leads_to_an_end_unsynchronised_counts_where_one_is_given():
    def is_overwritten(body):
        copies = ["cp.async.bulk.tensor.4d.global"]
        return flow(body).reaches_without(copies, ["stmatrix"], "cp.async.bulk.wait_group", leading_to=copies)

    wait = "cp.async.bulk.wait_group.read 0;"
    assert is_overwritten(f"$L1: {WRITE} {COPY} @%p1 bra $L1; {wait}")
    assert is_overwritten(f"{COPY} {WRITE} {COPY} {wait}")
    assert not is_overwritten(f"$L1: {wait} {WRITE} {COPY} @%p1 bra $L1;")
    elsewhere = f"{WRITE} {FENCE} {MULTIPLY}"
    assert not is_overwritten(f"$L1: {elsewhere} {wait} {WRITE} {COPY} @%p1 bra $L1;")
    assert is_overwritten(f"$L1: {elsewhere} {WRITE} {COPY} @%p1 bra $L1;")


def test_predicated_synchronisation_counts_where_one_thread_acts_for_all():
    body = "$L1: @%p2 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1; @%p2 tcgen05.commit.cta_group::1 [%r2]; @%p1 bra $L1;"
    assert flow(body).repeats_without("tcgen05.mma", "tcgen05.commit")
    assert not flow(body).repeats_without("tcgen05.mma", "tcgen05.commit", predicated=True)


def test_instructions_are_counted_whatever_their_predicate_and_modifiers():
    body = f"{MULTIPLY} $L1: {MULTIPLY} @!%p1 tcgen05.mma.kind::f16 [%r1], %rd1; tcgen05.mmaish %r1; {SPIN}"
    counted = flow(body)
    assert [counted.count(name) for name in ("wgmma.mma_async", "tcgen05.mma", "mbarrier.try_wait")] == [2, 1, 1]


def test_labels_of_the_same_name_belong_to_their_blocks():
    body = f"{SPIN} {MULTIPLY} {SPIN} {WAIT}"
    assert not flow(body).repeats_without("wgmma.mma_async", "wgmma.wait_group")
    assert flow(body).repeats_without("mbarrier.try_wait", "wgmma.wait_group")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (KERNEL.replace("BODY", "bra.uni $L7;"), r"label that is not there: \$L7"),
        (KERNEL.replace("BODY", "{ INNER: } bra INNER;"), "label that is not there: INNER"),
        (KERNEL.replace("BODY", "brx.idx %r1, ts;"), "computed branches are not understood"),
        (KERNEL + KERNEL, "one kernel expected in PTX, found .'some_kernel', 'some_kernel'."),
        (".version 9.0", r"one kernel expected in PTX, found \[\]"),
    ],
)
def test_what_cannot_be_followed_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        ControlFlow.of(text)
