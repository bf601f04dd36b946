"""A converted directory or a run's checkpoint, as what `dsvl2_jax.convert.to_orbax` reads to quantize it.

Tested in tests/convert/test_quantize.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.load import open_orbax, read_leaves
from dsvl2_jax.checkpoint.locate import PARAMS_NAME
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.parameter_paths import LeafPath
from dsvl2_jax.model.quantization import kinds_of


class StoredSource:
    """The parameters of a converted directory or of a run's checkpoint, for `convert` to quantize; as `Source`."""

    files: tuple[Path, ...] = ()

    def __init__(self, directory: Path, config: Config):
        """Raises CheckpointError: it cannot be read, or is quantized already."""
        manifest, self._stored = open_orbax(directory, config)
        if kinds := kinds_of(self._stored):
            raise CheckpointError(
                f"{directory}: is quantized already: {len(kinds)} of its weights are in "
                f"{', '.join(sorted(set(kinds.values())))}. Quantize the checkpoint that it was made from: each "
                "rounding adds to what is lost."
            )
        self._params = directory / PARAMS_NAME
        self._host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        self.notes: list[str] = manifest.get("notes", [])
        self.digests: dict[str, str] = manifest.get("source_sha256", {})
        self.mixed_dtypes: dict[str, str] = manifest.get("mixed_dtypes", {})

    def __enter__(self) -> StoredSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def fit(self, config: Config) -> None:
        """It fits already."""

    def leaf_dtype(self, leaf: rules.Leaf) -> np.dtype:
        """In which a parameter is stored."""
        return self._stored[leaf.path][1]

    def read_into(self, arrays: Mapping[LeafPath, np.ndarray]) -> None:
        """Fills arrays of the parameters' shapes, casting to their dtypes."""
        stored = {path: self._stored[path] for path in arrays}
        for path, array in read_leaves(self._params, stored, dict.fromkeys(stored, self._host)):
            arrays[path][...] = np.asarray(array)
