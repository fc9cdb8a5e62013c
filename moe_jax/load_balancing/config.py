"""When experts are moved, and from how much measured load."""

import dataclasses

from moe_jax.config_checks import check_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EplbConfig:
    """Settings of expert parallelism load balancing; the defaults are vLLM's `EPLBConfig` (spec 5.6).

    How many copies there are is a property of the layers: `MoEConfig.num_redundant_experts`.
    """

    window_size: int = 1000
    """Steps whose load is remembered. The window takes `window_size * layers * physical experts * 4` bytes."""
    step_interval: int = 3000
    """Steps between two rearrangements. The first one comes after a quarter of it."""
    num_nodes: int = 1
    """Machines over which the ranks are spread in equal, consecutive parts. With group-limited routing whose groups it
    divides, the experts of a group stay on one machine."""

    def __post_init__(self) -> None:
        for name in ("window_size", "step_interval", "num_nodes"):
            check_integer(name, getattr(self, name), least=1, must="be positive")

    @property
    def initial_step(self) -> int:
        """Where the count of steps starts."""
        return self.step_interval - self.step_interval // 4
