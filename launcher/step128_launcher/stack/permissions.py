"""What a user of a container may do with a file of this machine: bind mounts keep owner, group and mode."""

from __future__ import annotations

import os
from pathlib import Path

from step128_launcher.stack.project import User

READ, ENTER, USE = 0o4, 0o5, 0o6  # of a file; of a folder; of a device


def may(user: User, status: os.stat_result, wanted: int) -> bool:
    """Whether `user`, who has no capabilities, gets all of `wanted`. Only one of the three sets of bits counts."""
    if user.user == status.st_uid:
        bits = status.st_mode >> 6
    elif status.st_gid in user.groups:
        bits = status.st_mode >> 3
    else:
        bits = status.st_mode
    return bits & wanted == wanted


def who(status: os.stat_result) -> str:
    """Describe owner, group and mode."""
    return f"owner {status.st_uid}, group {status.st_gid}, mode {status.st_mode & 0o7777:04o}"


def escapes(path: Path, mounted: Path) -> bool:
    """Whether `path` is a link to somewhere outside of `mounted`, where a container cannot follow it."""
    return not path.resolve().is_relative_to(mounted.resolve())
