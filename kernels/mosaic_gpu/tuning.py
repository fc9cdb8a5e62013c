"""Tuned tiles: which tile sizes were measured to be the fastest, by device, kernel and shape.

Entries come from two files of one format, the user's own before the one that comes with the package:

- `tuned/<device>.json` in the cache folder: `MOE_JAX_CACHE`, or `moe_jax` in the platform's folder for caches;
- `tuned/<device>.json` beside this module.

`moe-jax bench gpu-kernels --tune` writes them. A shape without an entry gets the analytic default of its kernel. A file that
cannot be understood is an error, never passed over: otherwise a typing error would quietly cost speed. One that cannot be read
is an error in `MOE_JAX_CACHE`, and counts as absent in the platform's folder, which nobody asked for.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .tiles import RowTiles, StreamTiles, WeightsGradientTiles

Tiles = RowTiles | StreamTiles | WeightsGradientTiles

TILES_OF_KERNEL: dict[str, type[RowTiles] | type[StreamTiles] | type[WeightsGradientTiles]] = {
    "rows": RowTiles,
    "rows_gradient": RowTiles,
    "stream": StreamTiles,
    "weights_gradient": WeightsGradientTiles,
}
"""The kernels that can be tuned, and the kind of their tiles. "rows_gradient" is the rows kernel contracting the other axis."""

CACHE_VARIABLE = "MOE_JAX_CACHE"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelShape:
    """What tile sizes depend on: static, so that a choice is made once per compiled program."""

    groups: int
    """Groups of rows, the experts at hand."""
    width_in: int
    """The dimension that is contracted (of the weights' gradient: columns of the gradient)."""
    width_out: int
    """Columns of the result, of gate and of up each (of the weights' gradient: rows of the gradient)."""
    projections: int
    """Matrices per group that meet in an activation: 2 (gate and up) or 1."""
    dtype: str
    """Of the operands: "bfloat16" or "float16"."""
    rows_bucket: int
    """Mean rows per group, rounded down to a power of two; 0 below one. See `rows_bucket`."""

    def __str__(self) -> str:
        gated = "gate and up of " if self.projections == 2 else ""
        rows = f"{self.rows_bucket} to {2 * self.rows_bucket - 1}" if self.rows_bucket > 1 else str(self.rows_bucket)
        return f"{self.groups} groups, {gated}{self.width_in} -> {self.width_out}, {self.dtype}, {rows} rows per group"


def rows_bucket(num_rows: int, groups: int) -> int:
    """Mean rows per group, rounded down to a power of two; 0 below one."""
    return 1 << (num_rows // groups).bit_length() - 1 if num_rows >= groups else 0


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Tiles that were measured to be the fastest."""

    tiles: Tiles
    source: str
    """Where the entry was found, for `explain()`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a file of tuned tiles."""

    kernel: str
    shape: KernelShape
    tiles: Tiles
    microseconds: float
    """Median time of a call with these tiles."""
    default_microseconds: float
    """The same with the analytic default."""
    measured: str
    """When and with what: date and version of jax."""

    @property
    def key(self) -> tuple[str, KernelShape]:
        """What the entry is looked up by."""
        return self.kernel, self.shape


def tuned_tiles(kernel: str, shape: KernelShape, device_name: str) -> Tuned | None:
    """The tuned tiles of `kernel` for exactly this shape and device; None if there is no entry.

    Reads each file once per process.

    Args:
        kernel: a name in `TILES_OF_KERNEL`.
        shape: see `KernelShape`.
        device_name: `GpuDevice.name`.

    Raises:
        ValueError: an unknown kernel, a broken file (names the file and the entry), or one in `MOE_JAX_CACHE` that cannot be read.
    """
    _check_kernel(kernel)
    trial = _trial.get()
    if trial is not None and trial.kernel == kernel:
        return None if trial.tiles is None else Tuned(trial.tiles, "being tried")
    sources = {
        "the user's cache": _user_entries(device_name),
        "the package": _entries_by_key(committed_file(device_name), device_name),
    }
    for owner, entries in sources.items():
        entry = entries.get((kernel, shape))
        if entry is not None:
            return Tuned(entry.tiles, f"tuned entry of {owner} ({device_name}.json: {shape})")
    return None


@contextmanager
def trying(kernel: str, tiles: Tiles | None) -> Iterator[None]:
    """Trace `kernel` with these tiles, whatever the tables say; None: with its analytic default. For tuning.

    What is traced in here must not be taken from a cache of `jax.jit` that was filled outside, nor fill one.
    """
    _check_kernel(kernel)
    token = _trial.set(_Trial(kernel, tiles))
    try:
        yield
    finally:
        _trial.reset(token)


@dataclasses.dataclass(frozen=True)
class _Trial:
    kernel: str
    tiles: Tiles | None


_trial: ContextVar[_Trial | None] = ContextVar("trial", default=None)


def user_file(device_name: str) -> Path:
    """The user's file of tuned tiles for a device.

    Raises:
        RuntimeError: nothing says where the user's folders are.
    """
    return cache_folder() / "tuned" / f"{device_name}.json"


def committed_file(device_name: str) -> Path:
    """The package's file of tuned tiles for a device."""
    return Path(__file__).parent / "tuned" / f"{device_name}.json"


def cache_folder() -> Path:
    """`MOE_JAX_CACHE`, or `moe_jax` in the platform's folder for caches.

    Raises:
        RuntimeError: nothing says where the user's folders are.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "moe_jax"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_jax"


def read_entries(file: Path, device_name: str) -> tuple[Entry, ...]:
    """The entries of a file; none if it does not exist.

    Raises:
        ValueError: the file is broken; names the file and the entry.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or set(content) != {"format", "device", "entries"}:
        raise ValueError(f"{file} must be an object of format, device and entries, nothing else")
    if content["format"] != FORMAT:
        raise ValueError(f"{file}: format must be {FORMAT}, got {content['format']!r}")
    if content["device"] != device_name:
        raise ValueError(f"{file}: device must be {device_name!r}, got {content['device']!r}")
    if not isinstance(content["entries"], list):
        raise ValueError(f"{file}: entries must be a list, got {content['entries']!r}")
    entries = [_parse_entry(value, f"{file}, entry {number}") for number, value in enumerate(content["entries"])]
    seen: dict[tuple[str, KernelShape], int] = {}
    for number, entry in enumerate(entries):
        if entry.key in seen:
            raise ValueError(
                f"{file}, entries {seen[entry.key]} and {number}: both are {entry.kernel} for {entry.shape}"
            )
        seen[entry.key] = number
    return tuple(entries)


def write_entries(file: Path, device_name: str, entries: Iterable[Entry]) -> None:
    """Add entries to a file, in place of those it has for the same kernel and shape; all at once, or not at all.

    Raises:
        ValueError: the file that is there is broken.
        OSError: it cannot be read or written.
    """
    merged = {entry.key: entry for entry in (*read_entries(file, device_name), *entries)}
    ordered = sorted(merged.values(), key=lambda entry: (entry.kernel, dataclasses.astuple(entry.shape)))
    lines = ",\n".join(f"  {json.dumps(dataclasses.asdict(entry))}" for entry in ordered)
    listed = f"[\n{lines}\n ]" if lines else "[]"
    text = f'{{\n "format": {FORMAT},\n "device": {json.dumps(device_name)},\n "entries": {listed}\n}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, suffix=".part", delete=False) as part:
        try:
            part.write(text)
            part.close()
            os.chmod(part.name, 0o644)
            os.replace(part.name, file)
        except OSError:
            os.unlink(part.name)
            raise
    _entries_by_key.cache_clear()


def _user_entries(device_name: str) -> Mapping[tuple[str, KernelShape], Entry]:
    try:
        return _entries_by_key(user_file(device_name), device_name)
    except (OSError, RuntimeError) as error:
        if os.environ.get(CACHE_VARIABLE):
            raise ValueError(
                f"{user_file(device_name)} cannot be read: {error}; {CACHE_VARIABLE} must name a folder that can be"
            ) from error
        return {}  # in containers and services there may be no home folder, or one of somebody else


@functools.cache
def _entries_by_key(file: Path, device_name: str) -> Mapping[tuple[str, KernelShape], Entry]:
    return {entry.key: entry for entry in read_entries(file, device_name)}


def _check_kernel(kernel: object) -> None:
    if not isinstance(kernel, str) or kernel not in TILES_OF_KERNEL:
        raise ValueError(f"unknown kernel {kernel!r}; legal are {', '.join(TILES_OF_KERNEL)}")


def _parse_entry(value: Any, where: str) -> Entry:
    fields = _fields(value, Entry, where)
    try:
        _check_kernel(fields["kernel"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    shape = _fields(fields["shape"], KernelShape, f"{where}, shape")
    if shape["dtype"] not in ("bfloat16", "float16"):
        raise ValueError(f"{where}, shape: dtype must be bfloat16 or float16, got {shape['dtype']!r}")
    for name in shape.keys() - {"dtype"}:
        _check_integer(shape[name], 0 if name == "rows_bucket" else 1, f"{where}, shape: {name}")
    if shape["rows_bucket"] & (shape["rows_bucket"] - 1):
        raise ValueError(f"{where}, shape: rows_bucket must be 0 or a power of two, got {shape['rows_bucket']}")
    kind = TILES_OF_KERNEL[fields["kernel"]]
    tiles = _fields(fields["tiles"], kind, f"{where}, tiles")
    for name, size in tiles.items():
        _check_integer(size, 1, f"{where}, tiles: {name}")
    for name in ("microseconds", "default_microseconds"):
        time = fields[name]
        if isinstance(time, bool) or not isinstance(time, int | float) or not time > 0:
            raise ValueError(f"{where}: {name} must be a positive number, got {time!r}")
    if not isinstance(fields["measured"], str):
        raise ValueError(f"{where}: measured must be a text, got {fields['measured']!r}")
    return Entry(**{**fields, "shape": KernelShape(**shape), "tiles": kind(**tiles)})


def _fields(value: Any, kind: type, where: str) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        got = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{where}: must have exactly {', '.join(sorted(names))}, got {got!r}")
    return value


def _check_integer(value: Any, smallest: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{where} must be an integer of at least {smallest}, got {value!r}")
