"""Errors meant for people.

Every error a user can cause is a `DSVL2Error` whose message names the file or field, says what was
found, what was expected, and what to do. The command line prints the message alone (no traceback
without ``--debug``) and exits with `exit_status`.
"""


class DSVL2Error(Exception):
    """A failure with a message written for the user. Exit status 1."""

    exit_status = 1


class UsageError(DSVL2Error):
    """The call itself is wrong: an option, an argument, a combination. Exit status 2."""

    exit_status = 2


class ConfigError(DSVL2Error):
    """A config.json or processor_config.json that cannot describe a DeepSeek-VL2 model."""


class CheckpointError(DSVL2Error):
    """A checkpoint directory that is incomplete, inconsistent or not readable."""


class TokenizerError(DSVL2Error):
    """A tokenizer that lacks what the model needs."""


class ImageError(DSVL2Error):
    """A file or object that cannot be read as an image."""


class ConversationError(DSVL2Error):
    """A conversation or prompt that the processor cannot turn into model input."""


class SettingsError(UsageError):
    """A training configuration (CONFIG.toml or ``key=value``) that cannot be run."""


class DataError(DSVL2Error):
    """A data set that cannot be read, or that has too many broken samples."""

    @staticmethod
    def unreadable(path: object, error: OSError) -> "DataError":
        """The error for a file that the operating system does not let us read."""
        return DataError(f"{path}: cannot be read ({error.strerror or error}). Check the path and the file.")


class SampleError(DataError):
    """One sample that cannot be trained on; `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # worker processes send it to the main one
        return SampleError, (self.reason, str(self))


class RunError(DSVL2Error):
    """A training or evaluation run that cannot start or resume."""
