"""Which dispatch strategy runs, and why: chosen from mesh, tokens and platform, in the open."""

from moe_jax.kernels import Choice
from moe_jax.parallel import allgather_reducescatter, padded_all_to_all, ragged_all_to_all, remote_dma, replicated
from moe_jax.parallel.dispatch import DispatchRequest, Strategy

STRATEGIES: tuple[Strategy, ...] = (
    replicated,
    allgather_reducescatter,
    ragged_all_to_all,
    padded_all_to_all,
    remote_dma,
)
"""Every strategy; of two that move equally many rows, the first one is taken."""


def choose_strategy(request: DispatchRequest) -> tuple[Strategy, Choice]:
    """The strategy that was asked for by name, or one that can do what is asked.

    Of these it is `replicated` if that can run: as upstream, tokens that are on all ranks of their experts stay there. Otherwise
    it is the one that moves the fewest rows: those that a rank is expected to send if all experts are equally likely, whatever the
    links between ranks are like. Nothing is measured.

    Raises:
        NotImplementedError: the named strategy, or every one, cannot run; the message carries the reasons.
    """
    asked = request.parallel.strategy
    reasons = {strategy.NAME: _reason_against(strategy, request) for strategy in STRATEGIES}
    able = [strategy for strategy in STRATEGIES if reasons[strategy.NAME] is None]
    sent = {strategy.NAME: f"is expected to send {strategy.rows_moved(request):.1f} rows per rank" for strategy in able}
    if asked is not None:
        chosen = next(strategy for strategy in STRATEGIES if asked == strategy.NAME)
        if reasons[asked] is not None:
            raise NotImplementedError(f"dispatch strategy {asked!r} cannot run: {reasons[asked]}")
        why = "it was asked for by name"
    elif not able:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"no dispatch strategy can run: {listed}")
    elif replicated in able:
        chosen, why = replicated, "every token is on all ranks that hold its experts"
    else:
        chosen = min(able, key=lambda strategy: strategy.rows_moved(request))
        why = "it is expected to send the fewest rows"
    fused = request.config.num_fused_shared_experts
    beside = f", and none to the {fused} fused shared experts, which every rank has" if fused else ""
    choice = Choice(
        op="dispatch",
        implementation=chosen.NAME,
        formulation=f"{request.num_tokens} tokens over {_ranks(request)}; it {sent[chosen.NAME]}{beside}",
        reason=why,
        rejected=tuple((name, reason or f"it {sent[name]}") for name, reason in reasons.items() if name != chosen.NAME),
    )
    return chosen, choice


def _reason_against(strategy: Strategy, request: DispatchRequest) -> str | None:
    """Why a strategy cannot run, or is not to; None if it may."""
    if strategy.WHY_ONLY_BY_NAME is not None and request.parallel.strategy != strategy.NAME:
        return f"it runs only if it is asked for by name: {strategy.WHY_ONLY_BY_NAME}"
    return strategy.unsupported(request)


def _ranks(request: DispatchRequest) -> str:
    axes = request.axes
    sizes = {"expert": axes.expert, "tensor": axes.tensor, "token": axes.tokens}
    return ", ".join(f"{axes.size(names)} {kind} positions" for kind, names in sizes.items()) + f" of {axes.platform}"
