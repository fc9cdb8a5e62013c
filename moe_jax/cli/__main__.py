"""`python -m moe_jax.cli`."""

import sys

from moe_jax.cli import main

sys.exit(main())
