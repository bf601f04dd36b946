"""Errors keep what they say and how they are counted, also from one process to another."""

import pickle

import pytest

from dsvl2_jax import errors


def test_a_sample_error_survives_pickling():
    error = pickle.loads(pickle.dumps(errors.SampleError("image missing", "a.png: no such file")))
    assert (error.reason, str(error)) == ("image missing", "a.png: no such file")


@pytest.mark.parametrize(("kind", "status"), [("UsageError", 2), ("SettingsError", 2), ("CheckpointError", 1)])
def test_wrong_calls_have_an_exit_status_of_their_own(kind, status):
    assert getattr(errors, kind)("text").exit_status == status
    assert issubclass(getattr(errors, kind), errors.DSVL2Error)
