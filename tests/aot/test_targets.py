"""Targets are described completely, lowering for one leaves nothing behind, and an unfit environment is refused with advice."""

import pytest
from jax.experimental.mosaic.gpu import utils as mosaic_gpu_utils

from moe_jax.aot import targets
from moe_jax.aot.targets import (
    GPU_PLUGINS,
    LARGEST_SLICES,
    TPU_ENVIRONMENT,
    TPU_TOPOLOGIES,
    GpuTarget,
    TpuTarget,
    check_environment,
    target_config,
    target_named,
)
from moe_jax.kernels.device import GPU_DEVICES, TPU_DEVICES, gpu_device_of, tpu_device_of


@pytest.mark.parametrize("name", GPU_DEVICES)
def test_every_known_gpu_can_be_a_target(name):
    text = target_config(GpuTarget.named(name).device)
    major, minor = GPU_DEVICES[name].compute_capability
    assert f"cuda_compute_capability {{ major: {major} minor: {minor}" in text
    assert f"core_count: {GPU_DEVICES[name].multiprocessors}\n" in text
    assert ("ACCELERATED_FEATURES" in text) == (major >= 9)


def test_lowering_is_for_the_target_and_ends_with_the_block_even_after_an_error():
    before = mosaic_gpu_utils._infer_arch
    target = GpuTarget.named("b200")
    with target.lowering():
        assert mosaic_gpu_utils._infer_arch() == (10, 0)
        assert gpu_device_of() == target.device
    with pytest.raises(ZeroDivisionError), target.lowering():
        _ = 1 / 0
    assert mosaic_gpu_utils._infer_arch is before
    assert gpu_device_of() is None


def test_unknown_gpus_and_numbers_are_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match="unknown GPU 'h300'; legal are a100, h100, h200, b200"):
        GpuTarget.named("h300")
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 8"):
        GpuTarget.named("h200", hosts=0, gpus_per_host=8)


def test_an_environment_without_the_variables_is_refused_with_what_to_set(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", raising=False)
    with pytest.raises(RuntimeError, match="start Python with JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 set; found .*=None"):
        check_environment()


@pytest.mark.parametrize("version", [None, "0.4.0"])
def test_a_missing_plugin_or_one_of_another_version_is_refused_with_what_to_install(monkeypatch, version):
    def installed(name):
        if version is None:
            raise targets.metadata.PackageNotFoundError(name)
        return version

    for name, value in targets.GPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(targets.metadata, "version", installed)
    monkeypatch.setattr(targets.jax, "__version__", "7.8.9")
    with pytest.raises(
        RuntimeError, match=f"found {version}; pip install {GPU_PLUGINS[0]}==7.8.9 {GPU_PLUGINS[1]}==7.8.9"
    ):
        GpuTarget.named("h200").topology()


@pytest.mark.parametrize("name", TPU_DEVICES)
def test_every_known_tpu_can_be_a_target_and_is_what_kernels_are_chosen_for(name):
    target = TpuTarget.named(name)
    assert target == TpuTarget.named(TPU_TOPOLOGIES[name])
    with target.lowering():
        assert tpu_device_of() == TPU_DEVICES[name]
    assert tpu_device_of() is None


def test_pods_are_targets_and_unknown_tpus_are_refused_with_the_legal_ones():
    assert TpuTarget.named("v6e:16x16").device == TPU_DEVICES["v6e"]
    with pytest.raises(
        ValueError, match="unknown TPU 'v9:2x2'; legal are v5e, v5p, v6e, 7x, and slices such as v5e:2x2"
    ):
        TpuTarget.named("v9:2x2")


@pytest.mark.parametrize("name", ["7x:2x4x4", "tpu7x:2x4x4"])
def test_a_slice_is_named_as_the_compiler_names_it_whichever_name_its_generation_is_given(name):
    assert target_named(name) == TpuTarget(device=TPU_DEVICES["7x"], slice_name="tpu7x:2x4x4")


@pytest.mark.parametrize("generation", TPU_DEVICES)
def test_a_whole_pod_is_a_target_in_any_orientation_and_nothing_larger_is(generation):
    pod = LARGEST_SLICES[generation]
    for orientation in (pod, pod[::-1]):
        assert target_named(f"{generation}:{'x'.join(map(str, orientation))}").device == TPU_DEVICES[generation]
    for larger in ((64,) * len(pod), (*pod, 2), (pod[-1] * 2, *pod[1:])):
        with pytest.raises(ValueError, match=f"at most {'x'.join(map(str, pod))}, as in "):
            target_named(f"{generation}:{'x'.join(map(str, larger))}")


@pytest.mark.parametrize("shape", ["", "0x2", "2x", "-1x2", "a", "2x²"])
def test_a_shape_that_is_not_made_of_positive_numbers_is_refused(shape):
    with pytest.raises(ValueError, match=r"the shape of 'v6e:.*' must be chips along each axis, at most 16x16"):
        target_named(f"v6e:{shape}")


def test_compiling_for_tpus_needs_its_variables_and_libtpu(monkeypatch):
    def not_installed(name):
        raise targets.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(targets.metadata, "version", not_installed)
    for name, value in TPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="libtpu must be installed"):
        TpuTarget.named("v5p").topology()
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD")
    with pytest.raises(RuntimeError, match="start Python with ALLOW_MULTIPLE_LIBTPU_LOAD=1 set; found .*=None"):
        TpuTarget.named("v5p").topology()
