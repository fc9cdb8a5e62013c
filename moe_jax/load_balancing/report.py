"""What a rearrangement did, in numbers and as a picture."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from moe_jax.placement import LoadStatistics, expected_physical_load, load_statistics, rank_load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rearrangement:
    """A change of placement, and the load that was its reason."""

    num_ranks: int
    logical_load: Float[np.ndarray, "L E"]
    """Rows of each expert in the recorded steps."""
    measured_load: Float[np.ndarray, "L P"]
    """The same for every slot of the old placement."""
    old_physical_to_logical: Int[np.ndarray, "L P"]
    new_physical_to_logical: Int[np.ndarray, "L P"]
    sent: int
    """Slots whose expert came from another rank, over all layers."""
    copied: int
    """Slots whose expert came from another slot of their rank."""

    @property
    def rank_load_before(self) -> Float[np.ndarray, "L D"]:
        """Load of the ranks as it was measured."""
        return rank_load(self.measured_load, self.num_ranks)

    @property
    def rank_load_after(self) -> Float[np.ndarray, "L D"]:
        """What the same load would have given under the new placement."""
        num_experts = self.logical_load.shape[1]
        expected = expected_physical_load(self.logical_load, self.new_physical_to_logical, num_experts)
        return rank_load(expected, self.num_ranks)

    @property
    def before(self) -> LoadStatistics:
        """Balance as it was measured."""
        return load_statistics(self.rank_load_before)

    @property
    def after(self) -> LoadStatistics:
        """Balance to be expected now, if experts stay as popular as they were."""
        return load_statistics(self.rank_load_after)

    def __str__(self) -> str:
        return (
            f"balancedness {self.before.balancedness:.3f} -> {self.after.balancedness:.3f} (expected), "
            f"{self.sent} experts sent, {self.copied} copied"
        )


def write_balance_picture(path: str | Path, rearrangement: Rearrangement, title: str = "Load of the ranks") -> None:
    """Two heat maps, layers by ranks, before and after: how much of its even share each rank got.

    Args:
        path: the file, which is replaced if there is one; its ending says the format (.png, .svg, .pdf).
        rearrangement: the change of placement.
        title: stands above both maps.

    Raises:
        ValueError: a format that matplotlib does not know.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shares = [_share(load) for load in (rearrangement.rank_load_before, rearrangement.rank_load_after)]
    num_layers, num_ranks = shares[0].shape
    size = (np.clip(4 + 0.5 * num_ranks, 7, 16), np.clip(2.2 + 0.2 * num_layers, 3, 14))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    top = max(share.max(initial=1) for share in shares)
    panels = figure.subplots(1, 2, sharey=True)
    image: Any = None
    for axes, share, when, statistics in zip(
        panels, shares, ("before", "after"), (rearrangement.before, rearrangement.after), strict=True
    ):
        image = axes.imshow(share, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(f"{when}: balancedness {statistics.balancedness:.3f}")
        axes.set_xlabel("rank")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="load (1 = even share)")
    figure.savefig(path, dpi=150)


def _share(load: Float[np.ndarray, "L D"]) -> Float[np.ndarray, "L D"]:
    """Load in multiples of the layer's mean."""
    return load / np.maximum(load.mean(axis=1, keepdims=True), np.finfo(float).tiny)
