"""Writes sharded safetensors, header first: shapes are known before any data, so data streams to its final place.

Work comes as steps: a step makes one tensor, or several that belong together, in pieces that concatenate. Pieces run
on several threads (numpy releases the GIL) and are written in order, so memory is a few pieces, whatever a tensor's
size. Every finished tensor is journaled with its hash; a later run reads it again and redoes only what does not match.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from step128_checkpoint.errors import OutputError, PermissionDeniedError
from step128_checkpoint.journal import Journal
from step128_checkpoint.layout import Layout, OutputTensor
from step128_checkpoint.reader import INDEX_NAME

PIECE_BYTES = 8 << 20
"""Most bytes that one piece of a copied tensor has."""

Piece = tuple[bytes | NDArray[Any], ...]


@dataclass(frozen=True)
class Step:
    """Makes ``outputs`` together: ``produce(i)`` gives the i-th piece of each, for i in 0 .. ``pieces`` - 1."""

    outputs: tuple[OutputTensor, ...]
    pieces: int
    produce: Callable[[int], Piece]

    @property
    def size_bytes(self) -> int:
        """Bytes that the step writes."""
        return sum(output.size_bytes for output in self.outputs)


@dataclass(frozen=True)
class WriteSummary:
    """Tensors written now, found finished (hash verified), and redone because they did not match the journal."""

    written_tensors: int
    verified_tensors: int
    redone_tensors: int


def write_shards(
    folder: Path,
    steps: Sequence[Step],
    layout: Layout,
    journal: Journal,
    jobs: int,
    on_progress: Callable[[int], None],
) -> WriteSummary:
    """Write every shard and the index into ``folder``, skipping what the journal proves finished; sync to disk.

    Args:
        folder: exists; may hold the shards of an interrupted run.
        steps: together they make exactly the layout's tensors.
        layout: from :func:`plan_layout`.
        journal: of the same run.
        jobs: threads that produce pieces.
        on_progress: called with the bytes done since the last call.

    Raises:
        OutputError: the disk is full or fails.
        CheckpointError: from ``produce``.
    """
    try:
        with _ShardFiles(folder, layout) as files:
            verified, redone, remaining = 0, 0, []
            for step in steps:
                if all(output.name in journal.finished for output in step.outputs):
                    if all(files.sha256(output.name) == journal.finished[output.name] for output in step.outputs):
                        verified += len(step.outputs)
                        on_progress(step.size_bytes)
                        continue
                    redone += len(step.outputs)
                remaining.append(step)
            _run(remaining, files, journal, jobs, on_progress)
            files.sync()
        write_synced(folder / INDEX_NAME, layout.index_json().encode())
    except OSError as error:
        raise disk_error(folder, error) from error
    written = sum(len(step.outputs) for step in remaining)
    return WriteSummary(written_tensors=written, verified_tensors=verified, redone_tensors=redone)


def _run(
    steps: Sequence[Step], files: _ShardFiles, journal: Journal, jobs: int, on_progress: Callable[[int], None]
) -> None:
    """Produce pieces ahead on ``jobs`` threads, at most two each, and write them in order."""
    pending: deque[tuple[Step, int, Future[Piece]]] = deque()
    writer = _StepWriter(files, journal, on_progress)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            for step, number in _pieces(steps):
                if len(pending) >= 2 * jobs:
                    writer.write(*pending.popleft())
                pending.append((step, number, pool.submit(step.produce, number)))
            while pending:
                writer.write(*pending.popleft())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _StepWriter:
    """Writes pieces in order, hashing as they pass; journals a step after its last piece."""

    def __init__(self, files: _ShardFiles, journal: Journal, on_progress: Callable[[int], None]) -> None:
        self._files = files
        self._journal = journal
        self._on_progress = on_progress
        self._hashes: list[hashlib._Hash] = []
        self._positions_bytes: list[int] = []

    def write(self, step: Step, number: int, future: Future[Piece]) -> None:
        if number == 0:
            self._hashes = [hashlib.sha256() for _ in step.outputs]
            self._positions_bytes = [0] * len(step.outputs)
        for i, (output, part) in enumerate(zip(step.outputs, future.result(), strict=True)):
            data = (memoryview(part) if isinstance(part, bytes) else part.data).cast("B")
            self._files.write(output.name, self._positions_bytes[i], data)
            self._hashes[i].update(data)
            self._positions_bytes[i] += len(data)
            self._on_progress(len(data))
        if number == step.pieces - 1:
            for output, digest in zip(step.outputs, self._hashes, strict=True):
                self._journal.record(output.name, digest.hexdigest())


def _pieces(steps: Sequence[Step]) -> Iterator[tuple[Step, int]]:
    for step in steps:
        for number in range(step.pieces):
            yield step, number


class _ShardFiles:
    """The output's safetensors files, at their full (sparse) size with headers written."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._layout = layout
        self._descriptors: dict[str, int] = {}
        for file_name, header in layout.headers.items():
            descriptor = os.open(folder / file_name, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors[file_name] = descriptor
            os.ftruncate(descriptor, layout.file_sizes_bytes[file_name])
            _write_all(descriptor, memoryview(header), 0)

    def write(self, tensor_name: str, position_bytes: int, data: memoryview) -> None:
        place = self._layout.places[tensor_name]
        if position_bytes + len(data) > place.size_bytes:
            raise AssertionError(f"{tensor_name}: its step made more than the {place.size_bytes} bytes announced")
        _write_all(self._descriptors[place.file_name], data, place.offset_bytes + position_bytes)

    def sha256(self, tensor_name: str) -> str:
        place = self._layout.places[tensor_name]
        digest = hashlib.sha256()
        for start in range(0, place.size_bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, place.size_bytes - start)
            digest.update(os.pread(self._descriptors[place.file_name], size, place.offset_bytes + start))
        return digest.hexdigest()

    def sync(self) -> None:
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def __enter__(self) -> _ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset_bytes)
        data, offset_bytes = data[count:], offset_bytes + count


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and sync it to disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def disk_error(folder: Path, error: OSError) -> OutputError:
    """Say in words why writing below ``folder`` failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{folder}: the disk is full. Free some space and run the same command again: it continues.")
    kind = PermissionDeniedError if isinstance(error, PermissionError) else OutputError
    return kind(f"{folder}: cannot be written: {error}")
