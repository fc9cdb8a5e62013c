"""Running Mosaic GPU kernels on a CPU, in interpret mode, where a race is a failure."""

import contextlib
import dataclasses

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.device import GPU_DEVICES, targeting
from moe_jax.kernels.mosaic_gpu.schedule import ROW_ALIGNMENT


class Interpretation:
    """What was interpreted so far."""

    def __init__(self, race_detectors):
        self._race_detectors = race_detectors

    @property
    def num_kernels(self):
        """How many kernel calls were interpreted, of those whose results were waited for."""
        return len(self._race_detectors)


@contextlib.contextmanager
def interpreting(multiprocessors=2, device="h200"):
    """Kernels called inside are built for `device`, with so many multiprocessors, and interpreted with race detection.

    On leaving, all kernels have run, and it is an error if any of them had a race. jax 0.12 raises where the race happens;
    0.11 has each call print its races and forget those of the call before, so the detectors of all calls are kept here.

    It is an error, too, if a store to memory began beyond an axis that is one tile wide, like the store. Interpreted, it stores
    nothing; a GPU stores at the beginning of that axis, because compiled copies leave out the index of such axes.
    """
    named = dataclasses.replace(GPU_DEVICES[device], multiprocessors=multiprocessors)
    race_detectors = []
    new_race_detector = gpu_callbacks.GPURaceDetectionState

    def kept_race_detector(*args, **kwargs):
        race_detectors.append(new_race_detector(*args, **kwargs))
        return race_detectors[-1]

    misplaced = []
    clip_store = gpu_callbacks._clip_store_to_shape

    def noticing_clip_store(access, values, shape):
        if _begins_beyond_one_tile(access.range, shape):
            misplaced.append(f"{access.range} of {shape}")
        return clip_store(access, values, shape)

    gpu_callbacks.GPURaceDetectionState = kept_race_detector
    gpu_callbacks._clip_store_to_shape = noticing_clip_store
    try:
        with targeting(named), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield Interpretation(race_detectors)
        jax.effects_barrier()
    except BaseException:
        gpu_callbacks.reset_gpu_interpret_mode_state()
        raise
    finally:
        gpu_callbacks.GPURaceDetectionState = new_race_detector
        gpu_callbacks._clip_store_to_shape = clip_store
    racing = sum(detector.races_found for detector in race_detectors)
    assert not racing, f"{racing} of {len(race_detectors)} interpreted kernel calls had a race; see what was printed"
    assert not misplaced, f"{len(misplaced)} stores may land inside of the array on a GPU, first {misplaced[0]}"


def _begins_beyond_one_tile(indices, shape):
    """Tiles are as wide as a store in the last axis, and have 8 or fewer rows in the others."""
    for axis, (at, size) in enumerate(zip(indices, shape, strict=True)):
        is_one_tile = (
            isinstance(at, slice) and at.stop - at.start == size and (axis == len(shape) - 1 or size <= ROW_ALIGNMENT)
        )
        if is_one_tile and at.start >= size:
            return True
    return False
