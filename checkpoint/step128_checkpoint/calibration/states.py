"""Hidden states on disk: of all tokens, one file before a layer and one after it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from step128_checkpoint.calibration.batches import Batch
from step128_checkpoint.errors import CheckpointError


class StateReader:
    """Reads hidden states batch by batch, one batch ahead of the computation."""

    def __init__(self, path: Path, hidden_size: int, dtype: torch.dtype) -> None:
        """Open a file that :class:`StateWriter` finished."""
        self._path, self._hidden_size, self._dtype = path, hidden_size, dtype

    def batches(self, batches: Sequence[Batch], device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its states ``[B, T, H]`` on the device.

        Raises:
            CheckpointError: the file is shorter than it was.
        """
        with ThreadPoolExecutor(max_workers=1) as pool, self._path.open("rb", buffering=0) as stream:
            ahead: Future[Tensor] | None = None
            for number, batch in enumerate(batches):
                rows = (ahead or pool.submit(self._read, stream.fileno(), batch)).result()
                if number + 1 < len(batches):
                    ahead = pool.submit(self._read, stream.fileno(), batches[number + 1])
                yield batch, batch.pad(rows.to(device))

    def _read(self, descriptor: int, batch: Batch) -> Tensor:
        rows = torch.empty(batch.tokens, self._hidden_size, dtype=self._dtype)
        view = _bytes(rows)
        position = batch.first_row * self._hidden_size * self._dtype.itemsize
        while view:
            count = os.preadv(descriptor, [view], position)
            if not count:
                raise CheckpointError(f"{self._path}: cut short while being used. Run the same command again.")
            view, position = view[count:], position + count
        return rows


class StateWriter:
    """Writes the states of all batches, in order, beside the computation; hashes them as they pass."""

    def __init__(self, path: Path) -> None:
        """Start a file over."""
        self._stream = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._behind: Future[None] | None = None

    def write(self, rows: Tensor) -> None:
        """Append rows ``[tokens, H]``; an error of the batch before is raised here."""
        data = rows.cpu()
        self._wait()
        self._behind = self._pool.submit(self._write, data)

    def finish(self) -> str:
        """Sync to disk; returns the SHA-256 of all states, in hex."""
        self._wait()
        os.fsync(self._stream.fileno())
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._behind is not None:
            self._behind.result()
            self._behind = None

    def _write(self, rows: Tensor) -> None:
        view = _bytes(rows.contiguous())
        self._digest.update(view)
        while view:
            view = view[self._stream.write(view) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stream.close()


def _bytes(rows: Tensor) -> memoryview:
    return memoryview(rows.view(torch.uint8).numpy().data).cast("B")


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file, in hex; None if it is not there."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
