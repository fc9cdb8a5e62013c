"""The smoke test before the GPU suite: which kernels it calls, what it finds, and when it ends."""

import contextlib

import pytest

from moe_jax.benchmarking import gpu_smoke
from moe_jax.benchmarking.gpu_smoke import SHAPE, TOKENS, smoke_test
from moe_jax.kernels import explain_fused_moe
from moe_jax.kernels.device import GPU_DEVICES, targeting


def run(rng, *kinds):
    told = []
    failed = dict(smoke_test(kinds, rng, watch=lambda *_: contextlib.nullcontext(), report=told.append))
    return failed, [line.split("(")[0] for line in told]


def test_every_kernel_is_called_once_and_right(rng):
    failed, told = run(rng, "forward", "backward")
    assert failed == {}
    assert told == [f"smoke test of {kernel} " for kernel in ("stream", "rows", "rows_gradient", "weights_gradient")]


def test_only_the_kernels_that_the_cases_use_are_called(rng, monkeypatch):
    monkeypatch.setattr(gpu_smoke, "_gradient_error", lambda *arguments: 0.0)
    assert run(rng, "backward")[1] == ["smoke test of rows_gradient ", "smoke test of weights_gradient "]


def test_the_first_kernel_has_time_to_wake_the_device(rng, monkeypatch):
    watched = []

    def watch(what, seconds):
        watched.append(seconds)
        return contextlib.nullcontext()

    monkeypatch.setattr(gpu_smoke, "_forward_error", lambda *arguments: 0.0)
    assert dict(smoke_test(["forward"], rng, watch=watch, report=lambda line: None)) == {}
    assert watched == [180, 60]


@pytest.mark.parametrize("kernel", ["stream", "rows"])
def test_the_numbers_of_tokens_choose_the_kernels_they_are_named_after(kernel):
    with targeting(GPU_DEVICES["h200"]):
        choice = explain_fused_moe(
            **SHAPE.fused_moe_arguments(TOKENS[kernel]),
            activation=SHAPE.activation,
            expected_rows=SHAPE.expected_rows(TOKENS[kernel]),
            implementation="pallas_gpu",
        )
    assert ("stream" in choice.formulation.lower()) == (kernel == "stream"), choice.formulation


@pytest.mark.parametrize("result", ["wrong", "nan", "raises"])
def test_a_gradient_that_is_wrong_is_named_with_its_reason(rng, monkeypatch, result):
    original = gpu_smoke.gradient_parts

    def gradient_parts(case, contestant):
        function, shapes = original(case, contestant)["weights_gradient"]

        def broken(*arguments):
            if result == "raises":
                raise ValueError("tiles do not fit")
            return [function(*arguments)[0] * (2 if result == "wrong" else float("nan"))]

        return original(case, contestant) | {"weights_gradient": (broken, shapes)}

    monkeypatch.setattr(gpu_smoke, "gradient_parts", gradient_parts)
    failed, told = run(rng, "backward")
    assert set(failed) == {"weights_gradient"}
    assert ("tiles do not fit" if result == "raises" else "wrong: relative error") in failed["weights_gradient"]
    assert len(told) == 2


def test_nothing_is_called_on_a_device_that_is_lost(rng, monkeypatch):
    def lost(*arguments):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(gpu_smoke, "_forward_error", lost)
    monkeypatch.setattr(gpu_smoke, "device_failure", lambda: "CUDA_ERROR_ILLEGAL_ADDRESS")
    failed, told = run(rng, "forward", "backward")
    assert set(failed) == {"stream", "device"}
    assert len(told) == 1
