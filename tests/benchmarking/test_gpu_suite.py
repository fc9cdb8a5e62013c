"""What the GPU suite measures, and how it survives failures."""

import contextlib
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.benchmarking import expert_checks, expert_references, gpu_programs, gpu_suite
from moe_jax.benchmarking.contest import WorkerEndedError
from moe_jax.benchmarking.device_timer import Timing
from moe_jax.benchmarking.expert_contestants import Contestant, as_given
from moe_jax.benchmarking.expert_references import float32_block
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, TOKENS, ExpertShape
from moe_jax.benchmarking.gpu_cases import Case, all_cases, select
from moe_jax.benchmarking.gpu_ceilings import Ceilings
from moe_jax.benchmarking.gpu_programs import check_launches, compile_all, waits_for_host
from moe_jax.benchmarking.gpu_suite import Suite

SHAPE = ExpertShape(name="small", hidden_size=16, intermediate_size=24, num_experts=6, top_k=2)
CEILINGS = Ceilings(dense_flops=1e12, copy_bytes=1e12, launch_seconds=1e-6, device_events=False, timer="scripted")
CASE = Case(kind="forward", shape=SHAPE, tokens=20, routing="uniform")


def right(x, topk_weights, topk_ids, weights):
    return float32_block(x, topk_weights, topk_ids, weights, shape=SHAPE).astype(x.dtype)


def wrong(*arguments):
    return right(*arguments) * 2


def broken(*arguments):
    raise ValueError("tiles do not fit")


@pytest.fixture
def suite(monkeypatch, rng):
    entered = [
        Contestant("right", right, as_given, is_ours=True),
        Contestant("wrong", wrong, as_given),
        Contestant("broken", broken, as_given),
    ]
    monkeypatch.setattr(gpu_suite, "contestants", lambda shape, tokens: (entered, {"absent": "not installed"}))
    monkeypatch.setattr(Suite, "_entrants", lambda self, case: entered)
    timing = Timing(queued=3e-6, issue=1e-6, busy=[2e-6] * 10, kernels={"x_mosaic_gpu_kernel": 1e-6, "sort": 1e-6})
    monkeypatch.setattr(gpu_suite, "time_calls", lambda call, sets, device_events: timing)
    return Suite(ceilings=CEILINGS, rng=rng, deadline=time.monotonic() + 600, l2_bytes=1000, report=lambda line: None)


def test_every_shape_number_of_tokens_and_routing_is_a_forward_case():
    cases = all_cases()
    forward = {(c.shape.name, c.tokens, c.routing) for c in cases if c.kind == "forward"}
    assert len(forward) == len(EXPERT_SHAPES) * len(TOKENS) * 2
    assert len({c.name for c in cases}) == len(cases)
    assert [c.priority for c in cases] == sorted(c.priority for c in cases)
    assert {256, 512, 1024, 2048} <= {round(c.rows_per_expert) for c in cases if c.kind == "forward"}


def test_cases_are_selected_by_name():
    cases = all_cases()
    assert {c.shape.name for c in select(cases, only="forward/qwen3*uniform")} == {"qwen3-30b-a3b", "qwen3-235b-a22b"}
    assert {c.priority for c in select(cases, quick=True)} == {0}
    with pytest.raises(ValueError, match="no case matches 'qwen4'; cases are named forward/"):
        select(cases, only="qwen4")


def test_telling_shapes_come_first_with_more_sizes_and_they_alone_beside_others():
    cases = all_cases()
    rivals = [case for case in cases if case.has_rivals]
    assert cases[: len(rivals)] == rivals
    assert {case.shape.name for case in rivals} == {"mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3-ep32"}
    for kind, tokens in (("forward", {1, 8, 2048, 8192, 32768}), ("backward", {2048, 8192, 32768})):
        assert {case.tokens for case in rivals if case.kind == kind} == tokens
    others = [case for case in cases if case.priority == 0 and not case.has_rivals]
    assert {case.tokens for case in others} == {1, 8, 8192}


def test_rivals_take_part_where_they_are_to(rng):
    suite = Suite(ceilings=CEILINGS, rng=rng, deadline=0, l2_bytes=1, report=lambda line: None)
    alone = dataclasses.replace(CASE, tokens=8)
    assert [contestant.name for contestant in suite._entrants(alone)] == ["moe_jax xla"]
    beside = suite._entrants(dataclasses.replace(alone, is_telling=True))
    assert {"moe_jax xla", "jax.lax.ragged_dot"} <= {contestant.name for contestant in beside}


def test_right_contestants_are_timed_and_wrong_or_broken_ones_named(suite):
    assert suite.run([CASE]) == []
    rows = {row["contestant"]: row for row in suite.rows}
    timed = rows["right"]
    assert timed["call_seconds"] == 3e-6
    assert timed["busy_seconds"] == 2e-6
    assert timed["flops"] == 40 * (2 * 16 * 48 + 2 * 24 * 16)
    assert timed["matmul_share"] == pytest.approx(timed["flops"] / 1e-6 / 1e12)
    assert timed["block_share"] == pytest.approx(timed["flops"] / 2e-6 / 1e12)
    assert timed["bandwidth_share"] == pytest.approx(timed["weight_bytes"] / 1e-6 / 1e12)
    assert 0 < timed["ceiling_128"] < timed["ceiling_64"] < 1
    assert "wrong: " in rows["wrong"]["failed"]
    assert "seconds" not in rows["wrong"]
    assert "tiles do not fit" in rows["broken"]["failed"]


def test_a_backward_pass_is_measured_with_the_gradients_of_its_first_projection_alone(suite, monkeypatch):
    xla = Contestant("moe_jax xla", right, as_given, is_ours=True)
    monkeypatch.setattr(Suite, "_entrants", lambda self, case: [xla])
    suite.run([dataclasses.replace(CASE, kind="backward")])
    (row,) = suite.rows
    assert row["failed"] is None
    assert row["flops"] == 3 * 40 * (2 * 16 * 48 + 2 * 24 * 16)
    assert row["rows_gradient_seconds"] == row["weights_gradient_seconds"] == 1e-6
    assert row["gradient_ratio"] == 1


def lose_the_device(monkeypatch, suite, name, after):
    """From the call number `after` of a method of the suite on, everything on the device fails, as after an illegal address."""
    original, calls = getattr(Suite, name), []

    def method(self, *arguments):
        calls.append(arguments)
        if len(calls) > after:
            monkeypatch.setattr(gpu_suite, "device_failure", lambda: "CUDA_ERROR_ILLEGAL_ADDRESS")
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return original(self, *arguments)

    monkeypatch.setattr(Suite, name, method)


CASES = [dataclasses.replace(CASE, tokens=tokens) for tokens in (20, 24, 28)]


def test_rows_are_saved_one_by_one_and_one_that_is_being_measured_is_named(suite):
    saved = []
    suite.save = lambda: saved.append([(row["contestant"], row["failed"]) for row in suite.rows])
    suite.run([CASE])
    assert saved[0] == [("right", gpu_suite.UNFINISHED)]
    assert saved[1] == [("right", None)]
    assert saved[2] == [("right", None), ("wrong", gpu_suite.UNFINISHED)]
    assert len(saved) == 6


@pytest.mark.parametrize("name", ["_draw_sets", "_measure"])
def test_a_lost_device_ends_the_suite_in_order_with_what_was_measured(suite, monkeypatch, name):
    lose_the_device(monkeypatch, suite, name, after=1)
    assert CASES[2] in suite.run(CASES)
    assert suite.rows[0]["call_seconds"] == 3e-6
    assert "ILLEGAL_ADDRESS" in suite.rows[-1]["failed"]
    assert suite.rows[-1]["case"] in (CASES[0].name, CASES[1].name)
    assert suite.lost == "CUDA_ERROR_ILLEGAL_ADDRESS"


def test_weights_that_do_not_fit_cost_the_cases_of_their_shape_alone(suite, monkeypatch):
    def random_weights(shape, key):
        if shape.name == "huge":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return gpu_suite_random_weights(shape, key)

    gpu_suite_random_weights = gpu_suite.random_weights
    monkeypatch.setattr(gpu_suite, "random_weights", random_weights)
    huge = dataclasses.replace(CASE, shape=dataclasses.replace(SHAPE, name="huge"))
    assert suite.run([huge, CASE]) == []
    assert (suite.rows[0]["case"], suite.rows[0]["contestant"]) == (huge.name, "all")
    assert "out of memory" in suite.rows[0]["failed"]
    assert suite.rows[1]["call_seconds"] == 3e-6


def test_a_layout_that_does_not_fit_costs_those_alone_who_need_it(suite, monkeypatch):
    def huge(weights):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    entered = [Contestant("hungry", right, huge), Contestant("right", right, as_given)]
    monkeypatch.setattr(Suite, "_entrants", lambda self, case: entered)
    assert suite.run([CASE]) == []
    assert "layout" in suite.rows[0]["failed"]
    assert suite.rows[1]["call_seconds"] == 3e-6


def test_torch_is_not_asked_again_once_its_process_has_ended(suite, monkeypatch):
    class Process:
        asked = 0

        def request(self, action, **arguments):
            self.asked += 1
            raise WorkerEndedError("worker ended with code 3")

    monkeypatch.setattr(Suite, "_entrants", lambda self, case: [])
    suite.torch = process = Process()
    case = dataclasses.replace(CASE, tokens=8, is_telling=True)
    suite.run([case, case])
    assert process.asked == len(suite.rows) == 1
    assert "code 3" in suite.rows[0]["failed"]
    assert "code 3" in suite.unable["torch grouped_mm"]


def test_cases_after_the_deadline_are_named_and_not_measured(suite):
    suite.deadline = time.monotonic() - 1
    assert suite.run([CASE]) == [CASE]
    assert suite.rows == []


@pytest.mark.parametrize(("left", "measured"), [(59, False), (61, True)])
def test_no_group_of_cases_is_begun_shortly_before_the_deadline(suite, left, measured):
    suite.deadline = time.monotonic() + left
    assert suite.run([CASE]) == ([] if measured else [CASE])


def test_no_turn_is_begun_shortly_before_the_deadline(suite, monkeypatch):
    """Which comes near while the first one has its turn."""
    measure = Suite._measure

    def measure_for_long(self, *arguments):
        self.deadline = time.monotonic() + 29
        return measure(self, *arguments)

    monkeypatch.setattr(Suite, "_measure", measure_for_long)
    assert suite.run(CASES[:2]) == [CASES[1]]
    assert [row["contestant"] for row in suite.rows] == ["right"]


def test_no_compilation_is_begun_shortly_before_the_deadline(suite, monkeypatch):
    def compile_all(programs, threads, until):
        assert until <= suite.deadline - 30
        return gpu_programs.compile_all(programs, threads)

    monkeypatch.setattr(gpu_suite, "compile_all", compile_all)
    monkeypatch.setattr(gpu_suite, "COMPILED_SHARE", 1.0)
    assert suite.run([CASE]) == []


def test_checks_compile_nothing_in_a_contestants_turn(suite, monkeypatch):
    compiled = []

    def compile_all(programs, threads, until):
        compiled.extend(programs)
        return gpu_programs.compile_all(programs, threads)

    monkeypatch.setattr(gpu_suite, "compile_all", compile_all)
    monkeypatch.setattr(expert_checks, "jitted_references", None)
    suite.run([CASE])
    assert suite.rows[0]["call_seconds"] == 3e-6
    assert ("block", expert_references.SAMPLED_TOKENS, gpu_suite.REFERENCE) in compiled
    group = gpu_suite._Group({}, {})
    backward = suite._programs({dataclasses.replace(CASE, kind="backward"): []}, group)
    assert set(backward) == {
        ("tokens_gradient", expert_references.SAMPLED_TOKENS, gpu_suite.REFERENCE),
        ("weights_gradient", CASE.tokens, gpu_suite.REFERENCE),
    }


def test_a_float32_computation_that_does_not_compile_is_named(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "reference_programs", lambda *arguments: {("block", 1): (broken, [1.0])})
    suite.run([CASE])
    assert "compared with does not compile: ValueError: tiles do not fit" in suite.rows[0]["failed"]


def test_torch_takes_part_through_its_process_and_its_failure_is_recorded(suite, monkeypatch):
    answers = {
        "prepare": {"error": 1e-3},
        "measure": {"queued": 9e-6, "graph": 7e-6},
    }

    class Process:
        def request(self, action, **arguments):
            if action == "prepare":
                assert np.load(arguments["topk_ids"]).shape[1:] == (8, 2)
                assert arguments["shape"]["local_experts"] == 6
            return answers[action]

    monkeypatch.setattr(Suite, "_entrants", lambda self, case: [])
    suite.torch = Process()
    case = dataclasses.replace(CASE, tokens=8, is_telling=True)
    suite.run([case])
    assert suite.rows[-1]["call_seconds"] == 9e-6
    assert suite.rows[-1]["in_program_seconds"] == suite.rows[-1]["seconds"] == 7e-6
    answers["measure"]["graph"] = None
    suite.run([case])
    assert suite.rows[-1]["call_seconds"] == suite.rows[-1]["seconds"] == 9e-6
    assert suite.rows[-1]["in_program_seconds"] is None
    answers["prepare"]["error"] = float("nan")
    suite.run([case])
    assert "wrong" in suite.rows[-1]["failed"]
    answers["prepare"] = {"failed": "OutOfMemoryError"}
    suite.run([case])
    assert suite.rows[-1]["failed"] == "OutOfMemoryError"


def test_cases_whose_programs_were_not_compiled_in_time_are_named_and_the_others_measured(suite, monkeypatch):
    def compile_all(programs, threads, until):
        assert until < suite.deadline
        first = [key for key in programs if key[1] == CASES[0].tokens or key[2] == gpu_suite.REFERENCE]
        return gpu_programs.compile_all({key: programs[key] for key in first}, threads)

    monkeypatch.setattr(gpu_suite, "compile_all", compile_all)
    assert suite.run(CASES) == CASES[1:]
    assert {row["case"] for row in suite.rows} == {CASES[0].name}


@pytest.mark.parametrize("threads", [1, 2])
def test_no_compile_is_begun_after_its_time(threads):
    programs = {"sin": (jnp.sin, [1.0])}
    assert compile_all(programs, threads, until=time.monotonic() - 1) == {}
    assert compile_all(programs, threads, until=time.monotonic() + 60)["sin"].call is not None


def test_every_turn_at_the_device_is_watched(suite):
    watched = []

    def watch(what, seconds):
        watched.append(what)
        return contextlib.nullcontext()

    suite.watch = watch
    suite.run([CASE])
    turns = [f"{CASE.name}, {name}" for name in ("right", "wrong", "broken")]
    assert watched == ["weights of small", f"tokens of {CASE.name}", *turns]


def test_who_multiplies_all_pairs_is_left_out_where_that_takes_long(rng):
    suite = Suite(ceilings=CEILINGS, rng=rng, deadline=0, l2_bytes=1, report=lambda line: None)
    shape = EXPERT_SHAPES["qwen3-30b-a3b"]
    large = Case(kind="forward", shape=shape, tokens=8192, routing="uniform", is_telling=True)
    assert "jax.lax.ragged_dot" not in {contestant.name for contestant in suite._entrants(large)}
    assert any(large.name in name for name in suite.unable)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('%w = (s32[]) while(%t), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"8"}}', ()),
        ("%w = (s32[]) while(%t), condition=%c, body=%b", ("while (1)",)),
        ("%c = f32[2] conditional(%p, %a, %b), branch_computations={%x, %y}", ("conditional (1)",)),
        ('%c = f32[2] custom-call(%a), custom_call_target="mosaic_gpu_v2"', ()),
        ('%c = f32[2] custom-call(%a), custom_call_target="xla_ffi_python_gpu_callback"', ("custom-call (1)",)),
        ('%a = f32[2] add(%b, %c), metadata={op_name="while/add"}', ()),
    ],
)
def test_instructions_that_the_host_waits_for_are_found(line, found):
    assert waits_for_host(line) == found


def test_a_loop_whose_length_depends_on_values_is_found_in_a_compiled_program():
    def loop(n):
        return jax.lax.fori_loop(0, n, lambda i, x: x + i, 0)

    assert compile_all({"loop": (loop, [jnp.int32(3)])}, 1)["loop"].waits == ("while (1)",)


def test_what_does_not_compile_is_recorded_beside_the_others():
    programs = compile_all({"good": (jnp.sin, [1.0]), "bad": (broken, [1.0])}, 2)
    assert float(programs["good"].call(0.0)) == 0
    assert programs["bad"].call is None
    assert programs["bad"].failure == "ValueError: tiles do not fit"


def test_a_call_is_traced_once_whatever_the_routing(rng):
    launch = check_launches(Contestant("right", right, as_given), SHAPE, 4, rng)
    assert (launch["routings"], launch["programs"]) == (3, 1)
