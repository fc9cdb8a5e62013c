"""The one error that a user's checkpoint, output folder or choice of options can cause."""

from collections.abc import Sequence

_SHOWN = 40


class CheckpointError(ValueError):
    """A checkpoint or an output folder cannot be used; the message names the file and the tensor.

    `problems` holds every problem found, one line each: a checkpoint is checked as a whole before a byte is written.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems) or (message,)
        shown = [f"  - {problem}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            shown.append(f"  - and {len(problems) - _SHOWN} more")
        super().__init__("\n".join([message, *shown]))
