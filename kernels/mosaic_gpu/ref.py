"""The type of a reference to memory inside a kernel."""

from typing import Any

type Ref = Any
"""Pallas's own type for references says nothing of what they can do (`at`, indexing, `transpose`)."""
