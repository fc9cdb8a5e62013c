"""How far from the exact value a result may be that was rounded once."""

ROUNDED_ONCE = {"float32": 1e-5, "bfloat16": 2**-8 + 1e-5, "float16": 2**-11 + 1e-5}
"""Error of rounding to nearest, and before it that of float32 sums, relative to the largest value."""
