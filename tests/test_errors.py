"""Exit statuses of errors. That a SampleError survives pickling is tested in tests/inputs/test_records.py."""

import pytest

from dsvl2_jax import errors


@pytest.mark.parametrize(("kind", "status"), [("UsageError", 2), ("SettingsError", 2), ("CheckpointError", 1)])
def test_wrong_calls_have_an_exit_status_of_their_own(kind, status):
    assert getattr(errors, kind)("text").exit_status == status
    assert issubclass(getattr(errors, kind), errors.DSVL2Error)
