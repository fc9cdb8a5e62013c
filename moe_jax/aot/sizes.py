"""How much a generation is asked to do, as its programs are compiled."""

import dataclasses

from moe_jax.generation.programs import bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much a generation is asked to do."""

    batch_size: int
    """Prompts."""
    prompt_length: int
    """Tokens that each of them has at most."""
    cache_length: int
    """Tokens of a row, prompt and new ones."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.prompt_length < 1:
            raise ValueError(
                f"batch_size and prompt_length must be at least 1, got {self.batch_size} and {self.prompt_length}"
            )
        if self.cache_length <= self.prompt_length:
            raise ValueError(
                f"cache_length must exceed prompt_length={self.prompt_length}, for new tokens; got {self.cache_length}"
            )

    def padded(self) -> "Sizes":
        """As `generate` compiles it: the prompt and the room for new tokens are padded to powers of two."""
        prompt, room = bucket(self.prompt_length), bucket(self.cache_length - self.prompt_length)
        return dataclasses.replace(self, prompt_length=prompt, cache_length=prompt + room)
