"""What the compilers print is read in full, and what must not be in it is found."""

import os
import subprocess
import sys

import pytest

from moe_jax.aot.ptxas import KernelReport, dumping_to
from moe_jax.kernels.device import GPU_DEVICES

RESOURCES = (
    "Resources(smem_scratch_bytes=229376, tmem_scratch_cols=0, tmem_collective_scratch_cols=0, barrier_counts=Counter("
    "{Barrier(arrival_count=3, num_barriers=4, orders_tensor_core=False): 1, Barrier(arrival_count=2, num_barriers=2,"
    " orders_tensor_core=True): 3}), scoped_gmem_semaphores={})\n"
)
PTX = """//
.version 9.0
.target sm_90a
.visible .entry rows_mosaic_gpu_kernel(
    .param .u64 rows_mosaic_gpu_kernel_param_0
)
{
$L__BB0_1:
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2;
    wgmma.wait_group.sync.aligned 1;
    @%p1 bra $L__BB0_1;
    ret;

}
    .section .debug_macinfo { }
"""
PTXAS = """
ptxas info    : (C7519) warpgroup.arrive is injected in around line 580 by compiler to allow use of registers in GMMA
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rows_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for rows_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
LOSS = "ptxas info    : (C{}) Potential Performance Loss: {} in the function 'rows_mosaic_gpu_kernel'\n"
IGNORED = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.\n"
SPILLS = "16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads"
NO_SPILLS = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
STORING = """
$L__BB0_2:
    @%p2 cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes [%r6], [%rd5, {%r3}], [%r7];
    cp.async.bulk.wait_group.read 0;
    bar.sync %r8, 128;
    ld.shared.b16 %rs1, [%rd6];
    st.shared.v2.b32 [%rd3], {%r1, %r2};
    fence.proxy.async.shared::cta;
    bar.sync %r8, 128;
    @%p2 cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%rd4, {%r3, %r4, %r5} ], [%r6];
    cp.async.bulk.commit_group;
    @%p1 bra $L__BB0_1;
    cp.async.bulk.wait_group 0;
    ret;
"""
STORING_PTX = PTX.replace("    @%p1 bra $L__BB0_1;\n    ret;\n", STORING)
"""A tile is multiplied, something is copied for its end, the result is written to shared memory and copied from there."""
H200 = GPU_DEVICES["h200"]


def test_every_figure_is_read():
    report = KernelReport.of_dump(RESOURCES + PTX + PTXAS.replace(NO_SPILLS, SPILLS))
    assert (report.function, report.architecture) == ("rows_mosaic_gpu_kernel", "sm_90a")
    assert (report.registers, report.stack_bytes) == (168, 16)
    assert (report.spill_store_bytes, report.spill_load_bytes) == (20, 24)
    assert report.shared_memory_bytes == 229376 + 8 * (4 * 1 + 2 * 3)
    assert (report.tensor_core_instructions, report.losses, report.unawaited, report.unordered) == (1, (), (), ())


@pytest.mark.parametrize("ptx", [PTX, STORING_PTX])
def test_a_kernel_without_faults_has_no_shortcomings(ptx):
    assert KernelReport.of_dump(RESOURCES + ptx + PTXAS).shortcomings(H200) == ()


@pytest.mark.parametrize(
    ("statement", "which", "consequences"),
    [
        ("    fence.proxy.async.shared::cta;\n", 0, ["a copy may read", "a multiplication may read"]),
        (
            "    bar.sync %r8, 128;\n",
            1,
            [
                "a copy may overwrite",
                "a copy may read what was there before another thread's",
                "a multiplication may read",
            ],
        ),
        ("    cp.async.bulk.commit_group;\n", 0, ["a copy is not waited for"]),
        ("    cp.async.bulk.wait_group.read 0;\n", 0, ["a write may change what a copy has yet to read"]),
        (
            "    bar.sync %r8, 128;\n",
            0,
            ["a write may change what a copy has yet to read, for which another thread waits"],
        ),
        ("    cp.async.bulk.wait_group 0;\n", 0, ["the kernel may end before a copy has read all"]),
    ],
)
def test_each_synchronisation_of_shared_memory_that_is_missing_is_a_shortcoming(statement, which, consequences):
    parts = STORING_PTX.split(statement)
    without = statement.join(parts[: which + 1]) + statement.join(parts[which + 1 :])
    assert len(without) == len(STORING_PTX) - len(statement)
    found = KernelReport.of_dump(RESOURCES + without + PTXAS).shortcomings(H200)
    assert len(found) == len(consequences)
    assert all(map(str.startswith, found, consequences)), found


@pytest.mark.parametrize(
    ("dump", "shortcoming"),
    [
        (
            RESOURCES + PTX + PTXAS.replace(NO_SPILLS, SPILLS),
            "20 bytes of spill stores, 24 of spill loads, 16 of stack",
        ),
        (
            RESOURCES + PTX + PTXAS.replace("0 bytes stack", "8 bytes stack"),
            "0 bytes of spill stores, 0 of spill loads, 8",
        ),
        (RESOURCES + PTX + LOSS.format(7511, "wgmma are serialized") + PTXAS, "wgmma are serialized (C7511)"),
        (RESOURCES + PTX + LOSS.format(7515, "wgmma are serialized") + PTXAS, "wgmma are serialized (C7515)"),
        (
            RESOURCES + PTX + PTXAS + IGNORED,
            "'setmaxnreg' ignored; unable to determine register count at entry. (C7508)",
        ),
        (RESOURCES.replace("229376", "232400") + PTX + PTXAS, "232480 bytes of shared memory, h200 has 232448"),
        (
            RESOURCES + PTX.replace("wgmma.wait_group.sync.aligned 1;", "") + PTXAS,
            "wgmma.mma_async repeats without wgmma.wait_group",
        ),
        (
            RESOURCES + PTX.replace("wgmma.mma_async", "tcgen05.mma") + PTXAS,
            "tcgen05.mma repeats without tcgen05.commit",
        ),
    ],
)
def test_each_fault_is_a_shortcoming(dump, shortcoming):
    assert any(found.startswith(shortcoming) for found in KernelReport.of_dump(dump).shortcomings(H200))


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        (RESOURCES + PTX, r"report on one kernel expected, found \[\]"),
        (RESOURCES, r"report on one kernel expected, found \[\]"),
        (RESOURCES + PTXAS, "nothing that looks like"),
        (PTX + PTXAS, "nothing that looks like Resources"),
        (RESOURCES + PTX + PTXAS.replace("spill", "spell"), "nothing that looks like"),
        (RESOURCES + PTX + PTXAS + PTXAS, "report on one kernel expected, found"),
    ],
    ids=["no ptxas", "resources alone", "no ptx", "no resources", "unknown form", "two kernels"],
)
def test_a_missing_report_is_an_error_and_never_a_clean_bill(dump, message):
    with pytest.raises(ValueError, match=message):
        KernelReport.of_dump(dump)


def test_what_the_process_prints_meanwhile_goes_to_the_file_and_all_is_put_back_after_an_error(tmp_path):
    script = f"""
import ctypes, os
from pathlib import Path
from moe_jax.aot.ptxas import dumping_to
libc = ctypes.CDLL(None)
print("before")
try:
    with dumping_to(Path({str(tmp_path / "dump.txt")!r})):
        libc.puts(b"from C, buffered, " + os.environ["MOSAIC_GPU_DUMP_PTXAS"].encode())
        raise KeyError
except KeyError:
    print("after", os.environ.get("MOSAIC_GPU_DUMP_PTXAS"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split("\n") == ["before", "after None", ""]
    assert (tmp_path / "dump.txt").read_text() == "from C, buffered, 1\n"


def test_a_file_that_cannot_be_written_leaves_no_descriptor_open(tmp_path):
    free = os.dup(1)
    os.close(free)
    with pytest.raises(FileNotFoundError), dumping_to(tmp_path / "no folder" / "dump.txt"):
        pass
    free_again = os.dup(1)
    os.close(free_again)
    assert free_again == free
