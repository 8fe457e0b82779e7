"""``verify DIR``: reads every byte of a checkpoint once, and says whether it is what it should be.

Each tensor must be readable, finite, shaped as config.json says and, where there is a manifest, have its hash there.
Tensors are checked side by side on threads (hashlib and numpy release the GIL), 4 MiB at a time, so memory is a few
blocks for each thread, whatever the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from step128_checkpoint.byte_progress import byte_progress
from step128_checkpoint.commands.options import positive, usable_cores
from step128_checkpoint.dtypes import BYTES_PER_ELEMENT, FLOAT_DTYPES, all_finite, to_float32
from step128_checkpoint.errors import CheckpointError, InputNotFoundError
from step128_checkpoint.files import reading, size_text
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.inspect import inspect_checkpoint
from step128_checkpoint.manifest import MANIFEST_NAME
from step128_checkpoint.model_card import is_generated
from step128_checkpoint.policy import load_policy
from step128_checkpoint.reader import Checkpoint, open_checkpoint
from step128_checkpoint.recipe import Recipe, read_recipe

_BLOCK_BYTES = 4 << 20
_CACHED_BYTES = 128 << 10  # tested at once for NaN: what numpy makes on the way stays in the core's cache


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_checkpoint` checked and found. Without ``problems`` the checkpoint is whole.

    ``float_tensors`` were tested for NaN and infinity; ``hashes`` counts tensors and ``file_hashes`` carried files that
    were compared with the manifest (both 0 without one).
    """

    folder: Path
    tensors: int
    size_bytes: int
    float_tensors: int
    has_manifest: bool
    hashes: int
    file_hashes: int
    seconds: float
    problems: tuple[str, ...]


def verify_checkpoint(
    checkpoint: Checkpoint, jobs: int, on_progress: Callable[[int], None] = lambda done_bytes: None
) -> Verification:
    """Read and check all of a checkpoint.

    Args:
        checkpoint: opened; its files are opened and closed here.
        jobs: threads, each of which reads one tensor at a time.
        on_progress: called from the threads with the bytes read since the last call.

    Raises:
        PermissionDeniedError: a file may not be read. Whatever is wrong with the data is a problem of the result.
    """
    started = time.monotonic()
    problems = list(inspect_checkpoint(checkpoint, load_policy()).problems)
    recipe = _recipe(checkpoint, problems)
    if recipe is not None:
        problems += _differences(checkpoint, recipe)
    expected = recipe.tensors if recipe else {}

    def check(tensor: TensorInfo) -> list[str]:
        sha256, _ = expected.get(tensor.name, (None, None))
        try:
            return _tensor_problems(checkpoint, tensor, sha256, on_progress)
        except CheckpointError as error:
            return [str(error)]

    with checkpoint, ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            for found in pool.map(check, checkpoint.tensors.values()):
                problems += found
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    files = recipe.files if recipe else {}
    for name, sha256 in files.items():
        problems += _file_problems(checkpoint.folder, name, sha256)
    return Verification(
        folder=checkpoint.folder,
        tensors=len(checkpoint.tensors),
        size_bytes=sum(tensor.size_bytes for tensor in checkpoint.tensors.values()),
        float_tensors=sum(tensor.dtype in FLOAT_DTYPES for tensor in checkpoint.tensors.values()),
        has_manifest=recipe is not None,
        hashes=len(expected.keys() & checkpoint.tensors.keys()),
        file_hashes=len(files),
        seconds=time.monotonic() - started,
        problems=tuple(problems),
    )


def count_not_finite(data: bytes, dtype: str) -> int:
    """Number of NaN and infinite values in the bytes of a tensor of a floating safetensors type; 0 for other types."""
    view, bad = memoryview(data), 0
    for start in range(0, len(data), _CACHED_BYTES):
        part = view[start : start + _CACHED_BYTES]
        if not all_finite(part, dtype):
            values = to_float32(bytes(part), dtype, (len(part) // BYTES_PER_ELEMENT[dtype],))
            bad += int((~np.isfinite(values)).sum())
    return bad


def _recipe(checkpoint: Checkpoint, problems: list[str]) -> Recipe | None:
    try:
        return read_recipe(checkpoint.folder)
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _differences(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """How names and places of the tensors differ from the manifest."""
    where = checkpoint.folder / MANIFEST_NAME
    problems = [f"{where}: tensor {name} is missing" for name in recipe.tensors if name not in checkpoint.tensors]
    for name, tensor in checkpoint.tensors.items():
        if name not in recipe.tensors:
            problems.append(f"{tensor.path}: tensor {name} is unknown to {MANIFEST_NAME}")
        elif recipe.tensors[name][1] != tensor.path.name:
            problems.append(f"{tensor.path}: tensor {name} belongs into {recipe.tensors[name][1]}")
    return problems


def _tensor_problems(
    checkpoint: Checkpoint, tensor: TensorInfo, sha256: str | None, on_progress: Callable[[int], None]
) -> list[str]:
    digest = hashlib.sha256()
    bad = 0
    for start in range(0, tensor.size_bytes, _BLOCK_BYTES):
        data = checkpoint.read(tensor.name, start, min(_BLOCK_BYTES, tensor.size_bytes - start))
        bad += count_not_finite(data, tensor.dtype)
        if sha256 is not None:
            digest.update(data)
        on_progress(len(data))
    where, problems = f"{tensor.path}: tensor {tensor.name}", []
    if bad:
        problems.append(f"{where} holds {bad} of {tensor.elements} values that are NaN or infinite")
    if sha256 is not None and digest.hexdigest() != sha256:
        problems.append(f"{where} has other bytes than when it was written (SHA-256 differs from {MANIFEST_NAME})")
    return problems


def _file_problems(folder: Path, name: str, sha256: str) -> list[str]:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return [f"{folder / MANIFEST_NAME}: names {name}, which is outside the folder"]
    if name == "README.md" and is_generated(path):
        return []  # `model-card` wrote it after the conversion
    try:
        with reading(path), path.open("rb") as stream:
            same = hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except InputNotFoundError:
        return [f"{path}: missing, although {MANIFEST_NAME} names it"]
    except CheckpointError as error:
        return [str(error)]
    return [] if same else [f"{path}: other bytes than when it was written (SHA-256 differs from {MANIFEST_NAME})"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the command `verify`; sets `run` as its function."""
    parser = commands.add_parser(
        "verify",
        description="Read every byte of a checkpoint once: each tensor must be readable, free of NaN and infinity, "
        f"shaped as config.json says, and have the SHA-256 that {MANIFEST_NAME} states, if there is one. "
        "K scales must fit the K norms.",
        epilog="Exit codes: 0 nothing is wrong, 65 there are problems, 66 no checkpoint there.",
    )
    parser.add_argument("input", type=Path, metavar="DIR")
    parser.add_argument(
        "--jobs", type=positive, default=usable_cores(), metavar="N", help="threads (default: all cores)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Verify and print; returns the exit code."""
    checkpoint = open_checkpoint(arguments.input)
    total_bytes = sum(tensor.size_bytes for tensor in checkpoint.tensors.values())
    with byte_progress("verifying", total_bytes) as on_progress:
        result = verify_checkpoint(checkpoint, arguments.jobs, on_progress)
    if arguments.json:
        print(json.dumps(asdict(result) | {"folder": str(result.folder)}))
    else:
        _show(result)
    return CheckpointError.exit_code if result.problems else 0


def _show(result: Verification) -> None:
    console = Console(soft_wrap=True)
    speed = size_text(result.size_bytes / max(result.seconds, 1e-9))
    console.print(
        f"{escape(str(result.folder))}: {result.tensors} tensors, {size_text(result.size_bytes)} read in "
        f"{result.seconds:.1f} s ({speed}/s)"
    )
    console.print("names, types and shapes compared with config.json and the index")
    console.print(f"{result.float_tensors} tensors of floating-point numbers tested for NaN and infinity")
    if result.has_manifest:
        console.print(f"{result.hashes} tensors and {result.file_hashes} files compared with {MANIFEST_NAME}")
    else:
        console.print("no manifest: hashes not checked")
    for problem in result.problems:
        console.print(f"[red]problem:[/red] {escape(problem)}")
    if not result.problems:
        console.print("[green]nothing is wrong[/green]")
