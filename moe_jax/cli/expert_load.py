"""The expert load of a generation as a file: a picture, or numbers."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

NAMED_TICKS = 24
"""More experts or layers than this are not all written at the axes."""


def write_picture(path: Path, load: Int[np.ndarray, "L E"], layers: Sequence[int], title: str) -> None:
    """A heat map, one row per MoE layer: how much of its even share each expert got."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_layers, num_experts = load.shape
    totals = np.maximum(load.sum(axis=1, keepdims=True), 1)
    share = load * num_experts / totals
    size = (np.clip(2.5 + 0.22 * num_experts, 6, 16), np.clip(1.8 + 0.25 * num_layers, 3, 14))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(share, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    axes.set_title(title)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    if num_experts <= NAMED_TICKS:
        axes.set_xticks(range(num_experts))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    step = -(-num_layers // NAMED_TICKS)
    axes.set_yticks(range(0, num_layers, step), [str(layer) for layer in layers[::step]])
    figure.colorbar(image, ax=axes, label="load (1 = even share)")
    figure.savefig(path, dpi=150)


def write_json(path: Path, load: Int[np.ndarray, "L E"], layers: Sequence[int], title: str) -> None:
    """An object with the layers' numbers and, per layer, how often each expert was chosen."""
    path.write_text(json.dumps({"title": title, "layers": list(layers), "expert_load": load.tolist()}, indent=2) + "\n")


def write_csv(path: Path, load: Int[np.ndarray, "L E"], layers: Sequence[int], title: str) -> None:
    """A table with one line per layer and expert: layer, expert, load."""
    del title  # a table has no place for it
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "expert", "load"])
        writer.writerows(
            [layer, expert, int(count)]
            for layer, row in zip(layers, load, strict=True)
            for expert, count in enumerate(row)
        )


Writer = Callable[[Path, Int[np.ndarray, "L E"], Sequence[int], str], None]

WRITERS: Mapping[str, Writer] = {
    ".png": write_picture,
    ".svg": write_picture,
    ".pdf": write_picture,
    ".json": write_json,
    ".csv": write_csv,
}
"""By the ending of the file's name."""


def writer_for(path: Path) -> Writer:
    """Who writes `path`; ValueError unless its ending is one of `WRITERS`, and its folder exists."""
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"--stats must end in {', '.join(WRITERS)}; got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--stats {path}: there is no folder {path.parent}")
    return WRITERS[path.suffix.lower()]
