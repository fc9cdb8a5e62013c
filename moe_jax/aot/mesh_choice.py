"""A mesh for a model on a number of devices: how many positions split data, experts and the width of experts."""

import math
from collections.abc import Mapping

from moe_jax.config import MoEConfig
from moe_jax.families.decoder import Decoder


def choose_mesh(decoder: Decoder, num_devices: int) -> dict[str, int]:
    """Positions along "data", "expert" and "tensor", in this order: the last ones are the closest devices.

    Experts are split as far as their number allows, then each expert's intermediate size, and data over what is left: a device
    then holds as little of the weights as the model's sizes let it. Shared experts have to be divided by both together.

    Args:
        decoder: the model.
        num_devices: devices, all of which are used.
    """
    mixtures = [layer.feed_forward for layer in decoder.layers if isinstance(layer.feed_forward, MoEConfig)]
    choices = [
        (expert, tensor)
        for expert in _divisors(num_devices)
        for tensor in _divisors(num_devices // expert)
        if all(_divides(mixture, expert, tensor) for mixture in mixtures)
    ]
    expert, tensor = max(choices, key=lambda choice: (choice[0] * choice[1], choice[0]))
    return {"data": num_devices // (expert * tensor), "expert": expert, "tensor": tensor}


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Positions from text such as "data=2,expert=32"; axes that aren't named have one.

    Raises:
        ValueError: the text has another form, names another axis or one twice, or doesn't multiply to the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in ("data", "expert", "tensor") or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"a mesh is written as data=N,expert=N,tensor=N, each axis at most once and N at least 1; got {text!r}"
            )
        sizes[name] = int(size)
    positions = math.prod(sizes.values())
    if positions != num_devices:
        raise ValueError(f"the mesh {text} has {positions} positions, but there are {num_devices} devices")
    return {name: sizes.get(name, 1) for name in ("data", "expert", "tensor")}


def written(sizes: Mapping[str, int]) -> str:
    """As `parse_mesh` reads it."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _divides(config: MoEConfig, expert: int, tensor: int) -> bool:
    shared = config.shared_experts
    return (
        config.num_physical_experts % expert == 0
        and config.intermediate_size % tensor == 0
        and (shared is None or shared.intermediate_size % (expert * tensor) == 0)
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
