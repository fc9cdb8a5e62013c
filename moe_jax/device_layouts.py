"""In which order the elements of an array lie in device memory, where XLA's own choice does not suit those who read it.

On TPUs XLA lays an array out so that least is padded. Where the last axis is no multiple of 128, that may be another one: of
expert weights `[L, E, 2, I, H]` it puts the experts last, of an embedding the tokens. Kernels and lookups read row by row, so
that before every call of a kernel all experts are copied, and the embedding in every call of prefill and decode.

`jax.experimental.layout.Format` says both where the shards of an array live and how they lie there. Here it takes the place of a
`Sharding` for those arrays that need it; for all others the sharding says enough.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Shaped

type Home = Sharding | Format
"""Where the shards of an array live, and perhaps how they lie there."""


def home_row_by_row(sharding: Sharding, ndim: int) -> Home:
    """The home of an array with so many axes that is read by rows of its last one."""
    platform = next(iter(sharding.device_set)).platform
    return Format(Layout(tuple(range(ndim))), sharding) if platform == "tpu" else sharding


def sharding_of(home: Home) -> Sharding:
    """Where the shards live."""
    sharding = home.sharding if isinstance(home, Format) else home
    assert isinstance(sharding, Sharding)
    return sharding


def on_device(home: Home, device: Any) -> Home:
    """The home of the shard on one device."""
    sharding = SingleDeviceSharding(device)
    return Format(home.layout, sharding) if isinstance(home, Format) else sharding


def described(array: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and home of an array, or of what stands for one: what a program that takes it is compiled for."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "format", array.sharding))


def format_of(array: Any) -> Format | None:
    """The format that what takes the place of an array should have; None if the array is on no device in particular."""
    return array.format if array.committed else None


def moved_to(array: Shaped[Array, "..."], home: Home) -> Array:
    """An array at another home: first to the devices, then into their layout. JAX does not do both at once from other devices."""
    array = jax.device_put(array, sharding_of(home))
    return jax.device_put(array, home) if isinstance(home, Format) else array


def zeros(shape: tuple[int, ...], dtype: Any, home: Home) -> Array:
    """An array of zeros."""
    return _zeros(shape, np.dtype(dtype), home)()


def write_in_place(
    array: Shaped[Array, "..."], block: Shaped[Array | np.ndarray, "..."], offsets: tuple[int, ...]
) -> Array:
    """`array` with `block` at `offsets`, at home where it was; its memory is reused."""
    return _write(format_of(array))(array, block, offsets)


@functools.lru_cache(maxsize=256)
def _zeros(shape: tuple[int, ...], dtype: np.dtype, home: Home) -> Any:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=home)


@functools.lru_cache(maxsize=256)
def _write(home: Format | None) -> Any:
    return jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=home)
