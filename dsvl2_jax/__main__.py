"""``python -m dsvl2_jax`` is the `dsvl2` command."""

import sys

from dsvl2_jax.apps.cli.main import main

sys.exit(main())
