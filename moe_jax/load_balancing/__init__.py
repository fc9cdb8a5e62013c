"""Expert parallelism load balancing (EPLB): popular experts get copies, and experts change ranks while a model runs."""

from moe_jax.load_balancing.balancer import ExpertLoadBalancer
from moe_jax.load_balancing.config import EplbConfig
from moe_jax.load_balancing.gradients import sum_replica_gradients
from moe_jax.load_balancing.report import Rearrangement, write_balance_picture
from moe_jax.load_balancing.state import EplbState, initial_state, is_rearrangement_due, record_load

__all__ = [
    "EplbConfig",
    "EplbState",
    "ExpertLoadBalancer",
    "Rearrangement",
    "initial_state",
    "is_rearrangement_due",
    "record_load",
    "sum_replica_gradients",
    "write_balance_picture",
]
