"""What the hub says a repository holds: the commit, and size and hash of every file; and its refusals in sentences."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from step128_checkpoint.errors import (
    CheckpointError,
    ConfigurationError,
    InputNotFoundError,
    OutputError,
    PermissionDeniedError,
)

_DISK_FULL = "the disk is full. Free some space and run the same command again: it continues"
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HubUnreachableError(CheckpointError):
    """The hub does not answer, or the connection to it breaks."""

    exit_code = 69


@dataclass(frozen=True)
class HubFile:
    """One file of a repository: ``sha256`` of its bytes for LFS files, else ``git_sha1``, git's hash of the blob."""

    name: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files)


def endpoint() -> str:
    """The hub's address: $HF_ENDPOINT, else the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or str(constants.ENDPOINT)


def list_files(repo: str, revision: str | None, include: Sequence[str], exclude: Sequence[str]) -> Listing:
    """Ask the hub what a model repository holds.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; None means the default branch.
        include: patterns as of a shell; empty means all files.
        exclude: patterns of files to leave out.

    Raises:
        InputNotFoundError: no such repository or revision, or no file matches.
        PermissionDeniedError: it is gated or private.
        HubUnreachableError: the hub does not answer.
        ConfigurationError: ``repo`` is no repository's name, or offline mode is set.
    """
    with hub_errors(repo, revision):
        info = HfApi(endpoint=endpoint()).model_info(repo, revision=revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    files = []
    for name in sorted(siblings):
        if (include and not _matches(name, include)) or _matches(name, exclude):
            continue
        sibling = siblings[name]
        if sibling.size is None or info.sha is None:
            raise HubUnreachableError(f"{endpoint()} does not state the size of {name}: it is no complete hub")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{repo} names the file {name!r}, which would be written outside the folder")
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        files.append(HubFile(name, sibling.size, sha256, None if sha256 else sibling.blob_id))
    if not files:
        raise InputNotFoundError(f"{repo} has {len(siblings)} files, none of which the patterns choose")
    return Listing(repo, str(info.sha), tuple(files))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's and the network's errors into ours.

    Raises:
        InputNotFoundError, PermissionDeniedError, HubUnreachableError, ConfigurationError, OutputError: see their text.
    """
    try:
        yield
    except GatedRepoError as error:  # before RepositoryNotFoundError, of which it is one
        raise PermissionDeniedError(
            f"{repo} is gated: accept its terms at {endpoint()}/{repo}, then {_LOG_IN}, and run this again"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputNotFoundError(f"{repo}: {endpoint()} has no such model, or it is private: then {_LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise InputNotFoundError(f"{repo} has no revision {revision!r}") from error
    except HFValidationError as error:
        raise ConfigurationError(f"{repo!r} is no repository's name: {error}") from error
    except OfflineModeIsEnabled as error:
        raise ConfigurationError("HF_HUB_OFFLINE is set, so nothing can be fetched: unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionDeniedError(f"{repo}: {endpoint()} refuses it (HTTP {status}): {_LOG_IN}") from error
        raise _unreachable(f"it answers HTTP {status}") from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(str(error.__cause__ or error)) from error
    except httpx2.HTTPError as error:
        raise _unreachable(str(error) or type(error).__name__) from error
    except (XetDownloadError, RuntimeError) as error:  # of hf_xet, which tells everything in words
        if "No space left" in str(error):
            raise OutputError(_DISK_FULL) from error
        raise _unreachable(str(error).splitlines()[0]) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                "the disk is full. Free some space and run the same command again: it continues"
            ) from error
        if "Consistency check failed" in str(error):
            raise _unreachable("a file came with another size than announced") from error
        raise


def _unreachable(reason: str) -> HubUnreachableError:
    return HubUnreachableError(
        f"{endpoint()} cannot be reached, or the connection broke ({reason}). Finished files are kept: run the same "
        "command again"
    )
