"""Writes sharded safetensors, header first: shapes are known before any data, so data streams to its final place.

Work comes as steps: a step makes one tensor, or several that belong together, in pieces that concatenate. Pieces run
on several threads (numpy and numba release the GIL) and are written in order, so memory is a few pieces, whatever a
tensor's size: as many are in flight as the memory limit allows. Every finished tensor is journaled with its hash; a
later run reads it again and redoes only what does not match.
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

from step128_checkpoint.errors import ConfigurationError, OutputError, PermissionDeniedError
from step128_checkpoint.files import size_text
from step128_checkpoint.journal import Journal
from step128_checkpoint.layout import Layout, OutputTensor
from step128_checkpoint.memory import resident_bytes
from step128_checkpoint.reader import INDEX_NAME

PIECE_BYTES = 8 << 20
"""Most bytes that one piece of a copied tensor has."""

Piece = tuple[bytes | NDArray[Any], ...]


@dataclass(frozen=True)
class Step:
    """Makes ``outputs`` together: ``produce(i)`` gives the i-th piece of each, for i in 0 .. ``pieces`` - 1.

    ``piece_memory_bytes`` bounds what making one piece and keeping it until it is written needs, ``step_memory_bytes``
    what the step keeps besides while any of its pieces is in flight. ``notes`` is called once after the last piece;
    what it returns is journaled with the step's first tensor (JSON values).
    """

    outputs: tuple[OutputTensor, ...]
    pieces: int
    produce: Callable[[int], Piece]
    piece_memory_bytes: int = 2 * PIECE_BYTES
    step_memory_bytes: int = 0
    notes: Callable[[], dict[str, Any]] | None = None

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
    max_memory_bytes: int,
    on_progress: Callable[[int], None],
) -> WriteSummary:
    """Write every shard and the index into ``folder``, skipping what the journal proves finished; sync to disk.

    Args:
        folder: exists; may hold the shards of an interrupted run.
        steps: together they make exactly the layout's tensors.
        layout: from :func:`plan_layout`.
        journal: of the same run.
        jobs: threads that produce pieces.
        max_memory_bytes: what the whole process may use.
        on_progress: called with the bytes done since the last call.

    Raises:
        OutputError: the disk is full or fails.
        ConfigurationError: the memory limit is too small for a single piece.
        CheckpointError: from ``produce``.
    """
    room_bytes = memory_room(steps, max_memory_bytes)
    try:
        with _ShardFiles(folder, layout) as files:
            verified, redone, remaining = 0, 0, []
            for step, intact in zip(steps, _intact(steps, files, journal, jobs), strict=True):
                if intact:
                    verified += len(step.outputs)
                    on_progress(step.size_bytes)
                    continue
                redone += sum(output.name in journal.finished for output in step.outputs)
                remaining.append(step)
            _run(remaining, files, journal, jobs, room_bytes, on_progress)
            files.sync()
        write_synced(folder / INDEX_NAME, layout.index_json().encode())
    except OSError as error:
        raise disk_error(folder, error) from error
    written = sum(len(step.outputs) for step in remaining)
    return WriteSummary(written_tensors=written, verified_tensors=verified, redone_tensors=redone)


def memory_room(steps: Sequence[Step], max_memory_bytes: int) -> int:
    """Bytes that pieces in flight may use: the limit less what the process holds already.

    Raises:
        ConfigurationError: a single piece does not fit.
    """
    room_bytes = max_memory_bytes - resident_bytes()
    for step in steps:
        if (needed_bytes := step.piece_memory_bytes + step.step_memory_bytes) > room_bytes:
            raise ConfigurationError(
                f"tensor {step.outputs[0].name} needs {size_text(needed_bytes)} at a time, and the memory limit leaves "
                f"{size_text(max(0, room_bytes))}. Give --max-memory at least "
                f"{size_text(max_memory_bytes - room_bytes + needed_bytes)}."
            )
    return room_bytes


def _intact(steps: Sequence[Step], files: _ShardFiles, journal: Journal, jobs: int) -> Iterator[bool]:
    """Whether each step's tensors are on disk as the journal says; their bytes are read and hashed again."""

    def check(step: Step) -> bool:
        names = [output.name for output in step.outputs]
        return all(name in journal.finished for name in names) and all(
            files.sha256(name) == journal.finished[name] for name in names
        )

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(check, steps)


def _run(
    steps: Sequence[Step],
    files: _ShardFiles,
    journal: Journal,
    jobs: int,
    room_bytes: int,
    on_progress: Callable[[int], None],
) -> None:
    """Produce pieces ahead on ``jobs`` threads, as many as memory has room for and at most two each; write in order."""
    pending: deque[tuple[Step, int, Future[Piece]]] = deque()
    writer = _StepWriter(files, journal, on_progress)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            for step, number in _pieces(steps):
                while pending and (len(pending) >= 2 * jobs or _in_flight_bytes(pending, step) > room_bytes):
                    writer.write(*pending.popleft())
                pending.append((step, number, pool.submit(step.produce, number)))
            while pending:
                writer.write(*pending.popleft())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _in_flight_bytes(pending: deque[tuple[Step, int, Future[Piece]]], following: Step) -> int:
    """Most that the pending pieces and one more of ``following`` use together."""
    steps = [step for step, _, _ in pending] + [following]
    distinct = {id(step): step for step in steps}.values()
    return sum(step.piece_memory_bytes for step in steps) + sum(step.step_memory_bytes for step in distinct)


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
            notes = step.notes() if step.notes else None
            for output, digest in reversed(list(zip(step.outputs, self._hashes, strict=True))):
                # The notes go with the first tensor, last: a step counts as finished only with them.
                self._journal.record(output.name, digest.hexdigest(), notes if output is step.outputs[0] else None)


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
