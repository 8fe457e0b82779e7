"""From one checkpoint folder to another: plan, disk check, resumable writing, and the rename that publishes it.

While it runs, everything is in ``OUT.partial/``: the journal, and ``checkpoint/``, which becomes ``OUT`` by a rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step128_checkpoint.dtypes import all_finite
from step128_checkpoint.errors import CheckpointError, OutputError, PermissionDeniedError
from step128_checkpoint.files import reading, size_text, sync_folder
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.journal import Journal
from step128_checkpoint.layout import Layout, OutputTensor, plan_layout
from step128_checkpoint.manifest import MANIFEST_NAME, manifest_of
from step128_checkpoint.memory import DEFAULT_MAX_MEMORY_BYTES
from step128_checkpoint.places import check_places, made_folders, remove_work, work_folder
from step128_checkpoint.reader import INDEX_NAME, Checkpoint
from step128_checkpoint.shards import (
    PIECE_BYTES,
    Step,
    WriteSummary,
    disk_error,
    write_shards,
    write_synced,
)

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000

Notes = dict[str, dict[str, Any]]

# The input's model card would be read as the product's: `model-card` writes one.
_REWRITTEN = ("config.json", INDEX_NAME, MANIFEST_NAME, "README.md")

# Other formats' weights, and reports about the input alone, would be wrong beside the new weights.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack")
_NOT_CARRIED_SUFFIXES = (*_WEIGHT_SUFFIXES, "_report.json", "_report.png")


@dataclass(frozen=True)
class Conversion:
    """What to write: ``steps`` make the tensors, ``config`` becomes config.json, ``options`` decide the bytes.

    ``extra_files`` (name -> content) are written beside the weights, and so is what ``report`` makes of the steps'
    notes (by the name of each step's first tensor) when all are done.
    """

    checkpoint: Checkpoint
    steps: Sequence[Step]
    config: dict[str, Any]
    options: dict[str, Any]
    max_shard_bytes: int
    extra_files: dict[str, bytes] = field(default_factory=dict)
    report: Callable[[Notes], dict[str, bytes]] | None = None

    def layout(self) -> Layout:
        """Plan the output's files."""
        return plan_layout([output for step in self.steps for output in step.outputs], self.max_shard_bytes)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the output's bytes, as JSON values; the input by names, sizes and times."""
        return {
            "input": self.checkpoint.fingerprint(),
            "max_shard_bytes": self.max_shard_bytes,
            "step128_version": version("step128"),
            **self.options,
        }


@dataclass(frozen=True)
class ConversionSummary:
    """What :func:`convert` did; ``output_bytes`` counts the safetensors files, ``notes`` are the steps'."""

    output_bytes: int
    write: WriteSummary
    notes: Notes


def copy_step(checkpoint: Checkpoint, tensor: TensorInfo) -> Step:
    """A step that carries a tensor unchanged; NaN and infinity in it are an error, as they are in a quantized one."""

    def produce(number: int) -> tuple[bytes]:
        start = number * PIECE_BYTES
        data = checkpoint.read(tensor.name, start, min(PIECE_BYTES, tensor.size_bytes - start))
        if not all_finite(data, tensor.dtype):
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} holds NaN or infinity. Download the file again."
            )
        return (data,)

    output = OutputTensor(tensor.name, tensor.dtype, tensor.shape, tensor.path.name)
    return Step((output,), max(1, -(-tensor.size_bytes // PIECE_BYTES)), produce)


def carried_files(folder: Path) -> list[Path]:
    """Files that go along unchanged: tokenizer, chat template, generation config, code, licence, ...

    Everything but weights, their index, config.json and the manifest (rewritten), reports about the input and its model
    card, and hidden files. Paths are relative to ``folder``, sorted.

    Raises:
        PermissionDeniedError: one of them may not be read (better known now than after hours).
    """
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    carried = sorted(
        path
        for path in files
        if not any(part.startswith(".") for part in path.parts)
        and str(path) not in _REWRITTEN
        and not path.name.endswith(_NOT_CARRIED_SUFFIXES)
    )
    for path in carried:
        if not os.access(folder / path, os.R_OK):
            raise PermissionDeniedError(f"{folder / path}: cannot be read: permission denied")
    return carried


def convert(
    conversion: Conversion,
    out: Path,
    jobs: int,
    restart: bool,
    on_progress: Callable[[int], None],
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
) -> ConversionSummary:
    """Write the output folder; continues an interrupted run of the same conversion.

    What fails before any tensor is finished, or cannot be continued because the input is bad, leaves nothing behind.

    Raises:
        AlreadyCompleteError: an earlier run made the output and was killed before its clean-up.
        OutputError: the output exists, the disk is too small or full, or ``OUT.partial`` belongs to another run or is
            not ours at all.
        PermissionDeniedError: the output's place may not be written, or a file of the input may not be read.
        ConfigurationError: the memory limit is too small.
        CheckpointError: the input proved bad on the way.
    """
    checkpoint, layout, source = conversion.checkpoint, conversion.layout(), conversion.checkpoint.folder
    try:
        out = check_places(source, out)
        work = work_folder(out)
        product = work / "checkpoint"
        with reading(source):
            carried = [path for path in carried_files(source) if str(path) not in conversion.extra_files]
            carried_bytes = sum((source / path).stat().st_size for path in carried)
        check_disk(layout, carried_bytes, product)
        with made_folders(work), closing(Journal(work, conversion.fingerprint(), restart)) as journal:
            try:
                if not journal.finished and product.exists():
                    shutil.rmtree(product)
                product.mkdir(exist_ok=True)
                with checkpoint:
                    summary = write_shards(
                        product, conversion.steps, layout, journal, jobs, max_memory_bytes, on_progress
                    )
                _write_small_files(conversion, product, carried, journal, layout)
                _publish(product, out)
                remove_work(work)
            except BaseException as error:
                hopeless = isinstance(error, CheckpointError) and not isinstance(error, OutputError)
                if hopeless or not journal.finished:
                    shutil.rmtree(product, ignore_errors=True)
                    remove_work(work)
                raise
    except OSError as error:
        raise disk_error(out, error) from error
    return ConversionSummary(output_bytes=layout.total_bytes, write=summary, notes=journal.notes)


def _write_small_files(
    conversion: Conversion, product: Path, carried: Sequence[Path], journal: Journal, layout: Layout
) -> None:
    """Everything but the weights and their index: carried files, config.json, reports, and the manifest, last."""
    hashes: dict[str, str] = {}

    def write(name: str, data: bytes) -> None:
        (product / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(product / name, data)
        hashes[name] = hashlib.sha256(data).hexdigest()

    source = conversion.checkpoint.folder
    for path in carried:
        with reading(source / path):
            write(str(path), (source / path).read_bytes())
    write("config.json", json.dumps(conversion.config, indent=2).encode() + b"\n")
    for name, data in conversion.extra_files.items():
        write(name, data)
    for name, data in (conversion.report(journal.notes) if conversion.report else {}).items():
        write(name, data)
    hashes[INDEX_NAME] = hashlib.sha256(layout.index_json().encode()).hexdigest()
    tensors = {name: (journal.finished[name], place.file_name) for name, place in layout.places.items()}
    manifest = manifest_of(conversion.checkpoint, conversion.options, tensors, hashes)
    write_synced(product / MANIFEST_NAME, json.dumps(manifest, indent=1).encode() + b"\n")


def check_disk(layout: Layout, carried_bytes: int, product: Path) -> None:
    """Compare what is still to be allocated with what is free (files of an interrupted run are sparse).

    Raises:
        OutputError: it does not fit.
    """
    present = (product / file_name for file_name in layout.headers)
    allocated_bytes = sum(path.stat().st_blocks * 512 for path in present if path.exists())
    needed_bytes = layout.total_bytes + carried_bytes - allocated_bytes
    place = next(folder for folder in product.parents if folder.exists())
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes > free_bytes:
        raise OutputError(
            f"{product.parent.parent}: {size_text(needed_bytes)} are needed, {size_text(free_bytes)} are free. "
            "Free some space, or write to another disk."
        )


def _publish(product: Path, out: Path) -> None:
    """Give the finished folder its name; after this it is complete even if the power fails."""
    sync_folder(product)
    os.rename(product, out)  # noqa: PTH104  replaces an empty folder, which Path.rename documents differently
    sync_folder(out.parent)
