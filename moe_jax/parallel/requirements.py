"""What dispatch strategies need: reasons that several of them share."""

from moe_jax.parallel.dispatch import DispatchRequest


def unsupported_all_to_all(request: DispatchRequest) -> str | None:
    """Why rows cannot travel to the ranks that own their experts, or None."""
    axes = request.axes
    if not axes.expert:
        return "it brings rows to the ranks that own their experts, so expert_axis must be set, got None"
    if axes.sliced and not request.parallel.reduce_results:
        return (
            f"it returns summed results where ranks of expert_axis hold the same tokens ({_listed(axes.sliced)}), so "
            "reduce_results must be True, got False"
        )
    return None


def unsupported_all_to_all_options(request: DispatchRequest) -> str | None:
    """Why a strategy cannot honour options that only an all-to-all has, or None."""
    parallel = request.parallel
    if parallel.one_row_per_rank:
        return "it sends no rows to single ranks, so one_row_per_rank must be False, got True"
    return unsupported_capacity(request) or unsupported_buffer(request)


def unsupported_capacity(request: DispatchRequest) -> str | None:
    """Why a strategy without a capacity cannot honour one, or None."""
    if request.parallel.capacity_factor is not None:
        return f"it has no capacity, so capacity_factor must be None, got {request.parallel.capacity_factor}"
    return None


def unsupported_buffer(request: DispatchRequest) -> str | None:
    """Why a strategy without rounds cannot honour the size of their buffer, or None."""
    if request.parallel.buffer_factor is not None:
        return f"it has no rounds, so buffer_factor must be None, got {request.parallel.buffer_factor}"
    return None


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
