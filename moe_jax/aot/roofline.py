"""The least time that a step can take on a chip, from its published peaks: static, nothing is measured.

Three limits are worked out apart from each other. The largest of them bounds the step from below even if all that can overlap
does; a real step takes longer than that.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from moe_jax.aot.collectives import Collective
from moe_jax.aot.work import Work
from moe_jax.kernels.device import GpuDevice, TpuDevice

Limit = Literal["compute", "memory", "links"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds that a step takes at least, by what limits it."""

    compute_seconds: float | None
    """All matrix products at the peak of bfloat16; None for other number formats, whose peak is another."""
    memory_seconds: float
    """Reading weights and cache once, at the peak of device memory."""
    links_seconds: float
    """Sending what collectives send, one after the other, at the peak of the links; those between GPU hosts left out."""
    network_bytes: float
    """Bytes that a device sends in collectives between GPU hosts, over a network whose speed isn't known here."""

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute_seconds or 0.0, self.memory_seconds, self.links_seconds)

    @property
    def limit(self) -> Limit:
        """Which one that is."""
        limits: dict[Limit, float] = {
            "compute": self.compute_seconds or 0.0,
            "memory": self.memory_seconds,
            "links": self.links_seconds,
        }
        return max(limits, key=lambda name: limits[name])


def roofline(
    work: Work,
    collectives: Sequence[Collective],
    device: GpuDevice | TpuDevice,
    *,
    devices_per_host: int | None,
    is_bfloat16: bool,
) -> Roofline:
    """The roofline of a step.

    Args:
        work: of one device.
        collectives: of the compiled program.
        device: the chip.
        devices_per_host: consecutive devices that the chip's own links join; None: they join all.
        is_bfloat16: products are of bfloat16 numbers.
    """
    network = [
        collective
        for collective in collectives
        if devices_per_host is not None and collective.crosses(devices_per_host)
    ]
    return Roofline(
        compute_seconds=work.flops / device.flops_per_second if is_bfloat16 else None,
        memory_seconds=work.memory_bytes / device.hbm_bytes_per_second,
        links_seconds=_sent([one for one in collectives if one not in network]) / device.link_bytes_per_second,
        network_bytes=_sent(network),
    )


def _sent(collectives: Sequence[Collective]) -> float:
    return sum(collective.sent_bytes * collective.executions for collective in collectives)
