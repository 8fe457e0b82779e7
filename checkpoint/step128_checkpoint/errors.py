"""What can go wrong with a checkpoint, each with the exit code that the command line ends with."""

from __future__ import annotations


class CheckpointError(Exception):
    """The checkpoint or its data is bad. The message names the file and the tensor and says what was needed."""

    exit_code = 65


class InputNotFoundError(CheckpointError):
    """A file or folder that was asked for does not exist."""

    exit_code = 66


class AlreadyCompleteError(CheckpointError):
    """There is nothing left to do: an earlier run of the command made the output, which is complete."""

    exit_code = 0


class OutputError(CheckpointError):
    """The output cannot be written: it exists, the disk is full, or another run is writing it."""

    exit_code = 73


class PermissionDeniedError(OutputError):
    """A file or folder is not ours to read or to write; what was finished before is kept."""

    exit_code = 5


class ConfigurationError(CheckpointError):
    """A policy, a policy file or an option is wrong."""

    exit_code = 78
