"""Packing weighted items into packs of equal size."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Packing(NamedTuple):
    """Where each item went."""

    pack: Int[np.ndarray, "L n"]
    """The pack of each item."""
    rank_in_pack: Int[np.ndarray, "L n"]
    """Its place inside that pack, counted in the order of arrival."""


def balanced_packing(weight: Float[np.ndarray, "L n"], num_packs: int) -> Packing:
    """Pack n items into `num_packs` packs of n / num_packs items each, their weights as even as a greedy choice gets.

    Heaviest first, every item goes to the lightest pack that still has room; items of equal weight in their order, packs
    of equal weight from the first on. One item per pack is the identity.

    Raises:
        ValueError: the items cannot be split into packs of equal size.

    Source: DeepSeek EPLB and vLLM `balanced_packing`; spec 5.1, with the stable sort of 5.2.
    """
    num_layers, num_items = weight.shape
    if num_packs < 1 or num_items % num_packs:
        raise ValueError(f"the number of packs must divide the {num_items} items, got {num_packs}")
    capacity = num_items // num_packs
    if capacity == 1:
        pack = np.broadcast_to(np.arange(num_items), weight.shape)
        return Packing(pack, np.zeros_like(pack))

    layers = np.arange(num_layers)
    load = np.zeros((num_layers, num_packs), weight.dtype)
    filled = np.zeros((num_layers, num_packs), np.int64)
    pack = np.empty(weight.shape, np.int64)
    rank_in_pack = np.empty(weight.shape, np.int64)
    for items in np.argsort(-weight, axis=1, kind="stable").T:
        lightest = np.argmin(np.where(filled < capacity, load, np.inf), axis=1)
        pack[layers, items] = lightest
        rank_in_pack[layers, items] = filled[layers, lightest]
        load[layers, lightest] += weight[layers, items]
        filled[layers, lightest] += 1
    return Packing(pack, rank_in_pack)
