"""Running Pallas TPU kernels on a CPU, in TPU interpret mode, where a race or a semaphore left over is a failure."""

import contextlib
import dataclasses

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic.interpret.shared_memory import SharedMemory
from jax.experimental.pallas import tpu as pltpu

from moe_jax.kernels.device import TPU_DEVICES, targeting

DMA_MODES = ("on_wait", "eager")
"""When a copy moves its bytes: at the wait for it, or at its start. A kernel is proved by both together: a forgotten wait gives
wrong values in the first without being called a race, and is called one in the second."""


class Interpretation:
    """What was interpreted so far, as far as its results were waited for."""

    def __init__(self):
        self.race_detectors = []
        self.semaphores_left = []

    @property
    def num_kernels(self):
        """How many kernel calls were interpreted."""
        return len(self.race_detectors)

    @property
    def num_racing(self):
        """How many of them had a race."""
        return sum(detector.races_found for detector in self.race_detectors)


@contextlib.contextmanager
def interpreting_tpu(device="v6e", *, dma="on_wait", num_devices=1, checked=True):
    """Kernels called inside are built for `device` and interpreted with race detection; memory that nobody wrote holds NaN.

    On leaving, all kernels have run, and it is an error if one of them had a race or left a semaphore above zero.

    Args:
        device: a name in `TPU_DEVICES`.
        dma: one of `DMA_MODES`.
        num_devices: devices of the mesh that the kernels run on, to give every copy in flight a clock of its own.
        checked: False to look at the yielded `Interpretation` instead, for tests that plant a race.
    """
    interpretation = Interpretation()
    new_race_detector = interpret_pallas_call.RaceDetectionState
    nonzero_semaphores = SharedMemory.get_sempahores_with_nonzero_count

    def kept_race_detector(*args, **kwargs):
        interpretation.race_detectors.append(new_race_detector(*args, **kwargs))
        return interpretation.race_detectors[-1]

    def kept_nonzero_semaphores(memory, device_id):
        found = nonzero_semaphores(memory, device_id)
        interpretation.semaphores_left.extend(found)
        return found

    interpret_pallas_call.RaceDetectionState = kept_race_detector
    SharedMemory.get_sempahores_with_nonzero_count = kept_nonzero_semaphores
    try:
        with targeting(TPU_DEVICES[device]), pltpu.force_tpu_interpret_mode(_parameters(dma, num_devices)):
            yield interpretation
            jax.effects_barrier()
    except BaseException:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    finally:
        interpret_pallas_call.RaceDetectionState = new_race_detector
        SharedMemory.get_sempahores_with_nonzero_count = nonzero_semaphores
    if checked:
        num_kernels, num_racing = interpretation.num_kernels, interpretation.num_racing
        assert not num_racing, (
            f"{num_racing} of {num_kernels} interpreted kernel calls had a race; see what was printed"
        )
        assert not interpretation.semaphores_left, "a kernel ended with semaphores above zero; see what was printed"


def _parameters(dma, num_devices):
    # With the default size of clocks, all copies of a device share one slot, and races between them go unnoticed.
    parameters = dict(detect_races=True, dma_execution_mode=dma, vector_clock_size=max(64, 4 * num_devices))
    names = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    if "on_race" in names:  # jax 0.11 has no such option, and never raises
        parameters["on_race"] = "warn"
    # A copy takes whole tiles of 128 columns, as far as an array reaches in device memory whatever its width: here that is NaN.
    parameters["out_of_bounds_reads"] = "uninitialized"
    return pltpu.InterpretParams(**parameters, uninitialized_memory="nan")
