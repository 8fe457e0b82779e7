"""Download: free disk against what is still missing, then the files, then every file's hash against the hub's."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils.tqdm import tqdm

from step128_checkpoint.details import DOWNLOAD_NAME
from step128_checkpoint.errors import CheckpointError, OutputError
from step128_checkpoint.files import reading, size_text
from step128_checkpoint.hub.listing import HubFile, Listing, endpoint, hub_errors
from step128_checkpoint.shards import disk_error, write_synced

_METADATA_FOLDER = Path(".cache") / "huggingface" / "download"  # where huggingface_hub keeps what it knows of OUT
_BLOCK_BYTES = 4 << 20
_POLL_SECONDS = 0.5

OnProgress = Callable[[int], None]


def missing_files(listing: Listing, out: Path) -> list[HubFile]:
    """The files that are not in ``out`` with the size that the hub states."""
    return [file for file in listing.files if _size_bytes(out / file.name) != file.size_bytes]


def check_place(listing: Listing, out: Path) -> None:
    """Check that ``out`` is new or holds an earlier download, and that what is missing fits on the disk.

    Raises:
        OutputError: it is something else, or the disk is too small.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is no folder. Choose another place.")
    if out.exists() and any(out.iterdir()) and not (out / _METADATA_FOLDER).is_dir():
        raise OutputError(f"{out} exists and was not made by a download. Choose another folder, or empty this one.")
    needed_bytes = sum(file.size_bytes for file in missing_files(listing, out))
    place = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes > free_bytes:
        raise OutputError(
            f"{out}: {size_text(needed_bytes)} are still to be fetched, {size_text(free_bytes)} are free. Free some "
            "space, choose another disk, or leave files out with --exclude."
        )


def fetch(listing: Listing, out: Path, on_progress: OnProgress) -> None:
    """Fetch what is missing; finished files of an interrupted run are kept, and a broken stream goes on where it broke.

    Raises:
        HubUnreachableError, PermissionDeniedError, InputNotFoundError, OutputError: with the reason.
    """
    try:
        (out / _METADATA_FOLDER).mkdir(parents=True, exist_ok=True)
        with _locked(out), _quiet(), _watched(listing, out, on_progress), hub_errors(listing.repo, listing.commit):
            snapshot_download(
                listing.repo,
                revision=listing.commit,
                local_dir=out,
                allow_patterns=[_literal(file.name) for file in listing.files],
                endpoint=endpoint(),
                tqdm_class=_NoBar,
            )
    except OSError as error:
        raise disk_error(out, error) from error


def verify_files(listing: Listing, out: Path, jobs: int, on_progress: OnProgress) -> None:
    """Compare every file's hash with the hub's. A file that differs is fetched again by the next run.

    Raises:
        CheckpointError: names the files that differ.
    """
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        same = list(pool.map(lambda file: _is_same(out / file.name, file, on_progress), listing.files))
    wrong = [file.name for file, good in zip(listing.files, same, strict=True) if not good]
    for name in wrong:
        # Without its note of what the file was, huggingface_hub compares or fetches the file itself.
        (out / _METADATA_FOLDER / f"{name}.metadata").unlink(missing_ok=True)
    if wrong:
        raise CheckpointError(
            f"{', '.join(str(out / name) for name in wrong)}: other bytes than the hub's (hash mismatch). Run the same "
            "command again: it fetches what differs anew."
        )


def note_download(listing: Listing, out: Path) -> None:
    """Leave a note of what was fetched; conversions carry it along, and `model-card` names the origin from it."""
    document: dict[str, Any] = {
        "format": "step128-download",
        "format_version": 1,
        "repo": listing.repo,
        "commit": listing.commit,
        "files": [asdict(file) for file in listing.files],
    }
    try:
        beside = out / f".{DOWNLOAD_NAME}.partial"
        write_synced(beside, json.dumps(document, indent=1).encode() + b"\n")
        beside.replace(out / DOWNLOAD_NAME)
    except OSError as error:
        raise disk_error(out, error) from error


def _is_same(path: Path, file: HubFile, on_progress: OnProgress) -> bool:
    """git hashes a blob as ``blob SIZE\\0`` and its bytes, with SHA-1."""
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.size_bytes}\0".encode())
    with reading(path), path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            on_progress(len(block))
    return digest.hexdigest() == (file.sha256 or file.git_sha1)


def _size_bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _literal(name: str) -> str:
    """A pattern that matches only this name."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second download out, and remove the halves that a killed one left: they are not continued by anyone."""
    descriptor = os.open(out / _METADATA_FOLDER / "step128.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{out}: another download is writing here. Wait for it, or end it.") from None
        for leftover in (out / _METADATA_FOLDER).rglob("*.incomplete"):
            leftover.unlink()
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's remarks about retries from the progress bar; what fails in the end is raised."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _watched(listing: Listing, out: Path, on_progress: OnProgress) -> Iterator[None]:
    """Report the bytes that arrive, by looking at the files: whichever way the hub's client fetches them."""
    done = threading.Event()

    def present_bytes() -> int:
        finished = sum(_size_bytes(out / file.name) or 0 for file in listing.files)
        unfinished = sum(_allocated_bytes(path) for path in (out / _METADATA_FOLDER).rglob("*.incomplete"))
        return min(finished + unfinished, listing.size_bytes)

    def watch() -> None:
        seen_bytes = 0
        while True:
            last = done.wait(_POLL_SECONDS)
            now_bytes = present_bytes()
            on_progress(now_bytes - seen_bytes)
            seen_bytes = now_bytes
            if last:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # it was finished and moved to its place just now
        return 0


class _NoBar(tqdm):
    """Keeps huggingface_hub's own bars away from ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]
