"""``python -m dsvl2_jax`` is the `dsvl2` command."""

import sys

from dsvl2_jax.cli import main

sys.exit(main())
