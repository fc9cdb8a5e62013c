"""Which dispatch strategy runs, and why: chosen from mesh, tokens and platform, in the open."""

from moe_jax.kernels.selection import Choice
from moe_jax.parallel import allgather_reducescatter, padded_all_to_all, ragged_all_to_all, replicated
from moe_jax.parallel.dispatch import DispatchRequest, Strategy

STRATEGIES: tuple[Strategy, ...] = (replicated, allgather_reducescatter, ragged_all_to_all, padded_all_to_all)
"""Every strategy; of two that move equally many rows, the first one is taken."""


def choose_strategy(request: DispatchRequest) -> tuple[Strategy, Choice]:
    """The strategy that was asked for by name, or of those that can do what is asked the one that moves the fewest rows.

    Rows are those that a rank is expected to send if all experts are equally likely, whatever the links between ranks are like:
    nothing is measured.

    Raises:
        NotImplementedError: the named strategy, or every one, cannot run; the message carries the reasons.
    """
    asked = request.parallel.strategy
    reasons = {strategy.NAME: strategy.unsupported(request) for strategy in STRATEGIES}
    if asked is not None:
        chosen = next(strategy for strategy in STRATEGIES if asked == strategy.NAME)
        if reasons[asked] is not None:
            raise NotImplementedError(f"dispatch strategy {asked!r} cannot run: {reasons[asked]}")
        why = "it was asked for by name"
        passed_over = dict.fromkeys(reasons, f"{asked} was asked for by name")
    else:
        able = [strategy for strategy in STRATEGIES if reasons[strategy.NAME] is None]
        if not able:
            listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise NotImplementedError(f"no dispatch strategy can run: {listed}")
        rows = {strategy.NAME: strategy.rows_moved(request) for strategy in able}
        chosen = min(able, key=lambda strategy: rows[strategy.NAME])
        why = "it is expected to send the fewest rows"
        passed_over = {name: f"it is expected to send {_rows(count)} per rank" for name, count in rows.items()}
    choice = Choice(
        op="dispatch",
        implementation=chosen.NAME,
        formulation=f"{request.num_tokens} tokens over {_ranks(request)}, {_rows(chosen.rows_moved(request))} sent per rank",
        reason=why,
        rejected=tuple((name, reason or passed_over[name]) for name, reason in reasons.items() if name != chosen.NAME),
    )
    return chosen, choice


def _rows(count: float) -> str:
    return f"{count:.1f} rows"


def _ranks(request: DispatchRequest) -> str:
    axes = request.axes
    sizes = {"expert": axes.expert, "tensor": axes.tensor, "token": axes.tokens}
    return ", ".join(f"{axes.size(names)} {kind} positions" for kind, names in sizes.items()) + f" of {axes.platform}"
