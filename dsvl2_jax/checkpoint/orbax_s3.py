"""Orbax on ``s3://``: Orbax itself knows files and ``gs://`` alone, and tensorstore, below it, knows S3.

Orbax writes a checkpoint on an object store as it does on Google Cloud Storage: under its final name, with a file
at the end that says that it is complete. All that differs is the store that tensorstore is told of, so the four
functions that decide this take ``s3://`` for a further spelling of ``gs://``. They are private to Orbax:
tests/checkpoint/test_remote.py fails when another version changes them, and `install` says so.
"""

from __future__ import annotations

import os
from typing import Any

import orbax.checkpoint
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from dsvl2_jax.errors import CheckpointError

_SCHEMES = ("gs://", "s3://")


def install() -> None:
    """Makes Orbax take ``s3://``. Called again, it does nothing.

    Raises:
      CheckpointError: this version of Orbax is built otherwise.
    """
    places = (
        (gcs_utils, "_GCS_PATH_PREFIX", _SCHEMES),
        (gcs_utils, "get_kvstore_for_gcs", _store),
        (tensorstore_utils, "_use_gcs_driver", lambda directory: directory.startswith(_SCHEMES)),
        (tensorstore_utils, "_normalize_path", _normalised),
    )
    if missing := [name for module, name, _ in places if not hasattr(module, name)]:
        raise CheckpointError(
            f"s3:// cannot be used with orbax-checkpoint {orbax.checkpoint.__version__}: it has no "
            f"{', '.join(missing)}. Install orbax-checkpoint 0.12.8, or use gs:// or a directory."
        )
    if gcs_utils.get_kvstore_for_gcs is not _store:
        for module, name, value in places:
            setattr(module, name, value)


_google_store = gcs_utils.get_kvstore_for_gcs


def _store(path: str) -> dict[str, Any]:
    """tensorstore's description of the place of a path."""
    if path.startswith("gs://"):
        return _google_store(path)
    bucket, _, key = path.removeprefix("s3://").partition("/")
    store = {"driver": "s3", "bucket": bucket, "path": key}
    # The variables that Amazon's own tools read; tensorstore reads the credentials' alone.
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        store["endpoint"] = endpoint
    if "AWS_ACCESS_KEY_ID" in os.environ:
        store["aws_credentials"] = {"type": "environment"}  # else it looks everywhere and complains of what is missing
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        store["aws_region"] = region
    return store


def _normalised(path: str) -> str:
    for scheme in _SCHEMES:
        if path.startswith(scheme):
            return scheme + os.path.normpath(path.removeprefix(scheme))
    return os.path.normpath(path)
