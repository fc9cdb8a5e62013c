"""The tuner's decisions, with a timer that follows a script."""

import dataclasses

import pytest

from moe_jax.benchmarking import kernel_tuning
from moe_jax.benchmarking.device_timer import Timing
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape
from moe_jax.benchmarking.gpu_programs import Program
from moe_jax.benchmarking.kernel_tuning import Problem, chosen_tiles, problems, tune
from moe_jax.kernels import explain_fused_moe
from moe_jax.kernels.device import GPU_DEVICES, targeting
from moe_jax.kernels.mosaic_gpu.tuning import trying
from moe_jax.kernels.mosaic_gpu.tuning_candidates import candidates

H200 = GPU_DEVICES["h200"]
PROBLEM = Problem(kernel="rows", place="gate_up", shape=EXPERT_SHAPES["qwen3-30b-a3b"], tokens=8192)
CANDIDATES = candidates("rows", PROBLEM.kernel_shape, H200)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))


def timer(seconds, jitter=lambda call: 0.0, spread=0.0):
    """A `Measure`: `seconds` by tiles (None: the default), a text for failures; others take as long as the default."""
    calls = []

    def measure(tried):
        calls.append(tried)
        found = []
        for tiles in tried:
            time = seconds.get(tiles, seconds[None])
            if isinstance(time, float):
                time *= 1 + jitter(len(calls))
                busy = [
                    time * (1 - 2 * spread),
                    time * (1 - spread),
                    time,
                    time * (1 + spread),
                    time * (1 + 2 * spread),
                ]
                time = Timing(queued=2 * time, issue=0.0, busy=busy)
            found.append(time)
        return found

    return measure


def test_a_clearly_faster_candidate_becomes_an_entry():
    outcome = tune(PROBLEM, H200, timer({None: 10e-6, CANDIDATES[3]: 8e-6, CANDIDATES[5]: 9e-6}))
    assert outcome.entry.tiles == CANDIDATES[3]
    assert (outcome.entry.kernel, outcome.entry.shape) == ("rows", PROBLEM.kernel_shape)
    assert outcome.entry.microseconds == pytest.approx(8)
    assert outcome.entry.default_microseconds == pytest.approx(10)
    assert "20.0 % faster" in outcome.why


def test_a_candidate_that_is_hardly_faster_is_not_kept():
    outcome = tune(PROBLEM, H200, timer({None: 10e-6, CANDIDATES[3]: 9.85e-6}))
    assert outcome.entry is None
    assert "the default stays" in outcome.why


def test_times_that_scatter_ask_for_a_larger_gain():
    seconds = {None: 10e-6, CANDIDATES[3]: 9e-6}
    assert tune(PROBLEM, H200, timer(seconds)).entry is not None
    assert tune(PROBLEM, H200, timer(seconds, spread=0.15)).entry is None


def test_a_candidate_that_was_fast_once_is_not_kept():
    seconds = {None: 10e-6, CANDIDATES[3]: 10e-6}
    measure = timer(seconds)

    def lucky_first(tried):
        if len(tried) > 2:
            return timer({**seconds, CANDIDATES[3]: 5e-6})(tried)
        return measure(tried)

    assert tune(PROBLEM, H200, lucky_first).entry is None


def test_candidates_that_fail_are_reported_and_passed_over():
    outcome = tune(PROBLEM, H200, timer({None: 10e-6, CANDIDATES[0]: "differs", CANDIDATES[3]: 8e-6}))
    assert outcome.failed == {CANDIDATES[0]: "differs"}
    assert outcome.entry.tiles == CANDIDATES[3]
    outcome = tune(PROBLEM, H200, timer({None: 10e-6} | dict.fromkeys(CANDIDATES, "does not compile")))
    assert outcome.entry is None
    assert f"none of {len(CANDIDATES)}" in outcome.why


def test_a_default_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="the default tiles cannot be measured: out of memory"):
        tune(PROBLEM, H200, timer({None: "out of memory"}))


def test_when_the_default_fails_its_failure_is_reported_and_no_candidate_is_run(monkeypatch):
    def must_not_run(*arguments):
        raise AssertionError("a candidate ran")

    def compile_all(programs, threads):
        return {tiles: Program(None, "no room") if tiles is None else Program(must_not_run) for tiles in programs}

    monkeypatch.setattr(kernel_tuning, "compile_all", compile_all)
    shape = ExpertShape(name="tiny", hidden_size=16, intermediate_size=8, num_experts=2, top_k=1)
    measure = kernel_tuning.measure_on_device(
        dataclasses.replace(PROBLEM, shape=shape, tokens=4), H200, device_events=False
    )
    default, candidate = measure([None, CANDIDATES[0]])
    assert default == "no room"
    assert candidate == "the default, with whose result it would be compared, has none"


def test_no_more_candidates_are_tried_than_asked_for():
    seen = []

    def measure(tried):
        seen.append(tried)
        return timer({None: 10e-6})(tried)

    tune(PROBLEM, H200, measure, most_candidates=5)
    assert seen[0][0] is None
    assert len(set(seen[0][1:])) == 5


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3-ep32"])
@pytest.mark.parametrize(("tokens", "kernel"), [(8, "stream"), (32768, "rows")])
def test_problems_are_the_kernels_that_the_op_looks_tiles_up_for(name, tokens, kernel, monkeypatch):
    found = list(problems(EXPERT_SHAPES[name], tokens, H200, backward=True))
    assert [(p.kernel, p.place) for p in found] == [
        (k, place) for place in ("gate_up", "down") for k in (kernel, "rows_gradient", "weights_gradient")
    ]
    looked_up = []
    monkeypatch.setattr(
        "moe_jax.kernels.mosaic_gpu.choice.tuned_tiles", lambda kernel, shape, device: looked_up.append((kernel, shape))
    )
    for problem in found:
        chosen_tiles(problem, H200)
    assert looked_up == [(problem.kernel, problem.kernel_shape) for problem in found]
    shape, forward = EXPERT_SHAPES[name], [(p.kernel, p.kernel_shape) for p in found if p.kernel == kernel]
    looked_up.clear()
    with targeting(H200):
        explain_fused_moe(
            **shape.fused_moe_arguments(tokens),
            activation=shape.activation,
            expected_rows=shape.expected_rows(tokens),
            implementation="pallas_gpu",
        )
    assert set(looked_up) == set(forward)


def test_what_is_tried_is_what_the_op_would_choose():
    with trying("rows", CANDIDATES[3]):
        assert chosen_tiles(PROBLEM, H200).tiles == CANDIDATES[3]
    assert dataclasses.is_dataclass(chosen_tiles(PROBLEM, H200).tiles)
